"""What a model costs, in one record: parameters, bytes, operations, cache, speed, memory and, on request, energy."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_cka.evaluation.efficiency import DecodeSpeed, ParameterCount, count_parameters, decode_speed
from hf_cka.evaluation.energy import Energy, generation_energy
from hf_cka.evaluation.memory import peak_memory
from hf_cka.evaluation.running import cache_reader, check_causal, context_limit, input_device, measuring


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of matrix products, convolutions and attention; a multiply and add are two.

    Args:
        prefill: of the forward pass over the prompt, one row.
        decode: of decoding one token after it, with the cache.
        prompt_tokens: of the prompt.
    """

    prefill: int
    decode: int
    prompt_tokens: int


@dataclass(frozen=True)
class Efficiency:
    """What one model costs.

    Args:
        parameters: all, non-embedding, trainable.
        weight_bytes: of parameters in memory, shared ones once.
        flops: counted, not timed.
        cache_bytes_per_token: of the key/value cache, one row, mean over the prompt.
        speeds: one for each batch size; the first is the paper's setting of MoP: batch 1.
        added_bytes: highest memory above what was there before, while generating the largest batch: of torch on
            the CUDA device if the model is on one, else resident memory of the process (which an allocator that
            keeps memory from before makes smaller; :func:`model_memory` measures in a fresh process).
        energy: of generation at batch 1; None if it was not asked for.
    """

    parameters: ParameterCount
    weight_bytes: int
    flops: Flops
    cache_bytes_per_token: float
    speeds: tuple[DecodeSpeed, ...]
    added_bytes: int
    energy: Energy | None = None

    def metrics(self) -> dict[str, float]:
        """Return the numbers by name, for tables."""
        found: dict[str, float] = {
            "parameters": self.parameters.total,
            "non_embedding": self.parameters.non_embedding,
            "weight_bytes": self.weight_bytes,
            "prefill_flops": self.flops.prefill,
            "decode_flops": self.flops.decode,
            "cache_bytes_per_token": self.cache_bytes_per_token,
            "added_bytes": self.added_bytes,
        }
        for speed in self.speeds:
            found[f"prefill_seconds (batch {speed.batch_size})"] = speed.prefill_seconds
            found[f"tokens_per_second (batch {speed.batch_size})"] = speed.tokens_per_second
        if self.energy is not None:
            mark = " (partly estimated)" if self.energy.estimated else ""
            found[f"joules_per_token{mark}"] = self.energy.joules_per_token
            if self.energy.co2_grams is not None:
                found[f"co2_grams_per_token{mark}"] = self.energy.co2_grams / self.energy.tokens
        return found


def measure_efficiency(
    models: Mapping[str, Any],
    *,
    prompt_tokens: int = 12,
    new_tokens: int = 128,
    batch_sizes: Sequence[int] = (1, 8),
    repeats: int = 3,
    energy: bool = False,
    country: str | None = None,
    progress: bool = True,
) -> dict[str, Efficiency]:
    """Measure what models cost, their speeds in turn, so that the drift of a shared machine hits all alike.

    Args:
        models: causal language models by name.
        prompt_tokens: of a prompt; MoP's is 12.
        new_tokens: generated after it; MoP's are 128.
        batch_sizes: rows, each measured.
        repeats: of each speed; medians and extremes are over these, after one run that does not count.
        energy: measure energy too, for at least 5 seconds a model; needs codecarbon.
        country: three-letter ISO code of the electricity, for CO2.
        progress: show a bar if it takes longer than two seconds.

    Raises:
        ValueError: if there is no model, a number is out of its range, a model is not causal, or the tokens exceed its
            context.
        ImportError: for energy without codecarbon.

    Source: latency at batch 1, 12-token prompt, 128 new tokens: MoP, arXiv 2602.06127.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=4,
        ...     num_hidden_layers=2, num_attention_heads=2))
        >>> found = measure_efficiency({"tiny": model}, prompt_tokens=4, new_tokens=3, batch_sizes=(1,), repeats=1)
        >>> found["tiny"].cache_bytes_per_token  # 2 layers, key and value, 8 numbers of 4 bytes
        128.0
    """
    if not models or not batch_sizes:
        raise ValueError("Give at least one model and one batch size to measure.")
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1.")
    for model in models.values():
        check_causal(model, "measure_efficiency")
        limit = context_limit(model)
        if limit is not None and prompt_tokens + new_tokens > limit:
            raise ValueError(
                f"prompt_tokens={prompt_tokens} and new_tokens={new_tokens} exceed the model's {limit} positions."
            )
    tokens = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    runs: dict[tuple[str, int], list[DecodeSpeed]] = {(name, size): [] for name in models for size in batch_sizes}
    bar = tqdm(total=repeats * len(runs), desc="efficiency", unit="run", disable=not progress, delay=2)
    with bar:
        for repeat in range(repeats):
            for name, size in runs:
                options = {**tokens, "batch_size": size, "repeats": 1, "warmup": int(repeat == 0)}
                runs[name, size].append(decode_speed(models[name], progress=False, **options))
                bar.update()
    found = {}
    for name, model in models.items():
        found[name] = Efficiency(
            parameters=count_parameters(model),
            weight_bytes=sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
            flops=count_flops(model, prompt_tokens=prompt_tokens),
            cache_bytes_per_token=cache_bytes(model, prompt_tokens) / prompt_tokens,
            speeds=tuple(_together(runs[name, size]) for size in batch_sizes),
            added_bytes=_added_bytes(model, max(batch_sizes), **tokens),
            energy=generation_energy(model, **tokens, country=country) if energy else None,
        )
    return found


