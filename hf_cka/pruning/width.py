"""From width scores and a parameter budget to the KV groups and MLP units that each layer keeps.

Counting is in ``width_parameters.py``, spreading a budget over layers in ``width_budgets.py``; here it is decided which
widths may go at all, and the scores say which groups and units stay. Nothing is measured and no model is changed.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_cka.anatomy import Anatomy, find_anatomy
from hf_cka.lookup import lookup
from hf_cka.modeling.counting import Weights
from hf_cka.modeling.plan import PruningPlan
from hf_cka.pruning.criteria.base import WidthScores
from hf_cka.pruning.removable import plan_for
from hf_cka.pruning.width_budgets import BUDGETS, STRUCTURES, WidthSettings, WidthStep, width_step
from hf_cka.pruning.width_parameters import LayerParameters, ModelParameters, WidthSizes, layer_parameters

__all__ = [
    "BUDGETS",
    "LayerParameters",
    "ModelParameters",
    "WidthChoice",
    "WidthSettings",
    "WidthSizes",
    "WidthStep",
    "keep_best",
    "layer_parameters",
    "sizes_plan",
    "width_choice",
    "width_plan",
    "width_step",
]


@dataclass(frozen=True)
class WidthChoice:
    """Which widths of a stack may go.

    Args:
        parameters: of the model; sizes are 0 where a layer's groups or units stay as they are.
        settings: with the structures that the stack has.
        sizes: the widths of all layers.
        notes: what was asked for and is not done, or done otherwise.
        stay: why groups and units stay that are not in the parameters' sizes.
        inexact: what is not equal to zeroing, in words.
    """

    parameters: ModelParameters
    settings: WidthSettings
    sizes: WidthSizes
    notes: tuple[str, ...] = ()
    stay: tuple[str, ...] = ()
    inexact: tuple[str, ...] = ()

    def warn(self) -> None:
        """Warn of what is not equal to zeroing, though nobody asked for it."""
        for text in self.inexact:
            warnings.warn(text, UserWarning, stacklevel=3)

    def whole(self, chosen: WidthSizes) -> WidthSizes:
        """Return chosen sizes with those of the layers that stay as they are."""
        now = self.parameters.sizes
        groups = zip(chosen.kv_groups, now.kv_groups, self.sizes.kv_groups, strict=True)
        units = zip(chosen.units, now.units, self.sizes.units, strict=True)
        return WidthSizes(
            tuple(n if may_go else full for n, may_go, full in groups),
            tuple(n if may_go else full for n, may_go, full in units),
        )

    def check_any(self) -> None:
        """Refuse a stack of which no width can become smaller.

        Raises:
            ValueError: saying why.
        """
        take_groups, take_units = STRUCTURES[self.settings.structures]
        sizes, least = self.parameters.sizes, self.settings.min_groups
        fewest = [part.least for part in self.parameters.layers]
        if any(n > least for n in sizes.kv_groups if take_groups):
            return
        if take_units and any(n > few for n, few in zip(sizes.units, fewest, strict=True)):
            return
        reasons = list(self.stay)
        experts = self.settings.inner == "experts"
        nothing = "no experts" if experts else "neither heads nor units that can go one by one"
        if take_groups and any(sizes.kv_groups):
            reasons.append(f"no layer has more than {max(sizes.kv_groups)} KV groups or heads, and {least} must stay")
        if take_units and any(sizes.units) and experts:
            reasons.append(f"no layer has more than {max(sizes.units)} experts, and its router needs {max(fewest)}")
        elif take_units and any(sizes.units):
            reasons.append("no layer has more than one unit, which must stay")
        raise ValueError(
            f"No width can become smaller (structures={self.settings.structures!r}): "
            + ("; ".join(dict.fromkeys(reasons)) or f"the layers have {nothing}")
            + ". Remove layers or sub-layers, or choose other structures."
        )


def width_choice(anatomy: Anatomy, settings: WidthSettings, scores: WidthScores | None = None) -> WidthChoice:
    """Return which widths of a stack may go.

    Widths that a norm spans are left out unless asked for, or all there is of a kind; so are those whose parameters
    are used elsewhere as well, and those that a criterion gave no scores. A stack without heads is narrowed in units,
    and the other way round.

    Args:
        anatomy: of the model, on the stack.
        settings: what is asked for.
        scores: of its groups and units, if they are known.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> shape = dict(hidden_size=8, intermediate_size=4, num_attention_heads=2, vocab_size=16)
        >>> anatomy = find_anatomy(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **shape)))
        >>> width_choice(anatomy, WidthSettings()).parameters.sizes
        WidthSizes(kv_groups=(2,), units=(4,))
    """
    inner = settings.inner
    whole = layer_parameters(anatomy, inner)
    asked = dict(zip(("heads", inner), STRUCTURES[settings.structures], strict=True))
    left_out: dict[str, set[int]] = {"heads": set(), inner: set()}
    notes: list[str] = []
    stay: list[str] = []
    inexact: list[str] = []
    for kind, out in left_out.items():
        for i, why in _that_stay(anatomy, kind, scores):
            out.add(i)
            if asked[kind]:
                stay.append(f"the {kind} of layer {i} stay ({why})")
        open_ = [i for i in range(anatomy.num_layers) if i not in out and anatomy.width(i, kind) is not None]
        spanned = {i for i in open_ if not anatomy.width(i, kind).exact}  # type: ignore[union-attr]
        if not spanned or not asked[kind] or settings.inexact:
            continue
        if len(spanned) < len(open_):
            out |= spanned
            notes.append(f"the {kind} of {len(spanned)} layers stay: a norm spans them (inexact=True narrows them)")
        else:
            name = type(anatomy.model).__name__
            inexact.append(f"removing {kind} of {name} is not equal to zeroing them: a norm spans them")
    parameters = whole.fixing(left_out["heads"], left_out[inner])
    there = {"heads": any(parameters.sizes.kv_groups), inner: any(parameters.sizes.units)}
    for kind, other in (("heads", "units"), ("units", "heads")) if inner == "units" else ():
        if asked[kind] and not there[kind] and there[other]:
            if not asked[other]:
                notes.append(f"{anatomy.stack.path} has no {kind} that can go, so {other} go instead")
            settings = replace(settings, structures=other)
    return WidthChoice(parameters, settings, whole.sizes, tuple(notes), tuple(stay), tuple(inexact))


def _that_stay(anatomy: Anatomy, kind: str, scores: WidthScores | None) -> list[tuple[int, str]]:
    """Layers whose members of a kind cannot go, and why."""
    weights, found = Weights(anatomy.model), []
    known = None if scores is None else scores.kv_groups if kind == "heads" else scores.units
    for index, layer in enumerate(anatomy.stack.layers):
        width = layer.width(kind)
        if width is None:
            continue
        names = [f"{layer.path}.{s.parameter}" for s in width.slices]
        if width.reason:
            found.append((index, width.reason))
        elif weights.shared(names):
            found.append((index, "their parameters are used elsewhere as well"))
        elif known is not None and len(known[index]) == 0:
            found.append((index, "the criterion gave them no scores"))
    return found


def keep_best(scores: torch.Tensor, count: int) -> tuple[int, ...]:
    """Return the indices of the highest scores, ascending; of equal scores the lower index stays.

    Args:
        scores: ``(n,)``, higher = keep.
        count: how many stay.

    Raises:
        ValueError: if there are fewer.

    Example:
        >>> keep_best(torch.tensor([0.1, 0.9, 0.9, 0.5]), 2)
        (1, 2)
    """
    if not 0 <= count <= len(scores):
        raise ValueError(f"Cannot keep {count} of {len(scores)} structures.")
    return tuple(sorted(torch.sort(scores, descending=True, stable=True).indices[:count].tolist()))


def sizes_plan(anatomy: Anatomy, scores: WidthScores, sizes: WidthSizes, inner: str = "units") -> PruningPlan:
    """Return the plan that keeps the best groups and units, for given sizes.

    Args:
        anatomy: of the model that was scored.
        scores: of its groups and units.
        sizes: how many stay in each layer.
        inner: what they say of units is of ``"units"``, or of whole ``"experts"``.

    Raises:
        ValueError: if scores and sizes do not fit the model.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> shape = dict(hidden_size=8, intermediate_size=4, num_attention_heads=2, vocab_size=16)
        >>> anatomy = find_anatomy(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **shape)))
        >>> scores = WidthScores((torch.ones(2).double(),), (torch.tensor([1.0, 3, 2, 4]).double(),))
        >>> dict(sizes_plan(anatomy, scores, WidthSizes((2,), (2,))).kept_units)
        {0: (1, 3)}
    """
    now = layer_parameters(anatomy, inner).sizes
    kept: dict[str, dict[int, tuple[int, ...]]] = {"kv_groups": {}, "units": {}}
    for name, table in kept.items():
        for layer, (values, full, count) in enumerate(
            zip(getattr(scores, name), getattr(now, name), getattr(sizes, name), strict=True)
        ):
            if count == full:
                continue
            if not len(values):
                raise ValueError(f"The criterion gave the {name} of layer {layer} no scores, so all {full} must stay.")
            if len(values) != full:
                raise ValueError(
                    f"{len(values)} scores of {name} in layer {layer}, which has {full}: score this very model."
                )
            table[layer] = keep_best(values, count)
    return plan_for(anatomy, kept={"heads": kept["kv_groups"], inner: kept["units"]})


def width_plan(
    model: Any,
    scores: WidthScores,
    ratio: float,
    *,
    budget: str = "uniform",
    settings: WidthSettings | None = None,
) -> PruningPlan:
    """Choose which KV groups and units go, so that a ratio of all parameters is removed.

    Args:
        model: the model that was scored (on the meta device as well), or its `Anatomy`.
        scores: of its groups and units; higher = keep.
        ratio: parameters to remove over all parameters, embeddings included; reached to within half a structure
            (under ``"uniform"``: half a unit in every layer).
        budget: ``"uniform"`` (stock-loadable where all layers have equally many), ``"importance"`` or ``"global"``.
        settings: what may go and how it is rounded.

    Raises:
        ValueError: for a ratio that is out of reach, with the reachable range; for scores of another model; if no width
            can become smaller.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> shape = dict(hidden_size=8, intermediate_size=40, num_attention_heads=2, vocab_size=16)
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **shape))
        >>> scores = WidthScores((torch.ones(2).double(),) * 2, (torch.arange(40).double(),) * 2)
        >>> plan = width_plan(model, scores, 0.2, settings=WidthSettings(structures="units"))
        >>> [len(kept) for kept in plan.kept_units.values()]
        [29, 29]
    """
    anatomy = model if isinstance(model, Anatomy) else find_anatomy(model)
    spread = lookup(BUDGETS, budget, "width budget")
    if not 0 < ratio < 1:
        raise ValueError(f"ratio must be between 0 and 1, got {ratio}.")
    choice = width_choice(anatomy, settings or WidthSettings(), scores)
    choice.check_any()
    choice.warn()
    sizes = spread(choice.parameters, round(ratio * choice.parameters.total), scores, choice.settings)
    return sizes_plan(anatomy, scores, choice.whole(sizes), choice.settings.inner)
