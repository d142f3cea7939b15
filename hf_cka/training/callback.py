"""`PruningCallback` prunes a model while a Trainer trains it: when; what goes is decided in `hf_cka.pruning`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_cka.anatomy import find_anatomy
from hf_cka.modeling.plan import PruningPlan
from hf_cka.pruning.config import PruningConfig
from hf_cka.pruning.history import PruningHistory
from hf_cka.pruning.pruners import prune_further, start_history
from hf_cka.training.checks import check_run
from hf_cka.training.distributed import first_decides
from hf_cka.training.sampling import training_batches
from hf_cka.training.schedule import PruningSchedule
from hf_cka.training.structure import change_structure

# how the names of metrics end that rise when the model gets worse
_LOWER_IS_BETTER = ("loss", "perplexity")


class BoundaryDueError(RuntimeError):
    """Training was resumed at a boundary that was not pruned before the run was killed."""


def stored_record(callbacks: Any) -> dict[str, Any] | None:
    """Return how far pruning got, from the callbacks' part of a ``trainer_state.json``; None if it does not say.

    Example:
        >>> stored_record({"PruningCallback": [{"attributes": {"record": {"events_done": 1}}}]})
        {'events_done': 1}
    """
    stored = (callbacks or {}).get(PruningCallback.__name__)
    stored = stored[0] if isinstance(stored, list) and stored else stored
    return (stored or {}).get("attributes", {}).get("record")


class PruningCallback(TrainerCallback, ExportableState):
    """Prunes the model of a `Trainer` (or `SFTTrainer`, ...) at the steps of a schedule, between two training steps.

    The optimizer keeps the state of what stays, the learning rate schedule goes on, and checkpoints hold the structure
    and the history. Everything is in `hf_cka.training.structure` and `hf_cka.pruning`, for loops of one's own. On its
    own the callback serves one process; `TrainerPlugin` adds resuming into a dense model, and several processes.

    Args:
        config: what to prune and how. With ``steps``, so many pruning steps unless a schedule says otherwise.
        schedule: when. By default ``config.steps`` events (or one) from the first step to the middle of the training.
        calibration_samples: rows of the training set that criteria and repairs look at, the same at every event.
        metric: stop pruning when this evaluation metric ("eval_loss") has become worse than before the first event...
        max_change: ...by more than this: risen for a loss or perplexity, fallen for anything else.
        boundary: do not prune in the loop, but stop there; `TrainerPlugin` sets it.

    Raises:
        ValueError: at construction or when training starts, for settings that do not fit (see `check_run`), a ratio
            that cannot be reached, or a schedule that ends after training does. An error in a pruning step leaves model
            and optimizer as they were.

    Example:
        >>> callback = PruningCallback(PruningConfig(method="depth", criterion="cka", ratio=0.3, steps=4))
        >>> callback.schedule.events
        4
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])  # doctest: +SKIP
    """

    def __init__(
        self,
        config: PruningConfig | Mapping[str, Any],
        schedule: PruningSchedule | Mapping[str, Any] | None = None,
        *,
        calibration_samples: int = 64,
        metric: str | None = None,
        max_change: float | None = None,
        boundary: bool = False,
    ) -> None:
        self.config = config if isinstance(config, PruningConfig) else PruningConfig.from_dict(config)
        if schedule is None:
            schedule = PruningSchedule(events=self.config.steps or 1)
        self.schedule = schedule if isinstance(schedule, PruningSchedule) else PruningSchedule(**schedule)
        if calibration_samples < 2:
            raise ValueError(f"calibration_samples={calibration_samples} must be at least 2.")
        if (metric is None) != (max_change is None):
            raise ValueError(f"metric={metric!r} and max_change={max_change}: give both or neither.")
        if max_change is not None and max_change < 0:
            raise ValueError(f"max_change={max_change} must not be negative.")
        self.calibration_samples, self.metric, self.max_change = calibration_samples, metric, max_change
        self.boundary = boundary
        self.trainer: Any = None  # set by the plugin
        self.history: PruningHistory | None = None
        self.events_done = 0
        self.baseline: float | None = None
        self.stopped = False
        self.recovers_from = 0  # the training step at which the plugin changed what is trained
        self.points: tuple[tuple[int, float], ...] = ()

    # ---- what a checkpoint holds ----

    def state(self) -> dict[str, Any]:
        """Return what goes into ``trainer_state.json``: the settings, and how far pruning got."""
        settings = {name: getattr(self, name) for name in ("calibration_samples", "metric", "max_change", "boundary")}
        config, schedule = self.config.to_dict(), asdict(self.schedule)
        return {"args": {"config": config, "schedule": schedule, **settings}, "attributes": {"record": self.record}}

    @property
    def record(self) -> dict[str, Any]:
        """How far pruning got, as plain JSON data."""
        return {
            "history": None if self.history is None else self.history.to_json(),
            "events_done": self.events_done,
            "baseline": self.baseline,
            "stopped": self.stopped,
            "recovers_from": self.recovers_from,
        }

    @record.setter
    def record(self, data: Mapping[str, Any]) -> None:
        self.history = None if data["history"] is None else PruningHistory.from_json(data["history"])
        self.events_done, self.baseline = int(data["events_done"]), data["baseline"]
        self.stopped, self.recovers_from = bool(data["stopped"]), int(data["recovers_from"])

    @property
    def plan(self) -> PruningPlan | None:
        """What was removed so far, by the index of the model that training began with."""
        return self.history.steps[-1].plan if self.history and self.history.steps else None

    # ---- what the Trainer calls ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check everything that can be checked, and look up the steps of the schedule."""
        model, loader = kwargs["model"], kwargs["train_dataloader"]
        check_run(self, args, model, kwargs["optimizer"])
        self.points = self.schedule.points(state.max_steps, len(loader) / args.gradient_accumulation_steps)
        if self.history is None and state.global_step:
            self._read_own_state(state)
        if self.history is None:
            self.history = start_history(model, self.batches(loader), self.config)
        self._check_structure(model)
        if self.boundary and self.is_due(state.global_step):
            raise BoundaryDueError

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """Prune, if a pruning step is due; before a checkpoint of this step is written."""
        if not self.points:
            raise RuntimeError(
                "PruningCallback was added to a Trainer that is already running. Add it before trainer.train()."
            )
        if self.is_due(state.global_step):
            if self.boundary:
                control.should_save = control.should_training_stop = True
                return control
            self.prune(state, kwargs["model"], kwargs["optimizer"], kwargs["train_dataloader"])
        return None

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop pruning when the metric has become too bad."""
        if self.metric is None or self.max_change is None:
            return
        metrics = kwargs["metrics"]
        if self.metric not in metrics:
            raise ValueError(f"metric={self.metric!r} is not among the evaluation metrics: {', '.join(metrics)}.")
        if self.baseline is None:
            self.baseline = float(metrics[self.metric])
        worse = float(metrics[self.metric]) - self.baseline
        if not self.metric.endswith(_LOWER_IS_BETTER):
            worse = -worse
        self.stopped = self.stopped or worse > self.max_change

    # ---- pruning ----

    def is_due(self, step: int) -> bool:
        """Whether a pruning step is due at a training step."""
        return not self.stopped and self.events_done < len(self.points) and step >= self.points[self.events_done][0]

    @property
    def is_finished(self) -> bool:
        """Whether no pruning step will come any more."""
        return self.stopped or self.events_done >= len(self.points)

    def prune(self, state: TrainerState, model: Any, optimizer: Any, loader: Any) -> None:
        """Carry out the pruning step that is due."""
        assert self.history is not None
        batches = self.batches(loader)
        share = self.points[self.events_done][1]
        plan, history = prune_further(model, batches, self.history, share)
        decided = first_decides((plan.to_json(), history.to_json()))
        plan, history = PruningPlan.from_json(decided[0]), PruningHistory.from_json(decided[1])
        if not plan.removes_nothing:
            wrapped = None if self.trainer is None else self.trainer.model_wrapped
            change_structure(
                model, plan, optimizer=optimizer, method=self.config.repair, batches=batches, wrapped=wrapped
            )
        self.history, self.events_done = history, self.events_done + 1
        ratio = history.steps[-1].ratio if history.steps else 0.0
        state.log_history.append({"step": state.global_step, "epoch": state.epoch, "pruned_ratio": ratio})

    def batches(self, loader: Any) -> list[dict[str, Any]]:
        """Return the calibration rows: the same whenever they are drawn."""
        return training_batches(loader, self.calibration_samples, self.config.seed)

    def _read_own_state(self, state: TrainerState) -> None:
        """Without the plugin: the model was loaded from the checkpoint, and the Trainer read its state."""
        record = stored_record(state.stateful_callbacks)
        if record:
            self.record = record

    def _check_structure(self, model: Any) -> None:
        """Refuse a model that is not what the history left: its weights would be in the wrong places."""
        if self.plan is None:
            return
        now = find_anatomy(model, self.plan.stack or None).stack.layers
        layers = self.plan.kept_layers
        wrong = len(now) != len(layers) or any(
            index in kept and (width := layer.width(name)) is not None and width.members != len(kept[index])
            for name, kept in self.plan.kept.items()
            for index, layer in zip(layers, now, strict=False)
        )
        if wrong:
            raise ValueError(
                f"The checkpoint was pruned to {len(layers)} layers ({self.plan}), and the model that is being trained "
                f"has {len(now)} and other widths. Attach the plugin (`TrainerPlugin(...).attach(trainer)`), "
                "which prunes a dense model before it loads a checkpoint, or give the Trainer the checkpoint's model."
            )
