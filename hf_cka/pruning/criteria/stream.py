"""Criteria that look at the residual stream before and after a structure, in one pass of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_cka.pruning.criteria.base import DepthScores, ScoringContext, Structure
from hf_cka.pruning.criteria.replay import call_with, chunks, entering, hidden_of, run_model, silenced
from hf_cka.representations import Pooling, check_runnable, evaluating, pool, token_mask

# Bytes for the hidden states of one chunk of rows.
_MEMORY = 2**30

# what a measure gets: the stream before and after, and the mask of tokens; it returns one value per row
Measure = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def score_block_influence(context: ScoringContext, structures: Sequence[Structure]) -> DepthScores:
    """Return 1 - cosine between the stream before and after each structure, averaged over tokens.

    A sub-layer is compared as part of the layer without the other: the attention as input against output without the
    MLP, the MLP as output without it against output.

    Source: ShortGPT, arXiv 2403.03853; for sub-layers He et al. 2024, arXiv 2406.15786.
    """

    def per_token(before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return _one_minus_cosine(before[mask], after[mask])

    return _compare(context, structures, per_token, "block influence")


def score_angular(context: ScoringContext, structures: Sequence[Structure]) -> DepthScores:
    """Return the angle between the stream before and after each structure at the last token, over pi.

    Made for runs of layers: the run that turns the stream least goes. Encoders are read at the pooling of the run.

    Source: Gromov et al. 2024, "The Unreasonable Ineffectiveness of the Deeper Layers", arXiv 2403.17887.
    """
    rule = Pooling("last") if context.anatomy.kind == "decoder" else context.pooling

    def per_sample(before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        chord = (2 * _one_minus_cosine(pool(before, mask, rule), pool(after, mask, rule))).sqrt()
        return 2 * torch.asin(chord / 2) / math.pi

    return _compare(context, structures, per_sample, "angular distance")


def _one_minus_cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Row by row, from the difference of the directions, which stays exact where they are nearly equal."""
    a, b = (x.double() / x.double().norm(dim=-1, keepdim=True) for x in (a, b))
    return (a - b).square().sum(dim=-1) / 2


def _compare(context: ScoringContext, structures: Sequence[Structure], measure: Measure, name: str) -> DepthScores:
    anatomy = context.anatomy
    check_runnable(anatomy.model)
    total, count = [0.0] * len(structures), 0
    with evaluating(anatomy.model), torch.no_grad():
        bar = tqdm(context.batches, desc=name, unit="batch", disable=not context.progress, delay=2)
        for index, batch in enumerate(bar):
            mask = token_mask(batch, index)
            for part, rows in chunks(anatomy, batch, mask, 3 * anatomy.num_layers, _MEMORY):
                stream = _Stream(context, structures)
                stream.read(part)
                kept = rows.to(stream.states[0, "in"].device)
                for k, structure in enumerate(structures):
                    before, after = stream.around(structure)
                    values = measure(before, after, kept.to(before.device))
                    total[k] += float(values.sum())
                count += len(values) if structures else 0
    values_of = tuple(t / count for t in total)
    return DepthScores(tuple(structures), values_of, {name: values_of})


class _Stream:
    """The residual stream of one chunk: what enters and leaves each layer, and what leaves it without its MLP."""

    def __init__(self, context: ScoringContext, structures: Sequence[Structure]) -> None:
        self.anatomy = context.anatomy
        self.halves = {s.layer for s in structures if s.kind != "layer"}
        self.states: dict[tuple[int, str], torch.Tensor] = {}

    def read(self, batch: Any) -> None:
        with ExitStack() as handles:
            for index, layer in enumerate(self.anatomy.layers):
                handles.callback(layer.register_forward_hook(self._hook(index), with_kwargs=True).remove)
            run_model(self.anatomy, batch, head=False)

    def _hook(self, index: int) -> Callable[..., None]:
        busy = False

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            nonlocal busy
            if busy:
                return
            self.states[index, "in"] = entering(args, kwargs)
            self.states[index, "out"] = hidden_of(output)
            if index in self.halves:
                busy = True
                try:
                    self.states[index, "half"] = self._without_mlp(module, index, args, kwargs)
                finally:
                    busy = False

        return hook

    def _without_mlp(self, module: nn.Module, index: int, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        if "mlp" in self.anatomy.skipped(index):
            return self.states[index, "out"]
        with silenced(self.anatomy, Structure("mlp", index)):
            return call_with(module, self.states[index, "in"], args, kwargs)

    def around(self, structure: Structure) -> tuple[torch.Tensor, torch.Tensor]:
        first, last = structure.layer, structure.layers[-1]
        start = "half" if structure.kind == "mlp" else "in"
        end = "half" if structure.kind == "attention" else "out"
        before, after = self.states[first, start], self.states[last, end]
        return before.to(after.device), after