def count_flops(model: Any, *, prompt_tokens: int = 12) -> Flops:
    """Count the operations of a prefill and of one decoded token, with torch's operator counter.

    Args:
        model: a causal language model.
        prompt_tokens: of the prompt.

    Source: ``torch.utils.flop_counter``.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=4,
        ...     num_hidden_layers=1, num_attention_heads=2))
        >>> flops = count_flops(model, prompt_tokens=4)
        >>> weights = 4 * 8 * 8 + 3 * 8 * 4 + 8 * 32  # attention, MLP, head
        >>> flops.decode - 2 * weights  # queries with keys, and weights with values: 5 tokens, 8 wide
        160
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.zeros(1, prompt_tokens, dtype=torch.long, device=input_device(model))
    # Fused attention has no formula on every device; as plain products the same is counted everywhere.
    with measuring(model), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as prefill:
            output = model(input_ids=ids, use_cache=True)
        with FlopCounterMode(display=False) as decode:
            model(input_ids=ids[:, :1], use_cache=True, **cache_reader(model)(output))
    return Flops(prefill.get_total_flops(), decode.get_total_flops(), prompt_tokens)


def cache_bytes(model: Any, num_tokens: int) -> int:
    """Return the bytes of the key/value cache that a model fills for one row of tokens.

    Args:
        model: a causal language model.
        num_tokens: in the row. Beyond a sliding window the cache of such a layer stops growing.

    Raises:
        ValueError: if the model returns no cache.

    Example:
        >>> cache_bytes(model, 100)  # doctest: +SKIP
        2304000
    """
    ids = torch.zeros(1, num_tokens, dtype=torch.long, device=input_device(model))
    with measuring(model):
        cache = next(iter(cache_reader(model)(model(input_ids=ids, use_cache=True)).values()), None)
    if cache is None:
        raise ValueError(f"{type(model).__name__} returns no key/value cache.")
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def _together(runs: Sequence[DecodeSpeed]) -> DecodeSpeed:
    """Return single runs as one measurement."""
    rates = [run.tokens_per_second for run in runs]
    return replace(
        runs[0],
        tokens_per_second=statistics.median(rates),
        slowest=min(rates),
        fastest=max(rates),
        prefill_seconds=statistics.median(run.prefill_seconds for run in runs),
        repeats=len(runs),
    )


def _added_bytes(model: Any, batch_size: int, prompt_tokens: int, new_tokens: int) -> int:
    device = input_device(model)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    with peak_memory() as memory:
        decode_speed(
            model,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            batch_size=batch_size,
            repeats=1,
            warmup=0,
            progress=False,
        )
    return (memory.cuda_bytes or 0) - before if device.type == "cuda" else memory.added_bytes
