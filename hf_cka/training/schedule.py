"""When, during training, how much is pruned: numbers only. No model and no trainer is known here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from hf_cka.lookup import lookup

#: name -> share of all pruning that is done when the part t (0 to 1) of the pruning steps is
SHAPES: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {"linear": lambda t: t, "cubic": lambda t: 1 - (1 - t) ** 3}
)


@dataclass(frozen=True)
class PruningSchedule:
    """The training steps at which parts of the model go.

    Args:
        start: of the first pruning step.
        end: of the last; by default ``start`` with one pruning step, else half of the training.
        events: pruning steps, evenly spread from ``start`` to ``end``.
        shape: ``"linear"`` removes as much each time; ``"cubic"`` most at first (Zhu and Gupta, arXiv 1710.01878).
        unit: of ``start`` and ``end``: ``"steps"`` (optimizer steps), ``"epochs"``, or ``"part"`` (0 to 1 of the
            training).

    Raises:
        ValueError: for an unknown name, or numbers out of order.

    Example:
        >>> PruningSchedule(start=10, end=40, events=4).points(100)
        ((10, 0.25), (20, 0.5), (30, 0.75), (40, 1.0))
        >>> PruningSchedule(start=0.5, unit="epochs").points(100, steps_per_epoch=50)
        ((25, 1.0),)
        >>> [round(share, 3) for _, share in PruningSchedule(start=1, end=4, events=4, shape="cubic").points(10)]
        [0.578, 0.875, 0.984, 1.0]
    """

    start: float = 1
    end: float | None = None
    events: int = 1
    shape: str = "linear"
    unit: str = "steps"

    def __post_init__(self) -> None:
        lookup(SHAPES, self.shape, "shape of a pruning schedule")
        lookup({"steps": None, "epochs": None, "part": None}, self.unit, "unit of a pruning schedule")
        if self.events < 1:
            raise ValueError(f"events={self.events} must be at least 1.")
        if self.start < 0 or (self.end is not None and self.end < self.start):
            raise ValueError(f"start={self.start} and end={self.end}: they must be in order and not negative.")

    def points(self, max_steps: int, steps_per_epoch: float | None = None) -> tuple[tuple[int, float], ...]:
        """Return (training step, share of all pruning done after it) of every pruning step.

        Args:
            max_steps: of the training.
            steps_per_epoch: needed for ``unit="epochs"``.

        Raises:
            ValueError: if pruning would begin before the first step, end after training does, or two pruning steps
                fall on one training step.
        """
        first = self._step(self.start, max_steps, steps_per_epoch)
        if self.end is not None:
            last = self._step(self.end, max_steps, steps_per_epoch)
        else:
            last = first if self.events == 1 else max_steps // 2
        if first < 1:
            first = 1
        if last > max_steps:
            raise ValueError(
                f"The pruning schedule ends at step {last}, but training ends at step {max_steps}: set end to at most "
                f"{max_steps} steps, or train longer (max_steps, num_train_epochs)."
            )
        if last - first + 1 < self.events:
            raise ValueError(
                f"events={self.events} pruning steps do not fit between the training steps {first} and {last}: set "
                f"events to at most {max(1, last - first + 1)}, or end later."
            )
        shape, found = SHAPES[self.shape], []
        for k in range(self.events):
            step = first + round(k * (last - first) / max(1, self.events - 1))
            found.append((step, 1.0 if k == self.events - 1 else shape((k + 1) / self.events)))
        return tuple(found)

    def _step(self, value: float, max_steps: int, steps_per_epoch: float | None) -> int:
        if self.unit == "part":
            return math.ceil(value * max_steps)
        if self.unit == "epochs":
            if not steps_per_epoch:
                raise ValueError("unit='epochs' needs a data set of known length; use unit='steps' or 'part'.")
            return math.ceil(value * steps_per_epoch)
        return math.ceil(value)
