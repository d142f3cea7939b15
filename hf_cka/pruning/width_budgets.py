"""How a budget of parameters is spread over layers, KV groups and MLP units: sizes only, never which ones.

One small function per rule, all of one signature, in ``BUDGETS``.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Literal

from hf_cka.lookup import lookup
from hf_cka.pruning.criteria.base import WidthScores
from hf_cka.pruning.width_parameters import ModelParameters, WidthSizes

#: name -> (KV groups may go, units may go); whole experts take the place of units
STRUCTURES: Mapping[str, tuple[bool, bool]] = MappingProxyType(
    {"both": (True, True), "heads": (True, False), "units": (False, True), "experts": (False, True)}
)


@dataclass(frozen=True)
class WidthSettings:
    """How widths may be chosen.

    Args:
        structures: ``"both"`` (KV groups and units), ``"heads"`` or ``"units"``; where a model has none of a kind, the
            other one. Or whole ``"experts"``, of which every layer keeps as many as its router picks for a token.
        rule: of the budget ``"uniform"``: see :func:`width_step`.
        multiple_of: round the units (or experts) that stay to a multiple of this.
        min_groups: KV groups that stay in every layer.
        floor: part of every layer's units (or experts) that stays at least, under the budgets that differ between
            layers.
        layer_importance: per layer, for the budget ``"importance"``.
        strength: of the budget ``"importance"``: 0 is uniform; at 1 the layer that is farthest from the mean
            importance loses nothing (or twice the mean share).
        inexact: narrow also what a norm spans (OLMo 2's heads), so that removing some is not equal to zeroing them;
            without it such widths are left alone, unless there are no others of that kind.

    Raises:
        ValueError: for an unknown name or a number that is out of range.

    Example:
        >>> WidthSettings(structures="units", multiple_of=8).min_groups
        1
    """

    structures: str = "both"
    rule: str = "exact"
    multiple_of: int = 1
    min_groups: int = 1
    floor: float = 0.1
    layer_importance: tuple[float, ...] | None = None
    strength: float = 0.5
    inexact: bool = False

    def __post_init__(self) -> None:
        lookup(STRUCTURES, self.structures, "structures")
        lookup({"exact": None, "proportional": None}, self.rule, "rule")
        for name in ("multiple_of", "min_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("floor", "strength"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}.")

    @property
    def inner(self) -> str:
        """What may go inside layers beside heads: "units", or whole "experts".

        Example:
            >>> WidthSettings(structures="experts").inner
            'experts'
        """
        return "experts" if self.structures == "experts" else "units"


@dataclass(frozen=True)
class WidthStep:
    """The outcome of one uniform width step.

    Args:
        sizes: what every layer keeps.
        removed: parameters that go.
        carry: the part of a KV group per layer that the attention still owes; hand it to the next step.
    """

    sizes: WidthSizes
    removed: int
    carry: Fraction


def width_step(
    parameters: ModelParameters,
    budget: int,
    *,
    structures: str = "both",
    rule: Literal["exact", "proportional"] | str = "exact",
    carry: Fraction = Fraction(0),
    min_groups: int = 1,
    multiple_of: int = 1,
    reach: str = "nearest",
) -> WidthStep:
    """Remove the same number of KV groups and units from every layer, for a number of parameters.

    Where layers do not have equally many, every layer loses the same share instead; see :func:`share_sizes`.

    The attention owes its proportional share of the budget. It is accumulated in ``carry``, in fractions of a KV
    group, and a group goes from every layer when a whole one is owed. Under the rule ``"exact"`` the MLP takes the
    exact remainder of the budget, and the attention what the MLP cannot; under ``"proportional"`` it loses its own
    share only, as in the papers' released code.

    Args:
        parameters: of the model as it is.
        budget: parameters to remove.
        structures: ``"both"``, ``"heads"``, ``"units"`` or ``"experts"``.
        rule: what the MLP takes.
        carry: what the attention owed before, in KV groups per layer.
        min_groups: KV groups that stay in every layer.
        multiple_of: round the units that stay to a multiple of this.
        reach: which side of the budget to end on, where layers lose the same share.

    Raises:
        ValueError: for a negative budget, or one that would empty the layers; the message names the largest possible.

    Source: MoP (arXiv 2602.06127), Section 3 and its GQA matching; AMP (arXiv 2504.21174).

    Example:
        >>> from transformers import LlamaConfig
        >>> from hf_cka.pruning.width_parameters import layer_parameters
        >>> sizes = dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, vocab_size=32000)
        >>> llama2 = layer_parameters(LlamaConfig(num_hidden_layers=32, **sizes))  # LLaMA-2-7B
        >>> step = width_step(llama2, 7 * llama2.layer_total(0), rule="proportional")  # AMP's `--iteration 7`
        >>> step.sizes.kv_groups[0], step.sizes.units[0], f"{step.removed / llama2.total:.2%}"
        (25, 8600, '21.02%')
    """
    settings = WidthSettings(structures=structures, rule=rule, min_groups=min_groups, multiple_of=multiple_of)
    take_groups, take_units = STRUCTURES[structures]
    now = parameters.sizes
    if not now.uniform:
        sizes = share_sizes(parameters, budget, settings, reach)
        return WidthStep(sizes, parameters.total - parameters.count(sizes), carry)
    groups, units = max(now.kv_groups), max(now.units)
    group_cost = sum(part.group for part, n in zip(parameters.layers, now.kv_groups, strict=True) if n)
    unit_cost = sum(part.unit for part, n in zip(parameters.layers, now.units, strict=True) if n)
    spare = max(0, groups - min_groups) if take_groups else 0
    fewest = max((part.least for part, n in zip(parameters.layers, now.units, strict=True) if n), default=1)
    gone_units = 0
    if take_units:
        share = Fraction(budget, sum(parameters.layer_total(i) for i in range(len(parameters.layers))))
        carry += share * groups if take_groups else 0
        gone_groups = min(spare, math.floor(carry))
        # a group that the attention cannot give is taken from the MLP, so it is owed no longer
        carry -= math.floor(carry)
        rest = Fraction(budget - gone_groups * group_cost, unit_cost) if unit_cost else Fraction(0)
        while rule == "exact" and gone_groups < spare and _nearest(rest) > units - fewest >= 0:
            gone_groups += 1  # what the MLP cannot give, more groups give
            rest -= Fraction(group_cost, unit_cost)
        gone_units = max(0, _nearest(share * units if rule == "proportional" else rest))
    else:
        gone_groups = _nearest(Fraction(budget, group_cost)) if group_cost else 0
    most = spare * group_cost + (units - fewest) * unit_cost * take_units
    if budget < 0 or gone_groups > spare or (take_units and gone_units > units - fewest):
        raise ValueError(
            f"Cannot remove {budget:,} parameters (structures={structures!r}) at equal widths: between 0 and {most:,} "
            f"({most / parameters.total:.1%} of all) can go, while {_fewest_in_words(settings, fewest)} stay per "
            "layer."
        )
    kept = _rounded(units - gone_units, units, settings, fewest) if take_units else units
    sizes = WidthSizes(
        tuple(n - gone_groups if n else 0 for n in now.kv_groups), tuple(kept if n else 0 for n in now.units)
    )
    return WidthStep(sizes, parameters.total - parameters.count(sizes), carry)


def share_sizes(
    parameters: ModelParameters, budget: float, settings: WidthSettings, reach: str = "nearest"
) -> WidthSizes:
    """Choose widths for layers that do not have equally many: each loses the same share of what it has, rounded.

    Groups lose the share that the budget is of all layers, and units what is then left of the budget; where units
    cannot, both lose one share. At least ``min_groups`` groups and one unit stay in a layer that has any.

    Args:
        parameters: of the model.
        budget: parameters to remove.
        settings: how.
        reach: ``"nearest"`` to the budget, or on one side of it (``"at_least"``, ``"at_most"``).

    Raises:
        ValueError: for a budget that is out of reach, with the largest possible.

    Example:
        >>> from hf_cka.pruning.width_parameters import LayerParameters
        >>> model = ModelParameters((LayerParameters(10, 3, 2),) * 2, WidthSizes((4, 1), (20, 40)), other=5)
        >>> share_sizes(model, 60, WidthSettings())
        WidthSizes(kv_groups=(3, 1), units=(14, 29))
    """
    take = STRUCTURES[settings.structures]
    units_stay = [part.least for part in parameters.layers]
    groups_stay = [settings.min_groups] * len(units_stay)
    kinds = [(parameters.sizes.kv_groups, groups_stay), (parameters.sizes.units, units_stay)]
    # (members, fewest, parameters of one, units?) of everything that may go
    parts = [
        _Part(layer, n, min(n, least[layer]), (part.unit if units else part.group), units)
        for units, (counts, least) in enumerate(kinds)
        if take[units]
        for layer, (n, part) in enumerate(zip(counts, parameters.layers, strict=True))
        if n
    ]
    most = sum((p.members - p.kept(Fraction(1), settings)) * p.cost for p in parts)
    if not 0 <= budget <= most:
        raise ValueError(
            f"Cannot remove {round(budget):,} parameters (structures={settings.structures!r}) in equal shares: between "
            f"0 and {most:,} ({most / parameters.total:.1%} of all) can go, while "
            f"{_fewest_in_words(settings, max(units_stay))} stay per layer."
        )
    share = Fraction(budget) / sum(parameters.layer_total(i) for i in range(len(parameters.layers)))
    groups, units = [p for p in parts if not p.units], [p for p in parts if p.units]
    if settings.rule == "proportional" and units:
        found = [{p: p.kept(share, settings) for p in parts}]
    else:
        found = [_solved(parts, budget, settings, reach)]
    if groups and units and settings.rule == "exact":
        first = {p: p.kept(share, settings) for p in groups}
        left = budget - sum((p.members - n) * p.cost for p, n in first.items())
        able = sum((p.members - p.kept(Fraction(1), settings)) * p.cost for p in units)
        if 0 <= left <= able:
            found.insert(0, first | _solved(units, left, settings, reach))
    off = [sum((p.members - n) * p.cost for p, n in some.items()) - budget for some in found]
    wrong = {"nearest": lambda x: False, "at_least": lambda x: x < 0, "at_most": lambda x: x > 0}[reach]
    best = found[min(range(len(found)), key=lambda i: (wrong(off[i]), abs(off[i]), i))]
    sizes = [list(counts) for counts, _ in kinds]
    for p, n in best.items():
        sizes[p.units][p.layer] = n
    return WidthSizes(tuple(sizes[0]), tuple(sizes[1]))


@dataclass(frozen=True)
class _Part:
    """The members of one layer."""

    layer: int
    members: int
    least: int
    cost: int
    units: int

    def kept(self, share: Fraction, settings: WidthSettings) -> int:
        """How many stay when a share goes."""
        stay = max(self.least, self.members - _nearest(share * self.members))
        if self.units and stay < self.members:
            return _rounded(stay, self.members, settings, self.least)
        return stay


def _solved(parts: Sequence[_Part], budget: float, settings: WidthSettings, reach: str) -> dict[_Part, int]:
    """The share that removes what is wanted: all shares at which something changes are known, and more is more."""
    widths = {p.members for p in parts}
    steps = [Fraction(0), *sorted({Fraction(2 * k + 1, 2 * n) for n in widths for k in range(n)})]

    def removed(share: Fraction) -> int:
        return sum((p.members - p.kept(share, settings)) * p.cost for p in parts)

    above = min(bisect.bisect_left(steps, budget, key=removed), len(steps) - 1)
    below = above if removed(steps[above]) <= budget else max(0, above - 1)
    near = above if removed(steps[above]) - budget < budget - removed(steps[below]) else below
    share = steps[{"nearest": near, "at_least": above, "at_most": below}[reach]]
    return {p: p.kept(share, settings) for p in parts}


def uniform_sizes(parameters: ModelParameters, budget: int, scores: WidthScores, settings: WidthSettings) -> WidthSizes:
    """Choose equal widths for all layers, so that stock classes load the result.

    Args:
        parameters: of the model.
        budget: parameters to remove.
        scores: not needed for this budget.
        settings: how.

    Raises:
        ValueError: as :func:`width_step`.

    Example:
        >>> from hf_cka.pruning.width_parameters import LayerParameters
        >>> model = ModelParameters((LayerParameters(10, 3, 2),) * 2, WidthSizes((4, 4), (20, 20)), other=5)
        >>> uniform_sizes(model, 24, None, WidthSettings(structures="units"))
        WidthSizes(kv_groups=(4, 4), units=(16, 16))
    """
    return width_step(
        parameters,
        budget,
        structures=settings.structures,
        rule=settings.rule,
        # half a group owed in advance: the nearest number of groups instead of the next lower one
        carry=Fraction(1, 2),
        min_groups=settings.min_groups,
        multiple_of=settings.multiple_of,
    ).sizes


def importance_sizes(
    parameters: ModelParameters, budget: int, scores: WidthScores, settings: WidthSettings
) -> WidthSizes:
    """Choose widths by layer: a layer loses less, the more important it is.

    Layer l loses the share ``base * (1 - strength * z_l)`` of its groups and units, where z is the importance,
    centred and scaled to at most 1 in size, and ``base`` is solved for the exact budget.

    Args:
        parameters: of the model.
        budget: parameters to remove.
        scores: not needed for this budget.
        settings: with ``layer_importance``.

    Raises:
        ValueError: without an importance per layer, or for a budget that is out of reach.

    Source: Adapt-Pruner (arXiv 2502.03460) and CFSP (arXiv 2409.13199) set sparsity by layer importance; solving for
    the budget is ours.

    Example:
        >>> from hf_cka.pruning.width_parameters import LayerParameters
        >>> model = ModelParameters((LayerParameters(10, 3, 2),) * 2, WidthSizes((4, 4), (20, 20)), other=5)
        >>> settings = WidthSettings(structures="units", layer_importance=(1.0, 0.0))
        >>> importance_sizes(model, 24, None, settings)
        WidthSizes(kv_groups=(4, 4), units=(18, 14))
    """
    leaning = _leaning(settings.layer_importance, len(parameters.layers))
    take_groups, _ = STRUCTURES[settings.structures]
    smallest = _smallest(parameters, settings)
    _check_reachable(parameters, budget, smallest, settings)

    def removed(base: float, layer: int) -> float:
        """Parameters that layer `layer` loses, as a real number."""
        part, share = parameters.layers[layer], base * (1 - settings.strength * leaning[layer])
        groups, units = parameters.sizes.kv_groups[layer], parameters.sizes.units[layer]
        of_groups = min(share * groups, groups - smallest.kv_groups[layer])
        of_units = min(share * units, units - smallest.units[layer])
        return of_groups * part.group + of_units * part.unit

    layers = range(len(parameters.layers))
    low, high = 0.0, 1.0
    while sum(removed(high, i) for i in layers) < budget and high < 1e9:  # strength 1 may need base far above 1
        high *= 2
    for _ in range(100):  # bisection to the last bit of a float
        base = (low + high) / 2
        low, high = (base, high) if sum(removed(base, i) for i in layers) < budget else (low, base)
    groups = list(parameters.sizes.kv_groups)
    if take_groups:
        for i in layers:
            share = high * (1 - settings.strength * leaning[i])
            groups[i] = max(smallest.kv_groups[i], groups[i] - _nearest(Fraction(share) * groups[i]))
    wanted = [removed(high, i) for i in layers]
    return _fill_units(parameters, budget, groups, wanted, smallest, settings)


def global_sizes(parameters: ModelParameters, budget: int, scores: WidthScores, settings: WidthSettings) -> WidthSizes:
    """Choose widths by one threshold over all layers: what scores lowest goes first, wherever it is.

    Scores are compared as they are, so they must be comparable between layers, and between heads and units if both
    may go: ``flap`` is standardised for this, ``taylor`` and ``kl`` are changes of one loss.

    Args:
        parameters: of the model.
        budget: parameters to remove.
        scores: of every group and unit.
        settings: with the ``floor`` that every layer keeps.

    Raises:
        ValueError: for a budget that is out of reach.

    Source: FLAP (arXiv 2312.11983), adaptive structure search; the floor is ours.

    Example:
        >>> import torch
        >>> from hf_cka.pruning.width_parameters import LayerParameters
        >>> model = ModelParameters((LayerParameters(10, 3, 2),) * 2, WidthSizes((1, 1), (4, 4)), other=5)
        >>> units = (torch.tensor([1.0, 2, 3, 4]).double(), torch.tensor([5.0, 1, 6, 7]).double())
        >>> scores = WidthScores((torch.ones(1).double(),) * 2, units)
        >>> global_sizes(model, 9, scores, WidthSettings(structures="units")).units
        (2, 3)
    """
    smallest = _smallest(parameters, settings)
    _check_reachable(parameters, budget, smallest, settings)
    groups, units = list(parameters.sizes.kv_groups), list(parameters.sizes.units)
    order = sorted(
        (score, layer, cost, kept, least)
        for per_layer, kept, least, costs in (
            (scores.kv_groups, groups, smallest.kv_groups, [part.group for part in parameters.layers]),
            (scores.units, units, smallest.units, [part.unit for part in parameters.layers]),
        )
        for layer, values in enumerate(per_layer)
        for score, cost in ((float(value), costs[layer]) for value in values)
    )
    left = budget
    for _, layer, cost, kept, least in order:
        # the last structure goes only if that comes closer to the budget
        if kept[layer] > least[layer] and 2 * left >= cost:
            kept[layer] -= 1
            left -= cost
    chosen = tuple(
        _rounded(n, full, settings, part.least) if n < full else n
        for n, full, part in zip(units, parameters.sizes.units, parameters.layers, strict=True)
    )
    return WidthSizes(tuple(groups), chosen)


def _fill_units(
    parameters: ModelParameters,
    budget: int,
    groups: Sequence[int],
    wanted: Sequence[float],
    smallest: WidthSizes,
    settings: WidthSettings,
) -> WidthSizes:
    """Let units take what whole groups left of each layer's wanted parameters, and end nearest to the budget."""
    units = list(parameters.sizes.units)
    if STRUCTURES[settings.structures][1]:
        layers = [i for i, n in enumerate(units) if n]
        paid = {i: (parameters.sizes.kv_groups[i] - groups[i]) * parameters.layers[i].group for i in layers}
        exact = {i: units[i] - (wanted[i] - paid[i]) / parameters.layers[i].unit for i in layers}
        for i in layers:
            units[i] = min(units[i], max(smallest.units[i], _nearest(Fraction(exact[i]))))
        # rounding may leave up to half a unit per layer: settle it where it distorts least
        for _ in range(len(layers) * max(parameters.sizes.units)):
            now = parameters.count(WidthSizes(tuple(groups), tuple(units)))
            over = parameters.total - budget - now
            step = 1 if over > 0 else -1
            free = [
                i
                for i in layers
                if 2 * abs(over) > parameters.layers[i].unit
                and smallest.units[i] <= units[i] + step <= parameters.sizes.units[i]
            ]
            if not free:
                break
            units[min(free, key=lambda i: (step * (units[i] - exact[i]), i))] += step
        units = [
            _rounded(n, full, settings, part.least) if n < full else n
            for n, full, part in zip(units, parameters.sizes.units, parameters.layers, strict=True)
        ]
    return WidthSizes(tuple(groups), tuple(units))


