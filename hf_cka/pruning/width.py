"""From width scores and a parameter budget to the KV groups and MLP units that each layer keeps.

Counting is in ``width_parameters.py``, spreading a budget over layers in ``width_budgets.py``; here the scores say
which groups and units stay. Nothing is measured and no model is changed.
"""

from __future__ import annotations

from typing import Any

import torch

from hf_cka.anatomy import Anatomy, find_anatomy
from hf_cka.lookup import lookup
from hf_cka.pruning.criteria.base import WidthScores
from hf_cka.modeling.plan import PruningPlan
from hf_cka.pruning.width_budgets import BUDGETS, WidthSettings, WidthStep, width_step
from hf_cka.pruning.width_parameters import LayerParameters, ModelParameters, WidthSizes, layer_parameters

__all__ = [
    "BUDGETS",
    "LayerParameters",
    "ModelParameters",
    "WidthSettings",
    "WidthSizes",
    "WidthStep",
    "keep_best",
    "layer_parameters",
    "sizes_plan",
    "width_plan",
    "width_step",
]


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


def sizes_plan(anatomy: Anatomy, scores: WidthScores, sizes: WidthSizes) -> PruningPlan:
    """Return the plan that keeps the best groups and units, for given sizes.

    Args:
        anatomy: of the model that was scored.
        scores: of its groups and units.
        sizes: how many stay in each layer.

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
    now = layer_parameters(anatomy).sizes
    kept: dict[str, dict[int, tuple[int, ...]]] = {"kv_groups": {}, "units": {}}
    for name, table in kept.items():
        for layer, (values, full, count) in enumerate(
            zip(getattr(scores, name), getattr(now, name), getattr(sizes, name), strict=True)
        ):
            if count == full:
                continue
            if len(values) != full:
                raise ValueError(
                    f"{len(values)} scores of {name} in layer {layer}, which has {full}: score this very model."
                )
            table[layer] = keep_best(values, count)
    return PruningPlan(
        num_layers=anatomy.num_layers,
        model_type=anatomy.family.name,
        kept_groups=kept["kv_groups"],
        kept_units=kept["units"],
    )


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
        budget: ``"uniform"`` (stock-loadable), ``"importance"`` or ``"global"``.
        settings: what may go and how it is rounded.

    Raises:
        ValueError: for a ratio that is out of reach, with the reachable range; for scores of another model.

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
    parameters = layer_parameters(anatomy)
    sizes = spread(parameters, round(ratio * parameters.total), scores, settings or WidthSettings())
    return sizes_plan(anatomy, scores, sizes)
