"""LoRAPrune: what a weight is worth, from the gradients of the LoRA factors on it alone.

No gradient of a base weight is ever computed or held, so a model that only fits with frozen weights can be scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_cka.anatomy import OUTPUTS, Anatomy
from hf_cka.data import batch_rows
from hf_cka.modeling.carried import active_adapters
from hf_cka.pruning.criteria.base import DepthScores, ScoringContext, Structure, WidthScores
from hf_cka.pruning.criteria.controls import requiring_gradients
from hf_cka.pruning.criteria.groups import Values, group_sums, member_slices
from hf_cka.pruning.criteria.replay import branch_of
from hf_cka.pruning.criteria.weights import values_of
from hf_cka.pruning.criteria.width_output import prompt_losses
from hf_cka.representations import check_runnable, evaluating, token_mask

# (layer, parameter relative to it) -> the projection that holds it, where that carries active LoRA adapters
_Adapted = dict[tuple[int, str], Any]
# the kinds of width, as people call the part of a layer that they are in
_PARTS = {"heads": "attention", "units": "MLP"}


def score_width(context: ScoringContext) -> WidthScores:
    """Score a group by the summed importance (gradient * weight)^2 of its weights, the gradient taken from LoRA.

    The weight is W + s B A; its gradient is estimated by s (dB A + B dA - dB dA), dA and dB being the gradients of
    the mean loss over all prompts. The paper averages the importance over training steps instead; taken at once, the
    scores do not depend on the batch size. Of a group, the weights in adapted projections count. Where no layer's
    attention (or no layer's MLP) is adapted, it is not scored.

    Args:
        context: a model with LoRA adapters, and the data.

    Raises:
        ValueError: if only some layers are adapted, or as the criterion ``taylor``.

    Source: LoRAPrune (arXiv 2305.18403), equations 8 to 10.

    Example:
        >>> score_width(context).units[0].shape  # doctest: +SKIP
        torch.Size([1536])
    """
    anatomy = context.anatomy
    adapted = _adapted(anatomy)
    scored = {kind: _whole(anatomy, adapted, kind) for kind in OUTPUTS.values()}
    groups, units = group_sums(anatomy, _importance(context, adapted))
    none = torch.zeros(0, dtype=torch.float64)
    return WidthScores(
        tuple(groups) if scored["heads"] else (none,) * len(groups),
        tuple(units) if scored["units"] else (none,) * len(units),
    )


def score_depth(context: ScoringContext, structures: Sequence[Structure]) -> DepthScores:
    """Score a layer or branch by the summed importance of its adapted weights, as :func:`score_width`.

    Args:
        context: a model with LoRA adapters, and the data.
        structures: what to score.

    Raises:
        ValueError: if a structure carries no adapter, or as the criterion ``taylor``.

    Source: the importance of LoRAPrune (arXiv 2305.18403), summed over whole layers.
    """
    adapted = _adapted(context.anatomy)
    parts = [[key for key in adapted if _within(context.anatomy, key, structure)] for structure in structures]
    without = [str(s) for s, keys in zip(structures, parts, strict=True) if not keys]
    if without:
        raise ValueError(
            f"Criterion 'loraprune' reads LoRA adapters, and {', '.join(without[:8])} carry none. Put adapters into "
            "every layer (target_modules='all-linear'), protect these, or use 'taylor'."
        )
    importance = _importance(context, adapted)
    sums = {key: float(_there(importance(*key)).double().sum()) for keys in parts for key in keys}
    return DepthScores(tuple(structures), tuple(sum(sums[key] for key in keys) for keys in parts))


def _adapted(anatomy: Anatomy) -> _Adapted:
    found: _Adapted = {}
    for layer in range(anatomy.num_layers):
        for path, module in anatomy.layer(layer).named_modules():
            # adapters on bare parameters (experts) lie around the whole module, and say nothing about its other weights
            if active_adapters(module) and not hasattr(module, "parameter_name"):
                found[layer, f"{path}.weight"] = module
    return found


def _whole(anatomy: Anatomy, adapted: _Adapted, kind: str) -> bool:
    """Whether the heads (or units) of every layer that has some are adapted; raises where only some are."""
    names: dict[int, list[str]] = {}
    for layer in range(anatomy.num_layers):
        width = anatomy.width(layer, kind)
        if width is not None:
            names[layer] = [part.parameter for part in member_slices(anatomy, layer, width)]
    without = [i for i, own in names.items() if own and not any((i, name) in adapted for name in own)]
    some = any((i, name) in adapted for i, own in names.items() for name in own)
    if some and without:
        raise ValueError(
            f"Criterion 'loraprune' reads LoRA adapters, and the {_PARTS[kind]} of layers {without[:8]} carries none. "
            "Put adapters into every layer (target_modules='all-linear'), or use 'taylor'."
        )
    return some


def _within(anatomy: Anatomy, key: tuple[int, str], structure: Structure) -> bool:
    layer, name = key
    if layer not in structure.layers:
        return False
    return structure.kind == "layer" or name in branch_of(anatomy, structure).parameters


def _importance(context: ScoringContext, adapted: _Adapted) -> Values:
    """Run the batches, and return what gives the importance of every weight of a parameter."""
    anatomy = context.anatomy
    check_runnable(anatomy.model)
    factors = [
        factors[name].weight
        for module in adapted.values()
        for name in active_adapters(module)
        for factors in (module.lora_A, module.lora_B)
    ]
    sums = [torch.zeros_like(factor, dtype=torch.promote_types(factor.dtype, torch.float32)) for factor in factors]
    prompts = 0
    with ExitStack() as stack:
        for manager in (evaluating(anatomy.model), requiring_gradients(factors), torch.enable_grad()):
            stack.enter_context(manager)
        for index, batch in enumerate(tqdm(context.batches, desc="loraprune", disable=not context.progress, delay=2)):
            mask = token_mask(batch, index)
            loss = prompt_losses(anatomy, batch, mask, index).sum()
            for total, gradient in zip(sums, torch.autograd.grad(loss, factors), strict=True):
                total += gradient
            prompts += batch_rows(batch)
    gradients = {id(factor): total / prompts for factor, total in zip(factors, sums, strict=True)}

    def importance(layer: int, name: str) -> torch.Tensor | None:
        module = adapted.get((layer, name))
        if module is None:
            return None
        weight = values_of(anatomy, layer, name)
        estimate: Any = 0.0
        for adapter in active_adapters(module):
            # kernel positions of a convolution count as further inputs
            a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            da, db = (gradients[id(factor)].flatten(1) for factor in (a, b))
            a, b = a.detach().flatten(1).to(db), b.detach().flatten(1).to(da)
            estimate = estimate + module.scaling[adapter] * (db @ a + b @ da - db @ da)
        if getattr(module, "fan_in_fan_out", False):  # the weight is stored as the transpose
            estimate = estimate.T
        return (estimate.reshape(weight.shape) * weight.to(estimate)).square()

    return importance


def _there(values: torch.Tensor | None) -> torch.Tensor:
    assert values is not None
    return values
