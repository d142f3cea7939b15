"""Criteria that read weights, gradients, positions, or nothing: the controls every comparison needs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from hf_cka.data import Batch
from hf_cka.pruning.criteria.base import DepthScores, ScoringContext, Structure
from hf_cka.pruning.criteria.outputs import own_loss, predictions
from hf_cka.pruning.criteria.replay import branch_of, unreached
from hf_cka.pruning.criteria.weights import matrices, stored, values_of
from hf_cka.representations import check_runnable, evaluating, token_mask

# (layer, parameter), the parameter's name relative to the layer
_Key = tuple[int, str]


def score_magnitude(context: ScoringContext, structures: Sequence[Structure]) -> DepthScores:
    """Return the mean absolute weight of each structure: of all its parameters but vectors (biases, norms).

    The mean, and not the sum, so that branches of different size can be compared.

    Raises:
        ValueError: for quantized or offloaded weights, whose values are not there to be read.

    Source: the magnitude baseline of Shortened LLaMA, arXiv 2402.02834.
    """
    importance = []
    for structure in structures:
        weights = [values_of(context.anatomy, *key) for key in _weights(context, structure)]
        total = sum(float(w.abs().sum(dtype=torch.float64)) for w in weights)
        importance.append(total / sum(w.numel() for w in weights))
    return DepthScores(tuple(structures), tuple(importance))


def score_taylor(context: ScoringContext, structures: Sequence[Structure]) -> DepthScores:
    """Return the sum of |weight * gradient| over each structure's parameters, vectors (biases, norms) left out.

    The loss is that of the next token for models that predict one, and otherwise the model's own, which needs
    ``labels``. Memory holds one gradient per weight that is scored.

    Raises:
        ValueError: for quantized or offloaded weights, or an encoder's batches without labels.

    Source: Taylor+ of Shortened LLaMA, arXiv 2402.02834; LLM-Pruner, arXiv 2305.11627.
    """
    anatomy = context.anatomy
    per_structure = [_weights(context, s) for s in structures]
    keys = list(dict.fromkeys(key for group in per_structure for key in group))
    # a gradient of the weight is also that of the weight with what an adapter adds to it
    weights = [_readable(context, *key) for key in keys]
    check_runnable(context.model)
    gradients = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]
    bar = tqdm(context.batches, desc="taylor", unit="batch", disable=not context.progress, delay=2)
    with evaluating(anatomy.model), requiring_gradients(weights), torch.enable_grad():
        for index, batch in enumerate(bar):
            found = torch.autograd.grad(_loss(context, batch, index), weights, allow_unused=True)
            if weights and all(gradient is None for gradient in found):
                raise unreached(anatomy, batch)
            for total, gradient in zip(gradients, found, strict=True):
                if gradient is not None:  # an expert that no token reached
                    total += gradient
    salience = {
        key: float((values_of(anatomy, *key) * g).abs().sum(dtype=torch.float64))
        for key, g in zip(keys, gradients, strict=True)
    }
    return DepthScores(tuple(structures), tuple(sum(salience[key] for key in group) for group in per_structure))


def score_last(context: ScoringContext, structures: Sequence[Structure]) -> DepthScores:
    """Score by position: the last layer goes first, and its MLP before its attention."""
    return DepthScores(tuple(structures), tuple(-(2.0 * s.layers[-1] + (s.branch_kind == "mlp")) for s in structures))


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


def _weights(context: ScoringContext, structure: Structure) -> list[_Key]:
    """A structure's parameters of two axes or more, whose values are there to be read."""
    anatomy = context.anatomy
    found: list[_Key] = []
    for index in structure.layers:
        layer = anatomy.layer(index)
        if structure.kind == "layer":
            branches = [name for branch in anatomy.stack.layers[index].branches for name in branch.parameters]
            hidden = [name for name in branches if stored(layer, name) is None]
            names = [*matrices(layer), *hidden]
        else:
            names = list(branch_of(anatomy, structure).parameters)
        found += [(index, name) for name in names if _readable(context, index, name).ndim >= 2]
    return found


def _readable(context: ScoringContext, index: int, name: str) -> torch.Tensor:
    value = stored(context.anatomy.layer(index), name)
    if value is None:
        raise ValueError(
            f"{context.anatomy.layer_name(index)}.{name} is a quantized or offloaded weight, whose values cannot be "
            "read. Load the model without quantization and offloading, or use 'cka'."
        )
    return value


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
    anatomy = context.anatomy
    if not any(stack.causal for stack in anatomy.stacks) or ("input_ids" not in batch and "labels" in batch):
        return own_loss(anatomy, batch, index)
    found = predictions(anatomy, batch, token_mask(batch, index), with_labels=False)
    if found is None and "labels" in batch:
        return own_loss(anatomy, batch, index)
    if found is None:
        raise ValueError(
            f"{type(anatomy.model).__name__} does not predict the next token, so 'taylor' has no loss here. Use 'kl' "
            "or 'cka'."
        )
    logits, targets = found
    return F.cross_entropy(logits.flatten(0, 1), targets.to(logits.device).flatten())
