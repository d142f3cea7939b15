"""What a model costs: parameters, and tokens per second."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_cka.evaluation.running import cache_reader, check_causal, context_limit, input_device, measuring


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters a model has; shared (tied) ones count once.

    Args:
        total: all of them.
        non_embedding: without token and position embeddings and without the output embedding (the LM head).
        trainable: those that require gradients.
    """

    total: int
    non_embedding: int
    trainable: int


@dataclass(frozen=True)
class DecodeSpeed:
    """Measured speed of greedy generation with a cache.

    Args:
        tokens_per_second: median over the repeats, of all rows of the batch together, prefill not counted.
        slowest: of the repeats.
        fastest: of the repeats.
        prefill_seconds: median time of the forward pass over the prompt.
        prompt_tokens: a row.
        new_tokens: a row.
        batch_size: rows.
        repeats: measured; the warm-up comes on top.
    """

    tokens_per_second: float
    slowest: float
    fastest: float
    prefill_seconds: float
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    repeats: int


def count_parameters(model: Any) -> ParameterCount:
    """Count the parameters of a model: all, non-embedding, trainable.

    Args:
        model: any module; ``get_output_embeddings`` is used where there is one.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=4,
        ...     num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True))
        >>> count_parameters(model)
        ParameterCount(total=632, non_embedding=376, trainable=632)
    """
    embedding_modules: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(head, nn.Module):
        embedding_modules.append(head)
    embeddings = {id(parameter) for module in embedding_modules for parameter in module.parameters()}
    parameters = list(model.parameters())
    return ParameterCount(
        total=sum(parameter.numel() for parameter in parameters),
        non_embedding=sum(parameter.numel() for parameter in parameters if id(parameter) not in embeddings),
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
    )


def decode_speed(
    model: Any,
    *,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    batch_size: int = 1,
    repeats: int = 5,
    warmup: int = 1,
    progress: bool = True,
) -> DecodeSpeed:
    """Measure prefill time and greedy decoding speed with a cache, on random token ids.

    Exactly ``new_tokens`` tokens are decoded whatever they are, one forward pass each, without the overhead of
    ``generate``. On a shared machine compare two models by alternating short measurements.

    Args:
        model: a causal language model; its training mode is put back afterwards.
        prompt_tokens: length of the prompt.
        new_tokens: tokens decoded after it, at least 2: the first one comes from the prefill.
        batch_size: rows.
        repeats: measured runs; medians and extremes are over these.
        warmup: runs before them that do not count.
        progress: show a bar if it takes longer than two seconds.

    Raises:
        ValueError: if a number is out of its range, the model is not causal, or the tokens exceed its context.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=4,
        ...     num_hidden_layers=1, num_attention_heads=2))
        >>> speed = decode_speed(model, prompt_tokens=4, new_tokens=4, repeats=2)
        >>> speed.slowest <= speed.tokens_per_second <= speed.fastest
        True
    """
    check_causal(model, "decode_speed")
    smallest = {"prompt_tokens": 1, "new_tokens": 2, "batch_size": 1, "repeats": 1, "warmup": 0}
    given = dict(zip(smallest, (prompt_tokens, new_tokens, batch_size, repeats, warmup), strict=True))
    for name, least in smallest.items():
        if given[name] < least:
            raise ValueError(f"{name}={given[name]} must be at least {least}.")
    limit = context_limit(model)
    if limit is not None and prompt_tokens + new_tokens > limit:
        raise ValueError(
            f"prompt_tokens={prompt_tokens} and new_tokens={new_tokens} exceed the model's {limit} positions."
        )
    device = input_device(model)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (batch_size, prompt_tokens), generator=generator).to(device)
    prefill, decode = [], []
    with measuring(model):
        runs = tqdm(range(warmup + repeats), desc="decode speed", unit="run", disable=not progress, delay=2)
        for run in runs:
            first, rest = _timed_run(model, prompt, new_tokens, device)
            if run >= warmup:
                prefill.append(first)
                decode.append(batch_size * (new_tokens - 1) / rest)
    return DecodeSpeed(
        tokens_per_second=statistics.median(decode),
        slowest=min(decode),
        fastest=max(decode),
        prefill_seconds=statistics.median(prefill),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch_size=batch_size,
        repeats=repeats,
    )


def _timed_run(model: Any, prompt: torch.Tensor, new_tokens: int, device: torch.device) -> tuple[float, float]:
    """Return the seconds of the prefill and of decoding ``new_tokens - 1`` tokens after it."""
    cache_of = cache_reader(model)
    begin = _now(device)
    output = model(input_ids=prompt, use_cache=True)
    token = output.logits[:, -1:].argmax(-1)
    middle = _now(device)
    for _ in range(new_tokens - 1):
        output = model(input_ids=token, use_cache=True, **cache_of(output))
        token = output.logits[:, -1:].argmax(-1)
    return middle - begin, _now(device) - middle


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()  # kernels run behind the program's back
    return time.perf_counter()
