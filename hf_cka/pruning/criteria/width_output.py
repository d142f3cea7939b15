"""Width criteria that look at the model's output: the loss to first order, and the output with a group removed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_cka.anatomy import Anatomy
from hf_cka.data import Batch
from hf_cka.pruning.criteria.base import ScoringContext, WidthScores
from hf_cka.pruning.criteria.inputs import output_projections, tapped
from hf_cka.representations import check_runnable, evaluating, token_mask

# Rows in one forward pass of the KL criterion: a batch is copied once per group that is tried.
_KL_ROWS = 32


def score_taylor(context: ScoringContext) -> WidthScores:
    """Score a group by the change of the loss, to first order, when it is removed.

    For each prompt |sum_j sum_i W_ij dL/dW_ij| over the columns j of the output projection that belong to the group,
    L being the mean next-token loss of that prompt (encoders: the loss of ``labels``); averaged over prompts. The sum
    equals that of activation times gradient, so no weight gradient is ever held: memory is that of one batch's
    activations.

    Args:
        context: the model and the data.

    Raises:
        ValueError: for an encoder without ``labels``, a decoder's prompt of one token, or an all-padding row.

    Source: Molchanov et al. 2019 (arXiv 1906.10771), on whole groups as in LLM-Pruner (arXiv 2305.11627).

    Example:
        >>> score_taylor(context).units[0].shape  # doctest: +SKIP
        torch.Size([1536])
    """
    anatomy = context.anatomy
    check_runnable(anatomy.model)
    totals = {key: torch.zeros(count, dtype=torch.float64) for key, count in group_counts(anatomy).items()}
    mask = torch.empty(0)
    prompts = 0

    def tap(layer: int, role: str, hidden: torch.Tensor) -> None:
        values = hidden.detach()

        def add(gradient: torch.Tensor) -> None:
            change = (values.double() * gradient.double()).reshape(*mask.shape, -1)
            change = change.masked_fill(~mask.to(change.device).unsqueeze(-1), 0).sum(dim=1)
            groups = change.unflatten(1, (len(totals[layer, role]), -1)).sum(dim=2)
            totals[layer, role] += groups.abs().sum(dim=0).cpu()

        hidden.register_hook(add)

    with ExitStack() as stack:
        for context_manager in (evaluating(anatomy.model), _gradients_of_activations(anatomy), tapped(anatomy, tap)):
            stack.enter_context(context_manager)
        for index, batch in enumerate(tqdm(context.batches, desc="taylor", disable=not context.progress, delay=2)):
            mask = token_mask(batch, index)
            prompt_losses(anatomy, batch, mask, index).sum().backward()
            prompts += len(mask)
    return width_scores(anatomy, {key: total / prompts for key, total in totals.items()})


def score_kl(context: ScoringContext) -> WidthScores:
    """Score a group by the KL divergence of the output without it to the intact output.

    Every group costs one forward pass per batch (several groups share a pass, as copies of the batch), so this is
    for small models, or for heads: SmolLM2-135M has 46,080 units. The mean over tokens, then over prompts.

    Args:
        context: the model and the data.

    Raises:
        ValueError: for an all-padding row or meta weights.

    Source: Pruning everything, everywhere, all at once (arXiv 2506.04513), criterion of Section 3.

    Example:
        >>> score_kl(context).kv_groups[0].shape  # doctest: +SKIP
        torch.Size([3])
    """
    anatomy = context.anatomy
    check_runnable(anatomy.model)
    counts = group_counts(anatomy)
    totals = {key: torch.zeros(count, dtype=torch.float64) for key, count in counts.items()}
    removed: tuple[int, str, range] = (-1, "", range(0))
    prompts = 0

    def tap(layer: int, role: str, hidden: torch.Tensor) -> torch.Tensor | None:
        if (layer, role) != removed[:2]:
            return None
        groups = removed[2]
        width = hidden.shape[-1] // counts[layer, role]
        copies = hidden.reshape(len(groups), -1, hidden.shape[-1]).clone()
        for copy, group in zip(copies, groups, strict=True):
            copy[:, group * width : (group + 1) * width] = 0
        return copies.reshape(hidden.shape)

    bar = tqdm(total=sum(counts.values()) * len(context.batches), desc="kl", disable=not context.progress, delay=2)
    with bar, evaluating(anatomy.model), tapped(anatomy, tap), torch.no_grad():
        for index, batch in enumerate(context.batches):
            mask = token_mask(batch, index)
            prompts += len(mask)
            intact = logits_of(anatomy, batch).float().log_softmax(dim=-1)
            step = max(1, _KL_ROWS // len(mask))
            for (layer, role), count in counts.items():
                for start in range(0, count, step):
                    removed = (layer, role, range(start, min(start + step, count)))
                    without = logits_of(anatomy, _copies(batch, len(removed[2]), len(mask))).float().log_softmax(dim=-1)
                    without = without.reshape(len(removed[2]), *intact.shape)
                    for group, changed in zip(removed[2], without, strict=True):
                        divergence = (changed.exp() * (changed - intact)).sum(dim=-1)
                        totals[layer, role][group] += prompt_mean(divergence, mask).sum().cpu()
                    bar.update(len(removed[2]))
            removed = (-1, "", range(0))
    return width_scores(anatomy, {key: total / prompts for key, total in totals.items()})


def group_counts(anatomy: Anatomy) -> dict[tuple[int, str], int]:
    """(layer, role) -> how many groups or units the output projection takes in."""
    counts = {}
    for layer, role, _ in output_projections(anatomy):
        sizes = anatomy.sizes(layer)
        counts[layer, role] = sizes.num_kv_heads if role == "o" else sizes.intermediate_size
    return counts


def width_scores(anatomy: Anatomy, values: dict[tuple[int, str], torch.Tensor]) -> WidthScores:
    """Scores from (layer, role) -> one value per group or unit."""
    none = torch.zeros(0, dtype=torch.float64)
    groups, units = (
        tuple(values.get((layer, role), none) for layer in range(anatomy.num_layers)) for role in ("o", "down")
    )
    return WidthScores(groups, units)


@contextmanager
def _gradients_of_activations(anatomy: Anatomy) -> Iterator[None]:
    """Let gradients flow through the layers while no parameter collects one."""

    def start(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (args[0].detach().requires_grad_(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}

    trainable = [parameter for parameter in anatomy.model.parameters() if parameter.requires_grad]
    handle = anatomy.layer(0).register_forward_pre_hook(start, with_kwargs=True)
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)


def logits_of(anatomy: Anatomy, batch: Batch) -> torch.Tensor:
    """The output of the head, without a loss and without a cache."""
    device = next(anatomy.embedding.parameters()).device
    inputs = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
        if key not in ("labels", "label")
    }
    if anatomy.kind == "decoder":
        inputs["use_cache"] = False
    return anatomy.model(**inputs).logits


def _copies(batch: Batch, times: int, rows: int) -> dict[str, Any]:
    """The batch several times, one after the other."""
    return {
        key: torch.cat([value] * times) if isinstance(value, torch.Tensor) and len(value) == rows else value
        for key, value in batch.items()
    }


def prompt_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over each prompt's tokens of (batch, tokens); (batch,) is left as it is. Float64."""
    if values.ndim == 1:
        return values.double()
    keep = mask.to(values.device)
    return values.double().masked_fill(~keep, 0).sum(dim=1) / keep.sum(dim=1)


