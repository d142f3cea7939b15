"""What depth pruning may remove from a model, what it would save, and how near a ratio can be reached.

Counting only: nothing is scored and nothing is removed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn

from hf_cka.anatomy import Anatomy
from hf_cka.pruning.criteria.base import Kind, Structure
from hf_cka.pruning.plan import PruningPlan


def num_parameters(model: nn.Module) -> int:
    """Return the parameters of a model, embeddings included; tied ones count once.

    Example:
        >>> num_parameters(nn.Linear(3, 2))
        8
    """
    return sum(p.numel() for p in model.parameters())


def plan_of(anatomy: Anatomy, structures: Iterable[Structure]) -> PruningPlan:
    """Return the plan that removes structures from a model.

    A layer that loses both sub-layers goes as a whole, unless norms on the residual stream are left of it (BERT).

    Args:
        anatomy: of the model.
        structures: layers, runs and sub-layers, by current index.

    Raises:
        ValueError: if they leave nothing.
    """
    layers: set[int] = set()
    gone = {kind: {i for i in range(anatomy.num_layers) if kind in anatomy.skipped(i)} for kind in ("attention", "mlp")}
    new: dict[str, set[int]] = {"attention": set(), "mlp": set()}
    for structure in structures:
        if structure.kind == "layer":
            layers.update(structure.layers)
        else:
            new[structure.kind].add(structure.layer)
    if not anatomy.family.stream_norms:
        both = (gone["attention"] | new["attention"]) & (gone["mlp"] | new["mlp"])
        layers |= both & (new["attention"] | new["mlp"])
    return PruningPlan(
        num_layers=anatomy.num_layers,
        model_type=anatomy.family.name,
        removed_layers=tuple(layers),
        removed_attention=tuple(new["attention"] - layers),
        removed_mlp=tuple(new["mlp"] - layers),
    )


def fits(anatomy: Anatomy, structures: Sequence[Structure]) -> str:
    """Return why structures cannot be removed together from a model, or an empty string if they can."""
    try:
        plan_of(anatomy, structures).validate(anatomy)
    except ValueError as error:
        return str(error)
    return ""


def parameters_of(anatomy: Anatomy, structures: Sequence[Structure]) -> int:
    """Return how many parameters go with structures.

    Args:
        anatomy: of the model.
        structures: by current index.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_cka.anatomy import find_anatomy
        >>> config = LlamaConfig(
        ...     num_hidden_layers=2, hidden_size=8, intermediate_size=16, num_attention_heads=2, vocab_size=16
        ... )
        >>> anatomy = find_anatomy(LlamaForCausalLM(config))
        >>> parameters_of(anatomy, [Structure("mlp", 0)]) == 3 * 8 * 16 + 8
        True
    """
    plan = plan_of(anatomy, structures)
    family = anatomy.family
    gone: dict[int, int] = {}

    def add(module: nn.Module) -> None:
        gone.update({id(p): p.numel() for p in module.parameters()})

    for index in plan.removed_layers:
        add(anatomy.layer(index))
    for index in plan.removed_attention:
        layer = anatomy.layer(index)
        for path in (family.attention_core, family.projections["o"], *family.attention_norms):
            add(layer.get_submodule(path))
    for index in plan.removed_mlp:
        layer = anatomy.layer(index)
        paths = (family.mlp,) if family.mlp else (family.projections["up"], family.projections["down"])
        for path in (*paths, *family.mlp_norms):
            add(layer.get_submodule(path))
    return sum(gone.values())


def candidates(anatomy: Anatomy, kinds: Sequence[Kind], protect: Iterable[int], length: int = 1) -> list[Structure]:
    """Return the structures that may be removed, in the order of the layers.

    Args:
        anatomy: of the model.
        kinds: which kinds.
        protect: current indices of layers that stay.
        length: layers in a run, for whole layers.

    Raises:
        ValueError: if there are none; the message says why.
    """
    kept = set(protect)
    found, why = [], ""
    for layer in range(anatomy.num_layers - length + 1):
        for kind in kinds:
            structure = Structure(kind, layer, length if kind == "layer" else 1)
            if kept & set(structure.layers) or (kind != "layer" and kind in anatomy.skipped(layer)):
                continue
            reason = fits(anatomy, [structure])
            if reason:
                why = why or reason
            else:
                found.append(structure)
    if not found:
        raise ValueError(
            f"Nothing can be removed: of {anatomy.num_layers} layers, {len(kept)} are protected. {why}".rstrip()
        )
    return found


def most(anatomy: Anatomy, structures: Sequence[Structure]) -> list[Structure]:
    """Return as many of the candidates as can be removed together, so that something is left."""
    chosen: list[Structure] = []
    if not fits(anatomy, structures):
        return list(structures)
    for structure in structures:
        if not fits(anatomy, [*chosen, structure]):
            chosen.append(structure)
    return chosen


def affordable(
    anatomy: Anatomy,
    structures: Sequence[Structure],
    need: float,
    reach: str = "nearest",
    gone: Sequence[Structure] = (),
) -> list[Structure]:
    """Return the structures that bring the removed parameters nearer to the need.

    Args:
        anatomy: of the model.
        structures: candidates.
        need: parameters that should go.
        reach: ``"nearest"`` allows to overshoot by half of the smallest candidate, so that the need is met to within
            that; ``"at_least"`` by all of it, ``"at_most"`` not at all.
        gone: structures that go already, and whose parameters count.

    Example:
        >>> affordable(anatomy, structures, need=1e6)  # doctest: +SKIP
        [Structure(kind='mlp', layer=4, length=1)]
    """
    saved = parameters_of(anatomy, gone)
    possible = [s for s in structures if not fits(anatomy, [*gone, s])]
    sizes = {s: parameters_of(anatomy, [*gone, s]) - saved for s in possible}
    if not sizes:
        return []
    allowance = _ALLOWANCE[reach](need - saved, min(sizes.values()))
    return [s for s in possible if sizes[s] <= allowance]


def take(
    anatomy: Anatomy, ranking: Sequence[Structure], need: float, reach: str = "nearest", limit: int | None = None
) -> list[Structure]:
    """Return the structures to remove now: the first in the ranking, passing over those that would overshoot.

    Args:
        anatomy: of the model.
        ranking: candidates, the first to remove first.
        need: parameters that should go.
        reach: as in :func:`affordable`.
        limit: take at most this many.
    """
    chosen: list[Structure] = []
    while limit is None or len(chosen) < limit:
        rest = [s for s in ranking if s not in chosen]
        following = affordable(anatomy, rest, need, reach, chosen)
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
