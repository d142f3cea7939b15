"""What depth pruning may remove from a model, what it would save, and how near a ratio can be reached.

Counting only: nothing is scored and nothing is removed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from hf_cka.anatomy import Anatomy
from hf_cka.modeling.counting import Weights, own_named
from hf_cka.modeling.plan import PruningPlan, is_all_of
from hf_cka.pruning.criteria.base import Kind, Structure


class TooLittleError(ValueError):
    """What is to go is less than the smallest thing that can."""


def plan_for(anatomy: Anatomy, **what: Any) -> PruningPlan:
    """Return a plan for the stack that an anatomy is about; it names the stack where the model has several.

    Args:
        anatomy: of the model, on that stack.
        what: fields of the plan; nothing is removed without any.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_cka.anatomy import find_anatomy
        >>> config = LlamaConfig(
        ...     num_hidden_layers=2, hidden_size=8, intermediate_size=16, num_attention_heads=2, vocab_size=16
        ... )
        >>> print(plan_for(find_anatomy(LlamaForCausalLM(config)), removed_layers=(1,)))
        llama, 2 layers: removes 1 layers
    """
    stack = anatomy.stack.path if len(anatomy.stacks) > 1 else ""
    return PruningPlan(anatomy.num_layers, anatomy.model_type, stack=stack, **what)


class Removable:
    """What may be removed from one stack of a model as it is now.

    Args:
        anatomy: of the model, on the stack. Make a new one after surgery.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     num_hidden_layers=2, hidden_size=8, intermediate_size=16, num_attention_heads=2, vocab_size=16
        ... )
        >>> from hf_cka.anatomy import find_anatomy
        >>> removable = Removable(find_anatomy(LlamaForCausalLM(config)))
        >>> removable.parameters([Structure("mlp", 0)]) == 3 * 8 * 16 + 8
        True
        >>> removable.why_not([Structure("layer", 0), Structure("layer", 1)])
        'The plan removes all 2 layers; at least one must stay.'
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.weights = Weights(anatomy.model)
        self.names = [[name for name, _ in own_named(layer)] for layer in anatomy.layers]
        self.whole = [self._is_one(i) for i in range(anatomy.num_layers)]

    def plan(self, structures: Iterable[Structure]) -> PruningPlan:
        """Return the plan that removes structures.

        A layer that loses all of its branches goes as a whole, unless something on the residual stream is left of it
        (BERT's norms). Where a layer has but one branch, that is the layer.

        Args:
            structures: layers, runs and branches, by current index.

        Raises:
            ValueError: if they leave nothing.
        """
        layers: set[int] = set()
        branches: dict[str, set[int]] = {}
        for structure in structures:
            (layers if structure.kind == "layer" else branches.setdefault(structure.kind, set())).update(
                structure.layers
            )
        touched = set().union(*branches.values())
        layers |= {i for i in touched if self._all_of(i, [name for name, some in branches.items() if i in some])}
        return plan_for(
            self.anatomy,
            removed_layers=layers,
            removed_branches={name: some - layers for name, some in branches.items()},
        )

    def _all_of(self, index: int, names: Sequence[str]) -> bool:
        """Whether branches are all that is left of a layer, so that it hands its input on without them."""
        if not 0 <= index < self.anatomy.num_layers:
            return False
        return is_all_of(self.anatomy.stack.layers[index], names, self.names[index])

    def why_not(self, structures: Sequence[Structure]) -> str:
        """Return why structures cannot be removed together, or an empty string if they can.

        Args:
            structures: by current index.
        """
        try:
            self.plan(structures).check(self.anatomy)
        except ValueError as error:
            return str(error)
        return ""

    def parameters(self, structures: Sequence[Structure]) -> int:
        """Return how many parameters go with structures; one that is elsewhere as well stays.

        Args:
            structures: by current index.
        """
        plan = self.plan(structures)
        gone = [f"{self.anatomy.layer_name(i)}.{name}" for i in plan.removed_layers for name in self.names[i]]
        for branch, layers in plan.removed_branches.items():
            for i in layers:
                there = self.anatomy.branch(i, branch)
                gone += [f"{self.anatomy.layer_name(i)}.{name}" for name in (there.parameters if there else ())]
        return self.weights.freed(gone)

    def candidates(self, kinds: Sequence[Kind], protect: Iterable[int], length: int = 1) -> list[Structure]:
        """Return the structures that may be removed, in the order of the layers.

        Args:
            kinds: which kinds: "layer", or kinds of branches. A layer with one branch is offered as a layer.
            protect: current indices of layers that stay.
            length: layers in a run, for whole layers.
        """
        return [s for s in self._there(kinds, set(protect), length) if not self.why_not([s])]

    def why_none(self, kinds: Sequence[Kind], protect: Iterable[int], length: int = 1) -> str:
        """Return why there are no candidates.

        Args:
            kinds: as for :meth:`candidates`.
            protect: likewise.
            length: likewise.
        """
        kept = set(protect)
        reasons = list(dict.fromkeys(self.why_not([s]) for s in self._there(kinds, kept, length)))
        count = self.anatomy.num_layers
        text = f"Nothing can be removed: of {count} layers, {len(kept)} are protected. {' '.join(reasons[:3])}"
        return text.rstrip()

    def _there(self, kinds: Sequence[Kind], kept: set[int], length: int) -> Iterator[Structure]:
        for index, layer in enumerate(self.anatomy.stack.layers[: self.anatomy.num_layers - length + 1]):
            for kind in kinds:
                if kind == "layer":
                    found = [Structure("layer", index, length)]
                elif self.whole[index]:
                    asked = {b.kind for b in layer.branches} or (set(kinds[:1]) if len(kinds) > 1 else set())
                    found = [Structure("layer", index)] if kind in asked else []
                else:
                    found = [Structure(b.name, index) for b in layer.branches if b.kind == kind]
                yield from (s for s in found if not kept & set(s.layers))

    def _is_one(self, index: int) -> bool:
        """Whether a layer never had more than one branch, and is nothing but that."""
        layer = self.anatomy.stack.layers[index]
        if layer.skipped or len(layer.branches) > 1:
            return False
        return layer.single or self._all_of(index, [b.name for b in layer.branches]) or not layer.branches

    def most(self, structures: Sequence[Structure]) -> list[Structure]:
        """Return as many of the candidates as can be removed together, so that something is left."""
        if not self.why_not(structures):
            return list(structures)
        chosen: list[Structure] = []
        for structure in structures:
            if not self.why_not([*chosen, structure]):
                chosen.append(structure)
        return chosen

    def affordable(
        self, structures: Sequence[Structure], need: float, reach: str = "nearest", gone: Sequence[Structure] = ()
    ) -> list[Structure]:
        """Return the structures that bring the removed parameters nearer to the need.

        Args:
            structures: candidates.
            need: parameters that should go.
            reach: ``"nearest"`` allows to overshoot by half of the smallest candidate, so that the need is met to
                within that; ``"at_least"`` by all of it, ``"at_most"`` not at all.
            gone: structures that go already, and whose parameters count.
        """
        saved = self.parameters(gone)
        possible = [s for s in structures if not self.why_not([*gone, s])]
        sizes = {s: self.parameters([*gone, s]) - saved for s in possible}
        if not sizes:
            return []
        allowance = _ALLOWANCE[reach](need - saved, min(sizes.values()))
        return [s for s in possible if sizes[s] <= allowance]

    def take(
        self, ranking: Sequence[Structure], need: float, reach: str = "nearest", limit: int | None = None
    ) -> list[Structure]:
        """Return the structures to remove now: the first in the ranking, passing over those that would overshoot.

        Args:
            ranking: candidates, the first to remove first.
            need: parameters that should go.
            reach: as in :meth:`affordable`.
            limit: take at most this many.
        """
        chosen: list[Structure] = []
        while limit is None or len(chosen) < limit:
            rest = [s for s in ranking if s not in chosen]
            following = self.affordable(rest, need, reach, chosen)
            if not following:
                break
            chosen.append(following[0])
        return chosen


# The largest structure that may still go, from what is needed and the smallest candidate.
_ALLOWANCE: dict[str, Callable[[float, int], float]] = {
    "nearest": lambda need, smallest: need + smallest / 2 if need > smallest / 2 else 0,
    "at_most": lambda need, smallest: need,
    "at_least": lambda need, smallest: need + smallest if need > 0 else 0,
}
