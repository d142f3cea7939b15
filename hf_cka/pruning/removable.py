"""What depth pruning may remove from a model, what it would save, and how near a ratio can be reached.

Counting only: nothing is scored and nothing is removed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import nn

from hf_cka.anatomy import Anatomy
from hf_cka.modeling.structure import check_renumbering
from hf_cka.pruning.adapters import own_parameters
from hf_cka.pruning.criteria.base import Kind, Structure
from hf_cka.pruning.plan import PruningPlan


def num_parameters(model: nn.Module) -> int:
    """Return the parameters of a model, embeddings included and adapters left out; tied ones count once.

    Example:
        >>> num_parameters(nn.Linear(3, 2))
        8
    """
    return sum(p.numel() for p in own_parameters(model))


class Removable:
    """What may be removed from one model as it is now.

    Args:
        anatomy: of the model. Make a new one after surgery.

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
        # read once: the config of a model with uneven layers takes its time
        self.skipped = [anatomy.skipped(i) for i in range(anatomy.num_layers)]

    def plan(self, structures: Iterable[Structure]) -> PruningPlan:
        """Return the plan that removes structures.

        A layer that loses both sub-layers goes as a whole, unless norms on the residual stream are left of it (BERT).

        Args:
            structures: layers, runs and sub-layers, by current index.

        Raises:
            ValueError: if they leave nothing.
        """
        layers: set[int] = set()
        halves: dict[str, set[int]] = {"attention": set(), "mlp": set()}
        for structure in structures:
            (layers if structure.kind == "layer" else halves[structure.kind]).update(structure.layers)
        if not self.anatomy.family.stream_norms:
            for kind, other in (("attention", "mlp"), ("mlp", "attention")):
                layers |= {i for i in halves[kind] if i in halves[other] or other in self.skipped[i]}
        return PruningPlan(
            num_layers=self.anatomy.num_layers,
            model_type=self.anatomy.family.name,
            removed_layers=tuple(layers),
            removed_attention=tuple(halves["attention"] - layers),
            removed_mlp=tuple(halves["mlp"] - layers),
        )

    def why_not(self, structures: Sequence[Structure]) -> str:
        """Return why structures cannot be removed together, or an empty string if they can.

        Args:
            structures: by current index.
        """
        try:
            plan = self.plan(structures)
            check_renumbering(self.anatomy.family, self.anatomy.config, plan.kept_layers)
        except ValueError as error:
            return str(error)
        mixing = [i for i in plan.kept_layers if "attention" not in self.skipped[i] and i not in plan.removed_attention]
        return "" if mixing else "No attention would be left, so tokens could not see each other."

    def parameters(self, structures: Sequence[Structure]) -> int:
        """Return how many parameters go with structures.

        Args:
            structures: by current index.
        """
        plan, family = self.plan(structures), self.anatomy.family
        gone: dict[int, int] = {}

        def add(module: nn.Module) -> None:
            gone.update({id(p): p.numel() for p in own_parameters(module)})

        for index in plan.removed_layers:
            add(self.anatomy.layer(index))
        for index in plan.removed_attention:
            for path in (family.attention_core, family.projections["o"], *family.attention_norms):
                add(self.anatomy.layer(index).get_submodule(path))
        for index in plan.removed_mlp:
            paths = (family.mlp,) if family.mlp else (family.projections["up"], family.projections["down"])
            for path in (*paths, *family.mlp_norms):
                add(self.anatomy.layer(index).get_submodule(path))
        return sum(gone.values())

    def candidates(self, kinds: Sequence[Kind], protect: Iterable[int], length: int = 1) -> list[Structure]:
        """Return the structures that may be removed, in the order of the layers.

        Args:
            kinds: which kinds.
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
        reasons = (self.why_not([s]) for s in self._there(kinds, kept, length))
        count = self.anatomy.num_layers
        text = f"Nothing can be removed: of {count} layers, {len(kept)} are protected. {next(reasons, '')}"
        return text.rstrip()

    def _there(self, kinds: Sequence[Kind], kept: set[int], length: int) -> Iterator[Structure]:
        for layer in range(self.anatomy.num_layers - length + 1):
            for kind in kinds:
                structure = Structure(kind, layer, length if kind == "layer" else 1)
                if not kept & set(structure.layers) and kind not in self.skipped[layer]:
                    yield structure

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
