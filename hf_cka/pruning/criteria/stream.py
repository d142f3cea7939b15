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
from hf_cka.pruning.criteria.replay import branch_of, call_with, chunks, entering, hidden_of, run_model, silenced
from hf_cka.representations import Pooling, check_runnable, evaluating, pool, rows_of, token_mask

# Bytes for the hidden states of one chunk of rows.
_MEMORY = 2**30

# what a measure gets: the stream before and after, and the mask of tokens; it returns one value per row
Measure = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def score_block_influence(context: ScoringContext, structures: Sequence[Structure]) -> DepthScores:
    """Return 1 - cosine between the stream before and after each structure, averaged over tokens.

    A branch is compared as part of the layer without those that run after it: the attention as input against output
    without the MLP, the MLP as output without it against output. A layer that changes the shape of the stream is
    never removed first.

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
    total, count = [0.0] * len(structures), [0] * len(structures)
    notes: dict[Structure, str] = {}
    with evaluating(anatomy.model), torch.no_grad():
        bar = tqdm(context.batches, desc=name, unit="batch", disable=not context.progress, delay=2)
        for index, batch in enumerate(bar):
            mask = token_mask(batch, index)
            for part, _ in chunks(anatomy, batch, mask, 3 * anatomy.num_layers, _MEMORY):
                stream = _Stream(context, structures)
                stream.read(part)
                for k, structure in enumerate(structures):
                    before, after = stream.around(structure)
                    if before.shape != after.shape:
                        notes[structure] = "it changes the shape of the stream"
                        continue
                    before, kept = rows_of(before, part, anatomy)
                    after, _ = rows_of(after, part, anatomy)
                    values = measure(before, after, kept.to(before.device))
                    total[k] += float(values.sum())
                    count[k] += len(values)
    values_of = tuple(math.inf if s in notes else t / c for s, t, c in zip(structures, total, count, strict=True))
    return DepthScores(tuple(structures), values_of, {name: values_of}, notes=notes)


class _Stream:
    """The residual stream of one chunk: what enters and leaves each layer, and what leaves it without some branches."""

    def __init__(self, context: ScoringContext, structures: Sequence[Structure]) -> None:
        self.anatomy = context.anatomy
        self.states: dict[tuple[int, Any], torch.Tensor] = {}
        # layer -> up to which branches it is run without the later ones
        self.halves: dict[int, set[int]] = {}
        self.ends = {s: self._between(s) for s in structures}
        for structure, places in self.ends.items():
            last = len(self.anatomy.stack.layers[structure.layer].branches)
            self.halves.setdefault(structure.layer, set()).update(p for p in places if 0 < p < last)

    def _between(self, structure: Structure) -> tuple[int, ...]:
        """Of a branch: how many branches of its layer ran before it, and how many with it."""
        if structure.kind == "layer":
            return ()
        names = [b.name for b in self.anatomy.stack.layers[structure.layer].branches]
        place = names.index(branch_of(self.anatomy, structure).name)
        return place, place + 1

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
            # a layer that runs several times: from what first enters it to what leaves it last
            self.states.setdefault((index, 0), entering(args, kwargs))
            self.states[index, "out"] = hidden_of(output)
            busy = True
            try:
                for place in self.halves.get(index, ()):
                    self.states[index, place] = self._without_later(module, index, place, args, kwargs)
            finally:
                busy = False

        return hook

    def _without_later(
        self, module: nn.Module, index: int, place: int, args: Any, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        with ExitStack() as stack:
            for branch in self.anatomy.stack.layers[index].branches[place:]:
                stack.enter_context(silenced(self.anatomy, Structure(branch.name, index)))
            return call_with(module, entering(args, kwargs), args, kwargs)

    def around(self, structure: Structure) -> tuple[torch.Tensor, torch.Tensor]:
        first, last = structure.layer, structure.layers[-1]
        start, end = self.ends[structure] or (0, -1)
        before = self.states[first, start]
        after = self.states.get((last, end), self.states[last, "out"])
        return before.to(after.device), after