def prompt_losses(anatomy: Anatomy, batch: Batch, mask: torch.Tensor, index: int) -> torch.Tensor:
    """Return the mean loss of each prompt of a batch, ``(batch,)``.

    Args:
        anatomy: of the model.
        batch: model-ready.
        mask: ``(batch, tokens)``, true where there is a token.
        index: of the batch, for messages.

    Raises:
        ValueError: for an encoder without ``labels``, or a decoder's prompt with nothing to predict.
    """
    logits = logits_of(anatomy, batch).float()
    labels = batch.get("labels")
    if anatomy.kind == "decoder" and logits.ndim == 3:
        ids = batch["input_ids"] if labels is None else labels
        logits, targets = logits[:, :-1], ids[:, 1:].clone()
        targets[~(mask[:, 1:] & mask[:, :-1])] = -100
    elif labels is None:
        raise ValueError(
            f"The criterion needs the loss, and batch {index} has no labels for {type(anatomy.model).__name__}. "
            "Add a 'labels' tensor to every batch, or use a criterion without a loss ('amp', 'wanda')."
        )
    else:
        targets = labels
    targets = targets.to(logits.device)
    losses = nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    if logits.ndim == 2:
        return losses
    counted = (targets != -100).sum(dim=1)
    if not counted.all():
        raise ValueError(
            f"Batch {index} has rows without any token to predict: {(counted == 0).nonzero().flatten().tolist()[:8]}. "
            "Leave texts of one token and rows without labels out."
        )
    return losses.reshape(targets.shape).sum(dim=1) / counted
