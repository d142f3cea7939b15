"""Criteria for whole experts of mixture-of-experts layers: how often the router picks one, and what it then adds.

They return :class:`WidthScores` without KV groups, and with one value per expert where others have one per unit. What
looks into the matrices of experts, for their units, is in ``experts.py``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_cka.anatomy import Anatomy, Width
from hf_cka.anatomy.experts import never_picked
from hf_cka.data import Batch, batch_rows
from hf_cka.pruning.criteria.base import CriterionEntry, ScoringContext, WidthScores
from hf_cka.pruning.criteria.groups import by_member
from hf_cka.pruning.criteria.inputs import by_sample
from hf_cka.pruning.criteria.outputs import probabilities
from hf_cka.pruning.criteria.weights import stored, values_of
from hf_cka.pruning.criteria.width_output import prompt_mean
from hf_cka.representations import check_runnable, evaluating, forward, token_mask


def score_reap(context: ScoringContext) -> WidthScores:
    """Score an expert by the mean norm of what it adds to the tokens that the router sends it.

    The mean over those tokens of ``g * ||f(x)||``, f(x) being what the expert gives and g its weight among the chosen.
    Padding is left out; an expert that was never picked scores nothing. Of a group of experts that go together, their
    tokens count alike.

    Args:
        context: the model and the data.

    Raises:
        ValueError: where the experts are run in a way that does not show what each of them adds.

    Source: router-weighted expert activation pruning, REAP (arXiv 2510.13999).

    Example:
        >>> score_reap(context).units[0].shape  # doctest: +SKIP
        torch.Size([64])
    """
    seen = _uses(context)
    return _scores(context.anatomy, {i: use.weighted / use.count.clamp_min(1) for i, use in seen.items()})


def score_expert_norm(context: ScoringContext) -> WidthScores:
    """Score an expert by how often it is picked times the mean norm of what it then gives.

    That is the sum of ``||f(x)||`` over the tokens that the router sends it, over all tokens.

    Args:
        context: the model and the data.

    Raises:
        ValueError: as :func:`score_reap`.

    Source: expert activation norm (EAN), as compared in arXiv 2510.13999.

    Example:
        >>> score_expert_norm(context).units[0].shape  # doctest: +SKIP
        torch.Size([64])
    """
    return _scores(context.anatomy, {i: use.plain / max(use.tokens, 1) for i, use in _uses(context).items()})


def score_expert_kl(context: ScoringContext) -> WidthScores:
    """Score an expert by the KL divergence of the output without it to the intact output.

    Its router picks others in its place, as after pruning. Every expert costs one forward pass per batch. The mean over
    tokens, then over prompts. What cannot go, because the router needs as many, scores infinity.

    Args:
        context: the model and the data.

    Raises:
        ValueError: for an all-padding row or meta weights.

    Source: leave-one-out, as in arXiv 2506.04513 for heads and units.

    Example:
        >>> score_expert_kl(context).units[0].shape  # doctest: +SKIP
        torch.Size([64])
    """
    anatomy = context.anatomy
    check_runnable(anatomy.model)
    widths = dict(_widths(anatomy))
    totals = {i: torch.zeros(w.members, dtype=torch.float64) for i, w in widths.items()}
    able = {i: w for i, w in widths.items() if w.members > w.least}
    prompts = 0
    count = sum(w.members for w in able.values()) * len(context.batches)
    bar = tqdm(total=count, desc="kl", disable=not context.progress, delay=2)
    with bar, evaluating(anatomy.model), torch.no_grad():
        for index, batch in enumerate(context.batches):
            token_mask(batch, index)  # refuses what is no batch
            prompts += batch_rows(batch)
            intact, mask = probabilities(anatomy, batch)
            for i, width in able.items():
                for member in range(width.members):
                    changed = _without(anatomy, i, width, member, batch)
                    divergence = (changed.exp() * (changed - intact)).sum(dim=-1)
                    totals[i][member] += prompt_mean(divergence, mask).sum().cpu()
                    bar.update()
    values = {i: total / prompts if i in able else torch.full_like(total, math.inf) for i, total in totals.items()}
    return _scores(anatomy, values)


def score_expert_magnitude(context: ScoringContext) -> WidthScores:
    """Score an expert by the L2 norm of all its weights, and of its row of the router.

    Args:
        context: the model; no data is read.

    Source: group magnitude, the usual control (DepGraph, arXiv 2301.12900).

    Example:
        >>> score_expert_magnitude(context).units[0].shape  # doctest: +SKIP
        torch.Size([64])
    """
    found = {}
    for i, width in _widths(context.anatomy):
        total = torch.zeros(width.members, dtype=torch.float64)
        for part in width.slices:
            values = values_of(context.anatomy, i, part.parameter)
            if values.ndim >= 2:
                total += by_member(values.double().square(), part, width.members)
        found[i] = total.sqrt()
    return _scores(context.anatomy, found)


def score_expert_random(context: ScoringContext) -> WidthScores:
    """Score at random, the same for the same seed.

    Args:
        context: the model and the seed; no data is read.

    Example:
        >>> score_expert_random(context).units[0].shape  # doctest: +SKIP
        torch.Size([64])
    """
    draw = torch.Generator().manual_seed(context.seed)
    found = {i: torch.rand(w.members, generator=draw, dtype=torch.float64) for i, w in _widths(context.anatomy)}
    return _scores(context.anatomy, found)


def _widths(anatomy: Anatomy) -> Iterator[tuple[int, Width]]:
    """(layer, its experts) of every layer that has experts which can go."""
    for i in range(anatomy.num_layers):
        width = anatomy.width(i, "experts")
        if width is not None:
            yield i, width


def _scores(anatomy: Anatomy, values: Mapping[int, torch.Tensor]) -> WidthScores:
    none = torch.zeros(0, dtype=torch.float64)
    layers = range(anatomy.num_layers)
    return WidthScores((none,) * anatomy.num_layers, tuple(values.get(i, none) for i in layers))


def _without(anatomy: Anatomy, layer: int, width: Width, member: int, batch: Batch) -> torch.Tensor:
    """The log-probabilities of the model whose router never picks one expert."""
    for beside in (True, False):
        with never_picked(anatomy.layer(layer), width, [member], beside):
            found, _ = probabilities(anatomy, batch)
        if found.isfinite().all():
            break
    return found


# ---- what each expert adds ----


class _Use:
    """Of the experts of one layer: how many tokens each was sent, and the sums of the norms of what it gave them."""

    def __init__(self, anatomy: Anatomy, layer: int, width: Width) -> None:
        self.anatomy, self.width = anatomy, width
        self.size = width.output.block
        self.experts = width.members * self.size
        self.count, self.plain, self.weighted = (torch.zeros(width.members, dtype=torch.float64) for _ in range(3))
        self.tokens = 0
        self.batch: Batch = {}
        held = {s: stored(anatomy.layer(layer), s.parameter) for s in width.slices[1:]}
        paths = {s.module for s, value in held.items() if value is not None and value.ndim == 3}
        self.module: Any = anatomy.layer(layer).get_submodule(next(iter(paths))) if len(paths) == 1 else None
        self.forward: Any = getattr(type(self.module), "forward", None)
        self.arguments = list(inspect.signature(self.forward).parameters)[1:] if self.forward is not None else []
        if len(self.arguments) not in (1, 3):
            raise ValueError(
                f"Layer {layer} of {type(anatomy.model).__name__} runs its experts in a way that does not show what "
                "each of them adds. Use 'kl' (leave-one-out), 'magnitude' or 'random'."
            )

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look at what enters the experts, and at what leaves them where all of them see every token."""
        routed = len(self.arguments) == 3
        handle = (
            self.module.register_forward_pre_hook(self._routed, with_kwargs=True)
            if routed
            else self.module.register_forward_hook(self._spread)
        )
        try:
            yield
        finally:
            handle.remove()

    def _routed(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """(tokens, which experts, with which weights): give each expert its own tokens once more, and nothing else."""
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        hidden, chosen, weights = (given[name] for name in self.arguments)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        chosen, weights = chosen.reshape(len(hidden), -1), weights.reshape(len(hidden), -1)
        keep = self._kept(hidden)
        self.tokens += int(keep.sum())
        for expert in range(self.experts):
            rows, place = ((chosen == expert) & keep.to(chosen.device).unsqueeze(1)).nonzero(as_tuple=True)
            if len(rows):
                gate = weights[rows, place if weights.shape == chosen.shape else torch.full_like(place, expert)]
                only = torch.full((len(rows), 1), expert, dtype=chosen.dtype, device=chosen.device)
                ones = torch.ones_like(only, dtype=weights.dtype)
                out = self.forward(self.module, hidden[rows], only, ones)
                self._add(expert, out, gate)

    def _spread(self, _module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        """Every expert sees every token, times its weight, which is zero where it was not picked (Llama 4)."""
        hidden = args[0].reshape(self.experts, -1, args[0].shape[-1])
        output = output.reshape(self.experts, -1, output.shape[-1])
        keep = self._kept(hidden[0])
        self.tokens += int(keep.sum())
        for expert in range(self.experts):
            rows = (hidden[expert] != 0).any(dim=-1) & keep.to(hidden.device)
            self._add(expert, output[expert][rows], None)

    def _kept(self, hidden: torch.Tensor) -> torch.Tensor:
        _, mask = by_sample(hidden, self.batch, self.anatomy)
        return torch.ones(len(hidden), dtype=torch.bool) if mask is None else mask.flatten().cpu()

    def _add(self, expert: int, out: torch.Tensor, gate: torch.Tensor | None) -> None:
        norms = out.float().norm(dim=-1).double()
        if not norms.isfinite().all():
            raise ValueError(
                "What experts give holds NaN or infinite values. Load the model in bfloat16 or float32 instead of "
                "float16, or leave such samples out."
            )
        member = expert // self.size
        self.count[member] += len(norms)
        self.plain[member] += norms.sum().cpu()
        self.weighted[member] += (norms if gate is None else norms * gate.double()).sum().cpu()


def _uses(context: ScoringContext) -> dict[int, _Use]:
    anatomy = context.anatomy
    check_runnable(anatomy.model)
    uses = {i: _Use(anatomy, i, width) for i, width in _widths(anatomy)}
    prompts = 0
    with ExitStack() as stack:
        stack.enter_context(evaluating(anatomy.model))
        for use in uses.values():
            stack.enter_context(use.watched())
        stack.enter_context(torch.no_grad())
        batches = tqdm(context.batches, desc="experts", unit="batch", disable=not context.progress, delay=2)
        for index, batch in enumerate(batches):
            token_mask(batch, index)  # refuses what is no batch
            for use in uses.values():
                use.batch = batch
            forward(anatomy, batch)
            prompts += batch_rows(batch)
    if not prompts:
        raise ValueError("Calibration is empty: no batch came out of it. An iterator can be read only once.")
    return uses


_ENTRIES = (
    CriterionEntry("reap", score_reap, "mean norm of what an expert adds to the tokens sent to it", "arXiv 2510.13999"),
    CriterionEntry(
        "expert_norm",
        score_expert_norm,
        "how often an expert is picked times the norm of what it gives",
        "arXiv 2510.13999",
    ),
    CriterionEntry(
        "kl",
        score_expert_kl,
        "KL of the output without the expert to the intact one (slow: one forward pass per expert and batch)",
        "arXiv 2506.04513",
        needs_logits=True,
    ),
    CriterionEntry(
        "magnitude",
        score_expert_magnitude,
        "L2 norm of all weights of the expert",
        "arXiv 2301.12900",
        needs_data=False,
    ),
    CriterionEntry("random", score_expert_random, "a seeded draw, the control", "", needs_data=False),
)

#: name -> criterion for whole experts
EXPERTS: Mapping[str, CriterionEntry] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
