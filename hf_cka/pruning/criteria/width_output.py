"""Width criteria that look at the model's output: the loss to first order, and the output with a group removed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_cka.anatomy import Anatomy
from hf_cka.data import Batch, batch_rows
from hf_cka.modeling.modeling_hf_cka import main_input
from hf_cka.pruning.criteria.base import ScoringContext, WidthScores
from hf_cka.pruning.criteria.inputs import by_sample, routed_rows, tapped
from hf_cka.pruning.criteria.outputs import own_loss, predictions, probabilities
from hf_cka.pruning.criteria.replay import unreached, with_input
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
    changes = _Changes(anatomy)
    prompts = 0
    with ExitStack() as stack:
        for context_manager in (
            evaluating(anatomy.model),
            _gradients_of_activations(anatomy),
            tapped(anatomy, changes.tap, changes.routed),
        ):
            stack.enter_context(context_manager)
        for index, batch in enumerate(tqdm(context.batches, desc="taylor", disable=not context.progress, delay=2)):
            changes.batch = batch
            losses = prompt_losses(anatomy, batch, token_mask(batch, index), index)
            if not losses.requires_grad:
                raise unreached(anatomy, batch)
            losses.sum().backward()
            changes.finish()
            prompts += batch_rows(batch)
    return width_scores(anatomy, {key: total / prompts for key, total in changes.totals.items()})


class _Changes:
    """Activation times gradient, summed over the tokens of each prompt and the features of each group."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.batch: Batch = {}
        self.totals = {key: torch.zeros(count, dtype=torch.float64) for key, count in group_counts(anatomy).items()}
        self.pending: dict[tuple[int, str], torch.Tensor] = {}

    def tap(self, layer: int, role: str, hidden: torch.Tensor) -> torch.Tensor:
        hidden = _differentiable(hidden)
        values = hidden.detach()

        def add(gradient: torch.Tensor) -> None:
            change, mask = by_sample(values.double() * gradient.double(), self.batch, self.anatomy)
            if mask is None:
                change = change.reshape(-1, change.shape[-1])
                self._add_rows(layer, role, change, *routed_rows(len(change), None, values, self.batch, self.anatomy))
            else:
                self._add(layer, role, change.masked_fill(~mask.to(change.device).unsqueeze(-1), 0).sum(dim=1))

        hidden.register_hook(add)
        return hidden

    def routed(
        self, layer: int, role: str, rows: torch.Tensor, selected: torch.Tensor | None, hidden: torch.Tensor
    ) -> torch.Tensor:
        rows = _differentiable(rows)
        values, where = rows.detach(), routed_rows(len(rows), selected, hidden.detach(), self.batch, self.anatomy)
        rows.register_hook(lambda gradient: self._add_rows(layer, role, values.double() * gradient.double(), *where))
        return rows

    def _add_rows(self, layer: int, role: str, change: torch.Tensor, prompt: torch.Tensor, keep: torch.Tensor) -> None:
        sums = change.new_zeros(batch_rows(self.batch), change.shape[-1])
        sums.index_add_(0, prompt[keep].to(change.device), change[keep.to(change.device)])
        self._add(layer, role, sums)

    def _add(self, layer: int, role: str, per_prompt: torch.Tensor) -> None:
        groups = per_prompt.unflatten(1, (len(self.totals[layer, role]), -1)).sum(dim=2)
        before = self.pending.get((layer, role))
        self.pending[layer, role] = groups if before is None else before + groups

    def finish(self) -> None:
        """End a batch: what several multiplications gave a prompt (one per expert) is one change."""
        for key, groups in self.pending.items():
            self.totals[key] += groups.abs().sum(dim=0).cpu()
        self.pending = {}