def _leaning(importance: Sequence[float] | None, layers: int) -> list[float]:
    """The importance of each layer, centred and scaled so that the largest size is 1."""
    if importance is None or len(importance) != layers or not all(math.isfinite(value) for value in importance):
        raise ValueError(
            f"The budget 'importance' needs one finite layer_importance per layer ({layers}), got {importance}. Take "
            "it from a depth criterion, for example the importance that 'block_influence' gives each layer."
        )
    mean = math.fsum(importance) / layers
    most = max(abs(value - mean) for value in importance)
    return [(value - mean) / most if most else 0.0 for value in importance]


def _smallest(parameters: ModelParameters, settings: WidthSettings) -> WidthSizes:
    """The widths below which no layer goes."""
    take_groups, take_units = STRUCTURES[settings.structures]
    groups = tuple(min(n, settings.min_groups) if take_groups else n for n in parameters.sizes.kv_groups)
    units = tuple(
        min(n, max(part.least, math.ceil(settings.floor * n))) if take_units else n
        for n, part in zip(parameters.sizes.units, parameters.layers, strict=True)
    )
    return WidthSizes(groups, units)


def _check_reachable(parameters: ModelParameters, budget: int, smallest: WidthSizes, settings: WidthSettings) -> None:
    most = parameters.total - parameters.count(smallest)
    if not 0 <= budget <= most:
        raise ValueError(
            f"Cannot remove {budget:,} parameters (structures={settings.structures!r}): between 0 and {most:,} "
            f"({most / parameters.total:.1%} of all) can go, while {settings.floor:.0%} of the {settings.inner} and "
            + ("as many as the router picks" if settings.inner == "experts" else f"{settings.min_groups} KV group(s)")
            + " stay in every layer."
        )


def _rounded(kept: int, full: int, settings: WidthSettings, least: int = 1) -> int:
    """The nearest multiple that is asked for, at least as many as must stay, at most what there is."""
    multiple = settings.multiple_of
    return min(full, max(_nearest(Fraction(kept, multiple)), -(-least // multiple)) * multiple)


def _fewest_in_words(settings: WidthSettings, fewest: int) -> str:
    if settings.inner == "experts":
        return f"{fewest} experts (as many as the router picks)"
    return f"{settings.min_groups} KV group(s) and {fewest} unit"


def _nearest(value: Fraction) -> int:
    """The nearest integer; halves go up (Python's `round` takes them to even numbers)."""
    return math.floor(value + Fraction(1, 2))


Budget = Callable[[ModelParameters, int, WidthScores, WidthSettings], WidthSizes]

#: name -> how a budget is spread over layers
BUDGETS: Mapping[str, Budget] = MappingProxyType(
    {"uniform": uniform_sizes, "importance": importance_sizes, "global": global_sizes}
)
