"""Perplexity of a causal language model on a text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from tqdm.auto import tqdm

from hf_cka.evaluation.running import check_causal, context_limit, input_device, measuring

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Perplexity:
    """Perplexity, and what it was measured on.

    Args:
        value: exp of ``nll``; infinite where that overflows.
        nll: mean negative log-likelihood of a scored token, in nats.
        tokens: how many tokens were scored.
        context: window length in tokens.
        stride: tokens from one window's start to the next one's.
    """

    value: float
    nll: float
    tokens: int
    context: int
    stride: int


def perplexity(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    text: str | Sequence[int] | torch.Tensor,
    *,
    context: int = 512,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 1,
    progress: bool = True,
) -> Perplexity:
    """Measure the perplexity of a text with a sliding window.

    Windows of ``context`` tokens start every ``stride`` tokens; each scores the tokens that no earlier window
    scored, given all tokens before them in the window. The first token of the text, and with ``stride=context``
    (the default, no overlap) the first token of every window, has nothing before it and is not scored. A smaller
    stride gives each token more context and costs ``context / stride`` times as much. The text is tokenized once,
    with whatever special tokens the tokenizer adds to a text. The loss is computed in float32, its sum in float64.

    Args:
        model: a causal language model; its training mode is put back afterwards.
        tokenizer: of the model; None if ``text`` is token ids.
        text: one string, or its token ids ``(num_tokens,)``.
        context: window length in tokens.
        stride: tokens between the starts of two windows, at most ``context``; None means ``context``.
        max_tokens: use only the first so many tokens of the text.
        batch_size: windows a forward pass.
        progress: show a bar if it takes longer than two seconds.

    Raises:
        ValueError: if the model is not causal, the text has fewer than 2 tokens, or a number is out of its range.

    Source: the sliding window of the transformers documentation ("Perplexity of fixed-length models").

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8,
        ...     num_hidden_layers=1, num_attention_heads=2))
        >>> result = perplexity(model, None, list(range(32)) * 4, context=16, stride=8)
        >>> result.tokens, 20 < result.value < 50
        (127, True)
    """
    check_causal(model, "Perplexity")
    stride = context if stride is None else stride
    _check_numbers(model, context, stride, max_tokens, batch_size)
    ids = _token_ids(tokenizer, text)[:max_tokens]
    if ids.numel() < 2:
        raise ValueError(f"The text has {ids.numel()} token(s); perplexity needs at least 2. Give a longer text.")

    windows = list(_windows(ids.numel(), context, stride))
    device = input_device(model)
    total, scored = 0.0, 0
    bar = tqdm(total=len(windows), desc="perplexity", unit="window", disable=not progress, delay=2)
    with measuring(model), bar:
        # Only windows of one length share a batch: then nothing is padded, and nothing needs a mask.
        for _, same in groupby(windows, key=lambda window: window[1] - window[0]):
            alike = list(same)
            for at in range(0, len(alike), batch_size):
                batch = alike[at : at + batch_size]
                inputs = torch.stack([ids[start:end] for start, end, _ in batch]).to(device)
                logits = model(input_ids=inputs, use_cache=False).logits
                for row, (start, end, first) in enumerate(batch):
                    # token t is predicted at position t - 1 of its window
                    predicted = logits[row, first - start - 1 : end - start - 1].float()
                    labels = ids[first:end].to(predicted.device)
                    total += functional.cross_entropy(predicted, labels, reduction="none").double().sum().item()
                    scored += end - first
                bar.update(len(batch))
    nll = total / scored
    return Perplexity(_exp(nll), nll, scored, context, stride)


def _windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, first scored token) of every window that scores something."""
    done = 1  # the first token of the text is never scored
    for start in range(0, length, stride):
        end = min(start + context, length)
        first = max(done, start + 1)
        if first < end:
            yield start, end, first
        done = end
        if end == length:
            return


def _token_ids(tokenizer: Any, text: str | Sequence[int] | torch.Tensor) -> torch.Tensor:
    if isinstance(text, str):
        if tokenizer is None:
            raise ValueError("tokenizer=None needs token ids, but text is a string. Pass the model's tokenizer.")
        text = tokenizer(text, verbose=False)["input_ids"]
    ids = torch.as_tensor(text, dtype=torch.long).cpu()
    if ids.dim() != 1:
        raise ValueError(f"Token ids must be one sequence (num_tokens,), but their shape is {tuple(ids.shape)}.")
    return ids


def _check_numbers(model: Any, context: int, stride: int, max_tokens: int | None, batch_size: int) -> None:
    if context < 2:
        raise ValueError(f"context={context} must be at least 2: a token is scored given the one before it.")
    if not 1 <= stride <= context:
        raise ValueError(f"stride={stride} must be between 1 and context={context}, or tokens would be skipped.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"max_tokens={max_tokens} must be at least 2, or None for the whole text.")
    limit = context_limit(model)
    if limit is not None and context > limit:
        raise ValueError(f"context={context} is longer than the model's {limit} positions; use at most {limit}.")


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
