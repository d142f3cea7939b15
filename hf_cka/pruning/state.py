"""A pruning run on its way: the model so far, what was removed by original index, and the history on disk."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import nn

from hf_cka.anatomy import Anatomy, find_anatomy
from hf_cka.data import Batch
from hf_cka.modeling.counting import num_parameters
from hf_cka.modeling.plan import PruningPlan
from hf_cka.modeling.surgery import apply_plan
from hf_cka.pruning.config import STRUCTURES, PruningConfig
from hf_cka.pruning.criteria.base import Kind, ScoringContext, Structure
from hf_cka.pruning.history import PruningHistory, PruningStep
from hf_cka.pruning.removable import Removable
from hf_cka.representations import Pooling, resolve_pooling


@dataclass
class Run:
    """One run of :func:`hf_cka.prune`.

    Args:
        config: what was asked for.
        model: the model so far; changed in place.
        batches: calibration data.
        history: what was done.
        plan: everything removed so far, by original index.
        output: where the history goes after every step, if anywhere.
        writes: this process writes it.
        progress: show bars.
        on_step: called after every step.
        tune: trains a model in place for a moment, if anything does.
        stack: path of the stack that is pruned; by default the one with most parameters.
    """

    config: PruningConfig
    model: nn.Module
    batches: Sequence[Batch]
    history: PruningHistory
    plan: PruningPlan
    output: Path | None = None
    writes: bool = True
    progress: bool = False
    on_step: Callable[[PruningStep], None] | None = None
    tune: Callable[[nn.Module], object] | None = None
    stack: str | None = None
    anatomy: Anatomy = field(init=False)
    removable: Removable = field(init=False)

    def __post_init__(self) -> None:
        self._look()

    def _look(self) -> None:
        self.anatomy = find_anatomy(self.model, self.stack)
        self.stack = self.anatomy.stack.path
        self.removable = Removable(self.anatomy)

    def candidates(self, length: int = 1) -> list[Structure]:
        """Return what depth pruning may remove now, or runs of that many layers."""
        return self.removable.candidates(self.kinds, self.protected(), length)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of structure that depth pruning removes."""
        return STRUCTURES[self.config.structures]

    @property
    def parameters(self) -> int:
        """Parameters the model has now."""
        return num_parameters(self.model)

    @property
    def removed(self) -> int:
        """Parameters removed so far."""
        return self.history.parameters - self.parameters

    @property
    def need(self) -> float:
        """Parameters that should still go; infinite if the config counts structures."""
        return float("inf") if self.config.ratio is None else self.config.ratio * self.history.parameters - self.removed

    @property
    def pooling(self) -> Pooling:
        """The readout."""
        return resolve_pooling(self.config.pooling, self.anatomy.kind)

    def context(self, model: nn.Module | None = None) -> ScoringContext:
        """Return what a criterion sees: the model so far, or another one."""
        anatomy = self.anatomy if model is None else find_anatomy(model, self.stack)
        # the seed follows the step, so that a resumed run draws what an uninterrupted one would
        seed = self.config.seed * 10_007 + len(self.history.steps)
        return ScoringContext(anatomy.model, anatomy, self.batches, self.pooling, seed, self.progress)

    def in_words(self, structures: Sequence[Structure]) -> tuple[str, ...]:
        """Name structures by original index, each layer of a run for itself."""
        kept = self.plan.kept_layers
        return tuple(f"{s.kind} {kept[i]}" for s in structures for i in s.layers)

    def protected(self) -> set[int]:
        """Return the current indices of protected layers.

        Raises:
            ValueError: for an index out of range, or a stack that is not there.
        """
        wanted = protected_layers(self.anatomy, self.config, self.plan.num_layers)
        return {now for now, before in enumerate(self.plan.kept_layers) if before in wanted}

    def remove(self, structures: Sequence[Structure]) -> None:
        """Remove structures, given by current index, from the model."""
        self.apply(self.removable.plan(structures))

    def apply(self, plan: PruningPlan) -> None:
        """Apply a plan for the model so far."""
        self.adopt(apply_plan(self.model, plan), plan)

    def adopt(self, model: nn.Module, plan: PruningPlan) -> None:
        """Go on with a model that was made from the one so far by a plan."""
        self.model, self.plan = model, self.plan.then(plan)
        self._look()

    def adopt_weights(self, weights: Mapping[str, Any]) -> None:
        """Give the model so far weights of its own."""
        self.model = copy.deepcopy(self.model)
        self.model.load_state_dict(weights)
        self._look()

    def record(
        self,
        branch: str,
        removed: Sequence[str],
        score: float | None,
        scores: Mapping[str, float],
        branches: Mapping[str, float] | None = None,
        layer_calls: tuple[int, int] = (0, 0),
        notes: Sequence[str] = (),
        carry: Fraction = Fraction(0),
        details: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        """Add a step to the history, on disk as well; ``layer_calls`` are those taken, and those in full."""
        step = PruningStep(
            step=len(self.history.steps) + 1,
            branch=branch,
            removed=tuple(removed),
            score=score,
            scores=dict(scores),
            details=dict(details or {}),
            branches=dict(branches or {}),
            parameters=self.parameters,
            ratio=self.removed / self.history.parameters,
            layer_calls=layer_calls[0],
            layer_calls_in_full=layer_calls[1],
            plan=self.plan,
            notes=tuple(notes),
            carry=str(carry),
        )
        self.history = self.history.with_step(step)
        if self.output is not None and self.writes:
            self.history.save(self.output)
        if self.on_step is not None:
            self.on_step(step)


def protected_layers(anatomy: Anatomy, config: PruningConfig, count: int) -> set[int]:
    """Return the layers of a stack that a config protects, by original index.

    Args:
        anatomy: of the stack.
        config: with `protect`.
        count: how many layers the stack had before anything was removed.

    Raises:
        ValueError: for an index out of range, or a stack that is not there.
    """
    protect = config.protect
    if isinstance(protect, Mapping):
        here = [layers for name, layers in protect.items() if anatomy.on(name).stack.path == anatomy.stack.path]
        protect = tuple(i for layers in here for i in layers)
    wrong = [i for i in protect if not -count <= i < count]
    if wrong:
        raise ValueError(f"protect={wrong} is out of range: the model has {count} layers.")
    return {i % count for i in protect}


def sharing_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model that shares its parameters and buffers, which surgery replaces and never writes to.

    Example:
        >>> linear = nn.Linear(2, 2)
        >>> twin = sharing_copy(linear)
        >>> twin is not linear and twin.weight is linear.weight
        True
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            for shared in ("weights_map", "tied_params_map"):  # where accelerate keeps offloaded weights
                memo[id(getattr(part, shared, None))] = getattr(part, shared, None)
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        # A forward that something put on the instance (TRL's trainers do) holds on to the model it was made for, and
        # the copy would run that model instead of itself. Accelerate's device hooks are copied with their module.
        if "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):
            del module.forward
    return twin
