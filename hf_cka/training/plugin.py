"""`TrainerPlugin`: knobs for pruning inside a Trainer, and the few methods of the Trainer that must know of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import get_last_checkpoint

from hf_cka.lookup import lookup
from hf_cka.pruning.config import PruningConfig
from hf_cka.pruning.surgery import apply_plan
from hf_cka.representations import is_main_process
from hf_cka.training.callback import BoundaryDueError, PruningCallback
from hf_cka.training.schedule import PruningSchedule

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
        mode: ``"inplace"``, or ``"boundary"``, which asks nothing of the wrappers around the model.

    Raises:
        ValueError: for an unknown mode; as :class:`PruningCallback`.

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
    mode: str = "inplace"

    def __post_init__(self) -> None:
        lookup(MODES, self.mode, "mode of a TrainerPlugin")
        self._callback()

    def attach(self, trainer: Any) -> Any:
        """Add the callback to a trainer, and let it rebuild the structure of a checkpoint it resumes from.

        Args:
            trainer: a `transformers.Trainer` or a subclass, not yet running.

        Returns:
            The same trainer.

        Raises:
            ValueError: if pruning was attached before.
        """
        callbacks = trainer.callback_handler.callbacks
        if isinstance(trainer, PruningTrainerMixin) or any(isinstance(c, PruningCallback) for c in callbacks):
            raise ValueError("The trainer prunes already: attach one TrainerPlugin, or add one PruningCallback.")
        callback = self._callback()
        callback.trainer = trainer
        trainer.add_callback(callback)
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

    @property
    def pruning(self) -> PruningCallback:
        """The callback that prunes."""
        return next(c for c in self.callback_handler.callbacks if isinstance(c, PruningCallback))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, as `Trainer.train`; a checkpoint's structure is rebuilt before its weights are loaded."""
        checkpoint: Any = resume_from_checkpoint or None
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
            if checkpoint is None:
                raise ValueError(f"There is no checkpoint in output_dir={self.args.output_dir!r} to resume from.")
        if checkpoint is not None:
            self._rebuild_structure(Path(checkpoint))
        try:
            output = super().train(resume_from_checkpoint=checkpoint, **kwargs)  # type: ignore[misc]
        except BoundaryDueError:  # everything is loaded, but for the random numbers
            self._load_rng_state(str(checkpoint))  # type: ignore[attr-defined]
        while self.pruning.boundary and self.pruning.is_due(self.state.global_step):
            folder = self._prune_at_boundary()
            output = super().train(resume_from_checkpoint=str(folder), **kwargs)  # type: ignore[misc]
        return output

    def _rebuild_structure(self, checkpoint: Path) -> None:
        """Prune the model, as it was given, to what the checkpoint holds, and take over how far pruning got."""
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        stored = state.get("stateful_callbacks", {}).get(PruningCallback.__name__)
        stored = stored[0] if isinstance(stored, list) and stored else stored
        record = (stored or {}).get("attributes", {}).get("record")
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

    def _prune_at_boundary(self) -> Path:
        """Prune the model behind a loop that has ended, and write the checkpoint it ended with anew, pruned."""
        self.pruning.prune(self.state, self.model, self.optimizer, self.callback_handler.train_dataloader)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        # written beside the dense one, which it replaces when it is whole
        output_dir, scratch = self.args.output_dir, Path(self.args.output_dir) / ".pruning"
        self.args.output_dir = str(scratch)
        try:
            self._save_checkpoint(self.model, trial=None)  # type: ignore[attr-defined]
        finally:
            self.args.output_dir = output_dir
        if is_main_process():
            old = folder.with_name(f".{folder.name}.dense")
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                os.replace(folder, old)
            os.replace(scratch / folder.name, folder)
            shutil.rmtree(old, ignore_errors=True)
            shutil.rmtree(scratch, ignore_errors=True)
        self.optimizer = self.lr_scheduler = None  # made anew over the parameters that are left
        self.model_wrapped = self.model
        return folder
