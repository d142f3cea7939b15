"""Criteria that read weights, gradients, positions, or nothing: the controls every comparison needs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from hf_cka.data import Batch
from hf_cka.pruning.adapters import added_weight
from hf_cka.pruning.criteria.base import DepthScores, ScoringContext, Structure
from hf_cka.representations import check_runnable, evaluating, token_mask

_ATTENTION_ROLES = frozenset({"q", "k", "v", "qkv", "o"})


def score_magnitude(context: ScoringContext, structures: Sequence[Structure]) -> DepthScores:
    """Return the mean absolute weight of each structure's projections.

    The mean, and not the sum, so that sub-layers of different size can be compared.

    Raises:
        ValueError: for quantized or offloaded weights, whose values are not there to be read.

    Source: the magnitude baseline of Shortened LLaMA, arXiv 2402.02834.
    """
    importance = []
    for structure in structures:
        weights = [_effective(module) for module in _projections(context, structure)]
        total = sum(float(w.abs().sum(dtype=torch.float64)) for w in weights)
        importance.append(total / sum(w.numel() for w in weights))
    return DepthScores(tuple(structures), tuple(importance))


def score_taylor(context: ScoringContext, structures: Sequence[Structure]) -> DepthScores:
    """Return the sum of |weight * gradient| over each structure's projections.

    The loss is that of the next token for decoders, and the model's own for encoders, which needs ``labels``. Memory
    holds one gradient per weight that is scored.

    Raises:
        ValueError: for quantized or offloaded weights, or an encoder's batches without labels.

    Source: Taylor+ of Shortened LLaMA, arXiv 2402.02834; LLM-Pruner, arXiv 2305.11627.
    """
    per_structure = [_projections(context, s) for s in structures]
    modules = list({id(m): m for group in per_structure for m in group}.values())
    # a gradient of the weight is also that of the weight with what an adapter adds to it
    weights = [m.weight for m in modules]
    check_runnable(context.model)
    gradients = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]
    bar = tqdm(context.batches, desc="taylor", unit="batch", disable=not context.progress, delay=2)
    with evaluating(context.anatomy.model), requiring_gradients(weights), torch.enable_grad():
        for index, batch in enumerate(bar):
            loss = _loss(context, batch, index)
            for total, gradient in zip(gradients, torch.autograd.grad(loss, weights), strict=True):
                total += gradient
    salience = {
        id(m): float((_effective(m) * g).abs().sum(dtype=torch.float64))
        for m, g in zip(modules, gradients, strict=True)
    }
    return DepthScores(tuple(structures), tuple(sum(salience[id(m)] for m in group) for group in per_structure))


def score_last(context: ScoringContext, structures: Sequence[Structure]) -> DepthScores:
    """Score by position: the last layer goes first, and its MLP before its attention."""
    return DepthScores(tuple(structures), tuple(-(2.0 * s.layers[-1] + (s.kind == "mlp")) for s in structures))


def score_third_to_last(context: ScoringContext, structures: Sequence[Structure]) -> DepthScores:
    """Score by position: the third-to-last layer goes first; the last two are never scored.

    Source: the depth branch of MoP, arXiv 2602.06127.
    """
    third = context.anatomy.num_layers - 3
    notes = {s: "the last two layers are protected" for s in structures if s.layers[-1] > third}
    importance = tuple(math.inf if s in notes else float(third - s.layers[-1]) for s in structures)
    return DepthScores(tuple(structures), importance, notes=notes)


def score_random(context: ScoringContext, structures: Sequence[Structure]) -> DepthScores:
    """Score by a draw that the seed determines."""
    draw = torch.rand(len(structures), generator=torch.Generator().manual_seed(context.seed), dtype=torch.float64)
    return DepthScores(tuple(structures), tuple(draw.tolist()))


def _effective(module: Any) -> torch.Tensor:
    """The weight that a projection computes with, what adapters add included."""
    added = added_weight(module)
    return module.weight.detach() if added is None else module.weight.detach() + added


def _projections(context: ScoringContext, structure: Structure) -> list[Any]:
    """A structure's projections, whose weights are there to be read."""
    found = []
    for index in structure.layers:
        for role, path in context.anatomy.projections(index).items():
            in_attention = role in _ATTENTION_ROLES
            if structure.kind == "layer" or (structure.kind == "attention") == in_attention:
                module: Any = context.anatomy.layer(index).get_submodule(path)
                weight = module.weight
                if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.is_meta:
                    raise ValueError(
                        f"{context.anatomy.layer_name(index)}.{path} has a quantized or offloaded weight, whose values "
                        "cannot be read. Load the model without quantization and offloading, or use 'cka'."
                    )
                found.append(module)
    return found


@contextmanager
def requiring_gradients(weights: Sequence[torch.Tensor]) -> Iterator[None]:
    """Let weights require gradients for a while.

    Args:
        weights: parameters; their switches are put back.
    """
    before = [w.requires_grad for w in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, required in zip(weights, before, strict=True):
            weight.requires_grad_(required)


def _loss(context: ScoringContext, batch: Batch, index: int) -> torch.Tensor:
    model: nn.Module = context.anatomy.model
    device = next(model.parameters()).device
    inputs = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    if context.anatomy.kind != "decoder" or "input_ids" not in batch:
        if "labels" not in batch:
            raise ValueError(
                f"Batch {index} has no labels, and the loss of {type(model).__name__} needs them. Add a 'labels' "
                "tensor to every batch, or use 'cka' or 'kl'."
            )
        return model(**inputs).loss
    mask = token_mask(batch, index).to(device)
    inputs.pop("labels", None)
    logits = model(**inputs).logits
    if logits.ndim != 3:
        raise ValueError(
            f"{type(model).__name__} does not predict the next token, so 'taylor' has no loss here. Use 'kl' or 'cka'."
        )
    targets = inputs["input_ids"][:, 1:].where(mask[:, 1:] & mask[:, :-1], -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())