def _differentiable(values: torch.Tensor) -> torch.Tensor:
    """What depends on no token (a table of positions) carries no gradient yet."""
    return values if values.requires_grad else values.detach().requires_grad_()


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
    # outputs of which the input lies sample by sample, so that copies of the batch lie one after the other
    in_order: dict[tuple[int, str], bool] = {}
    seen: set[tuple[int, str]] = set()

    def tap(layer: int, role: str, hidden: torch.Tensor) -> torch.Tensor | None:
        seen.add((layer, role))
        if (layer, role) != removed[:2]:
            if removed[0] < 0:
                rows, mask = by_sample(hidden, batch, anatomy)
                same = mask is not None and torch.equal(rows.reshape(hidden.shape), hidden)
                in_order[layer, role] = in_order.get((layer, role), True) and same
            return None
        groups = removed[2]
        width = hidden.shape[-1] // counts[layer, role]
        copies = hidden.reshape(len(groups), -1, hidden.shape[-1]).clone()
        for copy, group in zip(copies, groups, strict=True):
            copy[:, group * width : (group + 1) * width] = 0
        return copies.reshape(hidden.shape)

    def routed(layer: int, role: str, rows: torch.Tensor, _selected: Any, _hidden: Any) -> torch.Tensor | None:
        # in an order of their own, so that one group at a time is tried
        seen.add((layer, role))
        return tap(layer, role, rows) if (layer, role) == removed[:2] else None

    bar = tqdm(total=sum(counts.values()) * len(context.batches), desc="kl", disable=not context.progress, delay=2)
    with bar, evaluating(anatomy.model), tapped(anatomy, tap, routed), torch.no_grad():
        for index, batch in enumerate(context.batches):
            token_mask(batch, index)  # refuses what is no batch
            rows = batch_rows(batch)
            prompts += rows
            intact, mask = probabilities(anatomy, batch)
            if counts and not seen:
                raise unreached(anatomy, batch)
            step = max(1, _KL_ROWS // rows)
            for (layer, role), count in counts.items():
                together = step if in_order.get((layer, role)) else 1
                for start in range(0, count, together):
                    removed = (layer, role, range(start, min(start + together, count)))
                    without, _ = probabilities(anatomy, _copies(batch, len(removed[2]), rows))
                    without = without.reshape(len(removed[2]), *intact.shape)
                    for group, changed in zip(removed[2], without, strict=True):
                        divergence = (changed.exp() * (changed - intact)).sum(dim=-1)
                        totals[layer, role][group] += prompt_mean(divergence, mask).sum().cpu()
                    bar.update(len(removed[2]))
            removed = (-1, "", range(0))
    return width_scores(anatomy, {key: total / prompts for key, total in totals.items()})


def group_counts(anatomy: Anatomy) -> dict[tuple[int, str], int]:
    """(layer, role) -> how many groups or units the output projection takes in."""
    return {
        (layer, role): width.members
        for layer in range(anatomy.num_layers)
        for role, width in anatomy.outputs(layer).items()
    }


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

    def start(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = main_input(args, kwargs)
        # a layer that runs several times is entered once
        return None if hidden.requires_grad else with_input(args, kwargs, hidden.detach().requires_grad_())

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


def _copies(batch: Batch, times: int, rows: int) -> dict[str, Any]:
    """The batch several times, one after the other."""
    return {
        key: torch.cat([value] * times)
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == rows
        else value
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

    It is that of the next token where the model predicts one, and otherwise that of ``labels``; where only the model
    itself knows what its labels mean (connectionist temporal classification, boxes), its own loss of the batch.

    Args:
        anatomy: of the model.
        batch: model-ready.
        mask: ``(batch, tokens)``, true where there is a token.
        index: of the batch, for messages.

    Raises:
        ValueError: for an encoder without ``labels``, or a decoder's prompt with nothing to predict.
    """
    found = predictions(anatomy, batch, mask, with_labels=True)
    labels = batch.get("labels")
    if found is not None:
        logits, targets = found
    elif labels is None:
        raise ValueError(
            f"The criterion needs the loss, and batch {index} has no labels for {type(anatomy.model).__name__}. "
            "Add a 'labels' tensor to every batch, or use a criterion without a loss ('amp', 'wanda')."
        )
    else:
        return own_loss(anatomy, batch, index).expand(batch_rows(batch))
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
