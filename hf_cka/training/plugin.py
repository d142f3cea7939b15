"""`TrainerPlugin`: knobs for pruning inside a Trainer, and the few methods of the Trainer that must know of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import get_last_checkpoint

from hf_cka.lookup import lookup
from hf_cka.modeling.surgery import apply_plan
from hf_cka.pruning.config import PruningConfig
from hf_cka.pruning.pruners import start_history
from hf_cka.representations import is_main_process
from hf_cka.training.callback import BoundaryDueError, PruningCallback, stored_record
from hf_cka.training.checks import check_run
from hf_cka.training.optimizer import bare_optimizer
from hf_cka.training.recovery import RecoveryConfig, prepare_recovery
from hf_cka.training.sampling import undisturbed
from hf_cka.training.schedule import PruningSchedule
from hf_cka.training.sharding import Remembered, make_whole, remember

# folder beside the checkpoints with the pruned model, where those hold adapters alone
BASE = "pruned_base"
# how the name of a dense checkpoint ends while its pruned successor takes its place
_REPLACED = ".dense"
#: how the structure is changed -> what that means
MODES: Mapping[str, str] = {
    "inplace": "between two steps of the running loop",
    "boundary": "the loop ends, the checkpoint of that step is pruned, and training goes on from it",
}


@dataclass(frozen=True)
class TrainerPlugin:
    """Prune while a Trainer trains, then go on training to the end.

    Args:
        config: what to prune and how.
        schedule: when; by default ``config.steps`` pruning steps (or one) in the first half of the training.
        calibration_samples: rows of the training set that criteria and repairs look at.
        metric: an evaluation metric that stops pruning when it has become worse...
        max_change: ...by more than this.
        mode: ``"inplace"``, or ``"boundary"``, which asks nothing of the wrappers around the model, FSDP2 included; by
            default the second with a recovery and the first without.
        recovery: what is trained after the last pruning step, by name or as a config: ``"lora"`` (around the pruned
            model; merge it with `finish_recovery` in the end), ``"cka_lora"``, ``"norms"`` or ``"full"``. By default
            what was trained before. The learning rate schedule goes on.

    Raises:
        ValueError: for an unknown mode or recovery, or a recovery in place; as :class:`PruningCallback`.

    Example:
        >>> plugin = TrainerPlugin(PruningConfig(method="depth", criterion="cka", ratio=0.3, steps=4))
        >>> trainer = plugin.attach(SFTTrainer(...))  # doctest: +SKIP
        >>> trainer.train(resume_from_checkpoint=True)  # into the dense model: it is pruned first # doctest: +SKIP
    """

    config: PruningConfig
    schedule: PruningSchedule | None = None
    calibration_samples: int = 64
    metric: str | None = None
    max_change: float | None = None
    mode: str | None = None
    recovery: RecoveryConfig | str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.recovery, str):
            object.__setattr__(self, "recovery", RecoveryConfig(self.recovery))
        if self.mode is None:
            object.__setattr__(self, "mode", "boundary" if self.recovery else "inplace")
        lookup(MODES, str(self.mode), "mode of a TrainerPlugin")
        if self.recovery and self.mode == "inplace":
            raise ValueError(
                "mode='inplace' cannot change what the running loop trains: use mode='boundary' with a recovery."
            )
        self._callback()

    def attach(self, trainer: Any) -> Any:
        """Add the callback to a trainer, and let it rebuild the structure of a checkpoint it resumes from.

        Args:
            trainer: a `transformers.Trainer` or a subclass, not yet running.

        Returns:
            The same trainer.

        Raises:
            ValueError: if pruning was attached before, or the trainer was given an optimizer that the boundary mode
                would replace.
        """
        callbacks = trainer.callback_handler.callbacks
        if isinstance(trainer, PruningTrainerMixin) or any(isinstance(c, PruningCallback) for c in callbacks):
            raise ValueError("The trainer prunes already: attach one TrainerPlugin, or add one PruningCallback.")
        if self.mode == "boundary" and (trainer.optimizer is not None or trainer.lr_scheduler is not None):
            raise ValueError(
                "mode='boundary' makes optimizer and schedule anew after pruning, and cannot do so with those that "
                "were given as optimizers=. Name them in the arguments (optim, lr_scheduler_type), give "
                "optimizer_cls_and_kwargs, or use mode='inplace'."
            )
        callback = self._callback()
        callback.trainer = trainer
        trainer.add_callback(callback)
        trainer.recovery = self.recovery
        # the class of this one trainer, not of the library
        trainer.__class__ = type(f"Pruning{type(trainer).__name__}", (PruningTrainerMixin, type(trainer)), {})
        return trainer

    def _callback(self) -> PruningCallback:
        return PruningCallback(
            self.config,
            self.schedule,
            calibration_samples=self.calibration_samples,
            metric=self.metric,
            max_change=self.max_change,
            boundary=self.mode == "boundary",
        )


class PruningTrainerMixin:
    """What a Trainer with a plugin does differently; `TrainerPlugin.attach` mixes it in."""

    model: Any
    args: Any
    state: TrainerState
    optimizer: Any
    lr_scheduler: Any
    model_wrapped: Any
    callback_handler: Any
    recovery: RecoveryConfig | None
    is_fsdp_enabled: bool
    _whole: Remembered

    @property
    def pruning(self) -> PruningCallback:
        """The callback that prunes."""
        return next(c for c in self.callback_handler.callbacks if isinstance(c, PruningCallback))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, as `Trainer.train`; a checkpoint's structure is rebuilt before its weights are loaded."""
        checkpoint: Any = resume_from_checkpoint or None
        if checkpoint is not None:
            self._undo_interrupted_boundary()
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
            if checkpoint is None:
                raise ValueError(f"There is no checkpoint in output_dir={self.args.output_dir!r} to resume from.")
        if checkpoint is not None:
            self._rebuild_structure(Path(checkpoint))
        if self.is_fsdp_enabled:
            self._before_sharding()
        try:
            output = super().train(resume_from_checkpoint=checkpoint, **kwargs)  # type: ignore[misc]
        except BoundaryDueError:  # everything is loaded, but for the random numbers
            self._load_rng_state(str(checkpoint))  # type: ignore[attr-defined]
        while self.pruning.boundary and self.pruning.is_due(self.state.global_step):
            folder = self._prune_at_boundary()
            if self.is_fsdp_enabled:
                self._whole = remember(self.model)
            output = super().train(resume_from_checkpoint=str(folder), **kwargs)  # type: ignore[misc]
        return output

    def _before_sharding(self) -> None:
        """What has to look at the whole model: the Trainer shards it before its callbacks see it."""
        callback = self.pruning
        check_run(callback, self.args, self.model, self.optimizer)
        self._whole = remember(self.model)
        if callback.history is None:
            with undisturbed():
                batches = callback.batches(self.get_train_dataloader())  # type: ignore[attr-defined]
            callback.history = start_history(self.model, batches, callback.config)

    def _rebuild_structure(self, checkpoint: Path) -> None:
        """Prune the model, as it was given, to what the checkpoint holds, and take over how far pruning got."""
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        record = stored_record(state.get("stateful_callbacks"))
        callback = self.pruning
        if not record or record["history"] is None:
            return
        before = callback.plan
        callback.record = record
        plan = callback.plan
        if plan is not None and before != plan:
            if before is not None:
                raise ValueError(
                    f"The model was pruned further in this process ({before}) than the checkpoint in "
                    f"{checkpoint.name!r} ({plan}). Make the trainer anew, with the model that training began with."
                )
            apply_plan(self.model, plan)
            if self.recovery is not None and state["global_step"] >= record["recovers_from"] > 0:
                self._resume_recovery(checkpoint.parent / BASE)

    def _prune_at_boundary(self) -> Path:
        """Prune the model behind a loop that has ended, and write the checkpoint it ended with anew, pruned."""
        if self.is_fsdp_enabled:
            make_whole(self.model, self.optimizer, self._whole)
        self.pruning.prune(self.state, self.model, self.optimizer, self.callback_handler.train_dataloader)
        if self.recovery is not None and self.pruning.is_finished:
            self._start_recovery()
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        # written beside the dense one, which it replaces when it is whole
        output_dir, scratch = self.args.output_dir, Path(self.args.output_dir) / ".pruning"
        self.args.output_dir = str(scratch)
        try:
            self._save_checkpoint(self.model, trial=None)  # type: ignore[attr-defined]
        finally:
            self.args.output_dir = output_dir
        # every process writes its random numbers into the folder that moves now, and reads what has moved afterwards
        self._wait_for_everyone()
        if is_main_process():
            old = folder.with_name(f".{folder.name}{_REPLACED}")
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                os.replace(folder, old)
            os.replace(scratch / folder.name, folder)
            shutil.rmtree(old, ignore_errors=True)
            shutil.rmtree(scratch, ignore_errors=True)
        self._wait_for_everyone()
        self.optimizer = self.lr_scheduler = None  # made anew over the parameters that are left
        self.model_wrapped = self.model
        return folder

    def _undo_interrupted_boundary(self) -> None:
        """Put back a checkpoint that was moved aside by a run that was killed before the pruned one took its place."""
        if is_main_process():
            for old in Path(self.args.output_dir).glob(f".checkpoint-*{_REPLACED}"):
                folder = old.with_name(old.name.removeprefix(".").removesuffix(_REPLACED))
                if not folder.exists():
                    os.replace(old, folder)
        self._wait_for_everyone()

    def _wait_for_everyone(self) -> None:
        self.accelerator.wait_for_everyone()  # type: ignore[attr-defined]

    def _start_recovery(self) -> None:
        """Change what is trained; what was trained before and still is keeps its state in the optimizer."""
        assert self.recovery is not None
        self.pruning.recovers_from = self.state.global_step
        if is_main_process() and self.recovery.method in ("lora", "cka_lora"):
            # the checkpoints of a PeftModel hold adapters alone
            self.model.save_pretrained(Path(self.args.output_dir) / BASE)
        before = bare_optimizer(self.optimizer)
        self._prepare_recovery()
        self.optimizer = None
        self.create_optimizer()  # type: ignore[attr-defined]
        for group, old in zip(self.optimizer.param_groups, before.param_groups, strict=True):
            # where the schedule is: it sets the learning rate after a step, not before it
            group.update({name: value for name, value in old.items() if name != "params"})
            for parameter in group["params"]:
                if parameter in before.state:
                    self.optimizer.state[parameter] = before.state[parameter]

    def _resume_recovery(self, base: Path) -> None:
        assert self.recovery is not None
        if self.recovery.method in ("lora", "cka_lora"):
            if not base.is_dir():
                raise ValueError(
                    f"{base.name!r} is missing beside the checkpoints: it holds the pruned model that the adapters "
                    "were trained on. Without it the run can only start again."
                )
            pruned = type(self.model).from_pretrained(base, dtype=self.model.dtype)
            self.model.load_state_dict(pruned.state_dict())
        self._prepare_recovery()

    def _prepare_recovery(self) -> None:
        """The same at the start and on resuming: the draw of LoRA's weights and of the rows depends on seeds alone."""
        assert self.recovery is not None
        callback = self.pruning
        with undisturbed():
            batches = None
            if self.recovery.needs_batches:
                loader = self.get_train_dataloader()  # type: ignore[attr-defined]
                batches = callback.batches(loader)
            torch.manual_seed(callback.config.seed)
            self.model = prepare_recovery(self.model, self.recovery, batches)
        if self.args.gradient_checkpointing and hasattr(self.model, "enable_input_require_grads"):
            self.model.enable_input_require_grads()
        self.model_wrapped = self.model
