"""Leave-one-out: what the model gives without each structure, for all structures in one pass.

Candidates share their prefix. While the model runs once, as it always does, candidate k forks from it at layer k, and
every layer, as soon as it has run, is called again with its own arguments on the state of each candidate that forked
before it. So L candidates cost L + L(L-1)/2 layer calls instead of L(L-1), each layer's weights are visited once per
chunk of calibration rows, and every call is the one the plain loop would make, so the numbers are the same.

Where layers are more than links of a chain (one that runs several times, changes the shape of the stream, or gives
others something beside the stream), every candidate gets a whole forward pass instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from hf_cka.anatomy import Anatomy
from hf_cka.data import Batch
from hf_cka.pruning.criteria.base import ScoringContext, Structure
from hf_cka.pruning.criteria.outputs import given_logits, logit_rows, next_tokens
from hf_cka.pruning.criteria.replay import (
    call_with,
    chunks,
    entering,
    forwards,
    giving,
    hidden_of,
    passing,
    resident,
    rewrap,
    run_model,
    silenced,
    without,
)
from hf_cka.representations import check_runnable, evaluating, pool, rows_of, token_mask

# Rows of logits that are turned into float32 log-probabilities at once.
_LOGIT_ROWS = 128


@dataclass(frozen=True)
class LeftOut:
    """What the model gives without each structure.

    Args:
        structures: what was left out, one at a time.
        reference: readouts of the whole model behind the stack, ``(n_samples, hidden_size)``, on the CPU.
        readouts: per structure, the same without it; empty if they were not asked for.
        kl: per structure, KL(whole || without) of the output distribution, in nats per token (per sample for a
            classification head); empty if logits were not asked for.
        nll: per structure, the negative log-likelihood of the next token without it, in nats; empty likewise, and
            for a model that predicts none.
        reference_nll: that of the whole model.
        layer_calls: how often a layer was called, the measure of what it cost.
        chunks: parts into which the batches were cut.
    """

    structures: tuple[Structure, ...]
    reference: torch.Tensor | None
    readouts: tuple[torch.Tensor, ...]
    kl: tuple[float, ...]
    nll: tuple[float, ...]
    reference_nll: float
    layer_calls: int
    chunks: int


def leave_one_out(
    context: ScoringContext,
    structures: Sequence[Structure],
    *,
    readouts: bool = True,
    logits: bool = False,
    memory: int = 2**30,
    shared: bool = True,
) -> LeftOut:
    """Measure the model without each structure, one at a time.

    Beyond the weights and one readout per sample and structure, memory holds one hidden state ``(rows, tokens,
    hidden_size)`` per structure, and with ``logits`` four tensors ``(rows, tokens, vocabulary)``: batches are cut
    into as many rows at a time as fit in ``memory``, one at least.

    Args:
        context: the model, the data and the pooling.
        structures: layers, runs of layers and branches, in any mixture.
        readouts: collect the readouts after the final norm of the stack (of an encoder-decoder's encoder: what the
            decoder reads).
        logits: compare the outputs of the head.
        memory: bytes for hidden states and logits.
        shared: share the prefix between candidates; False runs the plain loop, one whole forward pass each.

    Raises:
        ValueError: for token pooling, an index out of range, no data, or NaN or infinite readouts.
        RuntimeError: under DeepSpeed ZeRO-3.

    Source: the criterion of arXiv 2405.17081 (section 3) needs these readouts; the sharing is this project's.

    Example:
        >>> left = leave_one_out(context, [Structure("layer", i) for i in range(30)])  # doctest: +SKIP
        >>> left.readouts[4].shape  # doctest: +SKIP
        torch.Size([128, 576])
    """
    anatomy = context.anatomy
    if context.pooling.kind == "tokens":
        raise ValueError("pooling='tokens' has no fixed number of rows per sample; use 'mean' or 'last'.")
    beyond = [str(s) for s in structures if s.layers.stop > anatomy.num_layers]
    if beyond:
        raise ValueError(f"{', '.join(beyond)}: the model has layers 0 to {anatomy.num_layers - 1}.")
    check_runnable(anatomy.model)
    shared = shared and is_chain(anatomy)
    collected = _Collected(context, len(structures), readouts, logits)
    calls = count = 0
    with evaluating(anatomy.model), torch.no_grad():
        bar = tqdm(context.batches, desc="leave one out", unit="batch", disable=not context.progress, delay=2)
        for index, batch in enumerate(bar):
            mask = token_mask(batch, index)
            for part, rows in chunks(anatomy, batch, mask, len(structures), memory, logits=logits):
                calls += _Chunk(anatomy, structures, part, rows, logits, shared).run(collected)
                count += 1
    return collected.result(tuple(structures), calls, count)


def is_chain(anatomy: Anatomy) -> bool:
    """Return whether layers do nothing but hand a stream on, so that candidates can share their prefix.

    Args:
        anatomy: of the stack. What the experiments on its twin found no way to remove may do more than that.
    """
    return all(layer.visits == 1 and not layer.reason for layer in anatomy.stack.layers)


def calls_of(num_layers: int, structures: Sequence[Structure], shared: bool = True) -> int:
    """Return how many layer calls one chunk takes: the model's own pass, and each candidate from its fork on.

    Args:
        num_layers: of the model.
        structures: what is left out.
        shared: candidates share their prefix; otherwise each takes a whole pass of its own.

    Example:
        >>> layers = [Structure("layer", i) for i in range(30)]
        >>> calls_of(30, layers), calls_of(30, layers, shared=False)
        (465, 900)
    """
    if not shared:
        return num_layers + sum(num_layers - (s.length if s.kind == "layer" else 0) for s in structures)
    return num_layers + sum(num_layers - s.layers.stop + (s.kind != "layer") for s in structures)


class _Chunk:
    """One chunk of rows: the model's own pass, with the candidates following it layer by layer."""

    def __init__(
        self,
        anatomy: Anatomy,
        structures: Sequence[Structure],
        batch: Batch,
        mask: torch.Tensor,
        logits: bool,
        shared: bool,
    ) -> None:
        self.anatomy, self.structures, self.batch, self.mask = anatomy, structures, batch, mask
        self.logits = logits
        self.states: dict[int, torch.Tensor] = {}
        # candidates that follow the pass; the others get a whole pass of their own
        self.following = set(range(len(structures))) if shared else set()
        self.templates: dict[int, Any] = {}
        self.last: torch.Tensor | None = None
        self.stepping = False
        self.calls = 0

    def run(self, collected: _Collected) -> int:
        """Hand the outputs of the whole model and of every candidate to ``collected``; return the layer calls."""
        inside = {id(module) for layer in self.anatomy.layers for module in layer.modules()}
        outside = [module for module in self.anatomy.model.modules() if id(module) not in inside]
        with resident(outside):
            with self._attached():
                hidden, logits = run_model(self.anatomy, self.batch, self.logits)
            self.calls += self.anatomy.num_layers
            collected.add_reference(hidden, logits, self.batch, self.mask)
            templates = [self.templates[i] for i in range(self.anatomy.num_layers)]
            for k, structure in enumerate(self.structures):
                if k in self.following:
                    hidden, logits = self._finish(self.states.pop(k), templates)
                else:
                    with without(self.anatomy, structure, templates):
                        hidden, logits = run_model(self.anatomy, self.batch, self.logits)
                    self.calls += self.anatomy.num_layers - (structure.length if structure.kind == "layer" else 0)
                collected.add(k, hidden, logits, self.batch)
        return self.calls

    @contextmanager
    def _attached(self) -> Iterator[None]:
        held = ExitStack()

        def before(module: nn.Module, _args: Any) -> None:
            if not self.stepping:
                held.enter_context(resident(module.modules()))

        def after(index: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if not self.stepping:
                self.stepping = True
                try:
                    self._step(index, module, args, kwargs, output)
                finally:
                    self.stepping = False
                    held.close()

        with held, ExitStack() as handles:
            for index, layer in enumerate(self.anatomy.layers):
                handles.callback(layer.register_forward_pre_hook(before).remove)
                handles.callback(layer.register_forward_hook(partial(after, index), with_kwargs=True).remove)
            yield
        if len(self.templates) != self.anatomy.num_layers:
            raise RuntimeError(
                f"{len(self.templates)} of {self.anatomy.num_layers} layers ran in the forward pass; layers that are "
                "skipped at random (layerdrop) or compiled away cannot be left out."
            )

    def _step(self, index: int, layer: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> None:
        """Move every candidate through the layer that has just run."""
        entered, left = entering(args, kwargs), hidden_of(output)
        if self.last is not None and entered is not self.last:
            # The model does something between layers (DeBERTa's convolution), which the states have not seen.
            for k in [k for k in self.following if self.structures[k].layer < index]:
                self.following.discard(k)
                self.states.pop(k, None)
        self.last = left
        self.templates.setdefault(index, rewrap(output, left.new_empty(0)))
        for k in sorted(self.following):
            structure = self.structures[k]
            if index < structure.layer:
                continue
            if index == structure.layer:
                self.states[k] = entered
                if structure.kind != "layer":
                    with silenced(self.anatomy, structure):
                        self.states[k] = call_with(layer, entered, args, kwargs)
                    self.calls += 1
            elif index >= structure.layers.stop:
                self.states[k] = call_with(layer, self.states[k], args, kwargs)
                self.calls += 1

    def _finish(self, state: torch.Tensor, templates: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run what comes after the last layer (norm, pooler, head) on another state."""
        replacements = [passing(template) for template in templates[:-1]] + [giving(templates[-1], state)]
        with forwards(self.anatomy.layers, replacements):
            return run_model(self.anatomy, self.batch, self.logits)


class _Collected:
    """Readouts, and sums of what is compared on logits."""

    def __init__(self, context: ScoringContext, count: int, readouts: bool, logits: bool) -> None:
        self.context, self.with_readouts, self.with_logits = context, readouts, logits
        self.reference: list[torch.Tensor] = []
        self.readouts: list[list[torch.Tensor]] = [[] for _ in range(count)]
        self.kl = [0.0] * count
        self.nll = [0.0] * (count + 1)  # the last is the whole model's
        self.rows = self.predicted = 0
        self.distribution = torch.empty(0)
        self.targets: torch.Tensor | None = None

    def add_reference(
        self, hidden: torch.Tensor, logits: torch.Tensor | None, batch: Batch, mask: torch.Tensor
    ) -> None:
        if self.with_readouts:
            self.reference.append(self._pool(hidden, batch))
        if not self.with_logits:
            return
        anatomy = self.context.anatomy
        logits = given_logits(anatomy, logits)
        targets = next_tokens(anatomy, batch, logits, mask)
        logits, kept = logit_rows(logits, batch, anatomy)
        self.targets = None if targets is None else targets[kept]
        if self.targets is not None:
            self.predicted += int((self.targets != -100).sum())
        self.distribution = F.log_softmax(logits[kept.to(logits.device)].float(), dim=-1)
        self.rows += len(self.distribution)
        self.nll[-1] += self._negative_log_likelihood(self.distribution)

    def add(self, k: int, hidden: torch.Tensor, logits: torch.Tensor | None, batch: Batch) -> None:
        if self.with_readouts:
            self.readouts[k].append(self._pool(hidden, batch))
        if not self.with_logits:
            return
        anatomy = self.context.anatomy
        logits, kept = logit_rows(given_logits(anatomy, logits), batch, anatomy)
        logits = logits[kept.to(logits.device)]
        targets = self.targets.to(logits.device) if self.targets is not None else None
        for start in range(0, len(logits), _LOGIT_ROWS):
            part = slice(start, start + _LOGIT_ROWS)
            without_it = F.log_softmax(logits[part].float(), dim=-1)
            divergence = F.kl_div(without_it, self.distribution[part], log_target=True, reduction="none")
            self.kl[k] += float(divergence.sum(dim=-1).double().sum())
            if targets is not None:
                self.nll[k] += float(
                    F.nll_loss(without_it, targets[part], ignore_index=-100, reduction="none").double().sum()
                )

    def _negative_log_likelihood(self, distribution: torch.Tensor) -> float:
        if self.targets is None:
            return 0.0
        targets = self.targets.to(distribution.device)
        return float(F.nll_loss(distribution, targets, ignore_index=-100, reduction="none").double().sum())

    def _pool(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        rows, mask = rows_of(hidden, batch, self.context.anatomy)
        return pool(rows, mask.to(rows.device), self.context.pooling).cpu()

    def result(self, structures: tuple[Structure, ...], calls: int, chunks: int) -> LeftOut:
        if not chunks:
            raise ValueError("Calibration is empty: no batch came out of it. An iterator can be read only once.")
        reference = torch.cat(self.reference) if self.with_readouts else None
        readouts = tuple(torch.cat(parts) for parts in self.readouts) if self.with_readouts else ()
        if reference is not None:
            _check_finite("the whole model", reference)
        for structure, matrix in zip(structures, readouts, strict=False):
            _check_finite(f"the model without {structure}", matrix)
        with_nll = self.with_logits and self.predicted > 0
        return LeftOut(
            structures,
            reference,
            readouts,
            tuple(value / self.rows for value in self.kl) if self.with_logits else (),
            tuple(value / self.predicted for value in self.nll[:-1]) if with_nll else (),
            self.nll[-1] / self.predicted if with_nll else float("nan"),
            calls,
            chunks,
        )


def _check_finite(name: str, readouts: torch.Tensor) -> None:
    if not bool(readouts.isfinite().all()):
        raise ValueError(
            f"The readouts of {name} hold NaN or infinite values. Load the model in bfloat16 or float32 instead of "
            "float16, or leave such samples out."
        )
