"""Parameters are counted once, memory peaks are seen, speeds decode exactly what was asked."""

from __future__ import annotations

import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_cka.evaluation import count_parameters, decode_speed, peak_memory
from hf_cka.evaluation.running import cache_reader


def _llama(**changes) -> LlamaForCausalLM:
    settings = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_of_a_llama(tied: bool) -> None:
    layer = 4 * 16 * 16 + 3 * 16 * 24 + 2 * 16
    inner, embedding = 2 * layer + 16, 40 * 16
    count = count_parameters(_llama(tie_word_embeddings=tied))
    assert count.total == inner + embedding * (1 if tied else 2)
    assert count.non_embedding == inner
    assert count.trainable == count.total


def test_position_embeddings_are_embeddings() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    count = count_parameters(model)
    assert count.total - count.non_embedding == 40 * 16 + 32 * 16


def test_only_adapters_are_trainable_under_peft() -> None:
    peft = pytest.importorskip("peft")
    model = _llama()
    before = count_parameters(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    count = count_parameters(adapted)
    assert count.trainable == 2 * 2 * (16 + 16)  # layers, rank, in and out
    assert count.total == before.total + count.trainable
    assert count.non_embedding == before.non_embedding + count.trainable


def test_a_peak_that_is_gone_at_the_end_is_seen() -> None:
    """In a process of its own: memory that earlier tests left to the allocator would hide the peak."""
    script = """
import torch

from hf_cka.evaluation import peak_memory

with peak_memory() as memory:
    block = torch.ones(60_000_000)  # 240 MB, touched
    for _ in range(3):  # long enough for a sample to fall into it
        block.add_(1)
    del block
assert memory.added_bytes > 200_000_000, memory
assert memory.peak_bytes == memory.start_bytes + memory.added_bytes
with peak_memory() as after:
    pass
assert after.added_bytes < 100_000_000, after
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_peak_is_measured_when_the_block_fails() -> None:
    with pytest.raises(KeyError), peak_memory() as memory:
        raise KeyError("inside")
    assert memory.peak_bytes >= memory.start_bytes > 0


def test_an_interval_must_be_positive() -> None:
    with pytest.raises(ValueError, match="interval=0"), peak_memory(0):
        pass


def test_decoding_runs_exactly_as_many_tokens_as_asked() -> None:
    """One forward pass over the prompt, then one a token: nothing stops early, nothing is computed twice."""
    model = _llama().train()
    widths: list[int] = []

    def note(module, args, kwargs) -> None:
        widths.append(kwargs["input_ids"].shape[1])

    model.register_forward_pre_hook(note, with_kwargs=True)
    speed = decode_speed(model, prompt_tokens=5, new_tokens=4, batch_size=3, repeats=2, warmup=1)
    assert widths == [5, 1, 1, 1] * 3
    assert (speed.prompt_tokens, speed.new_tokens, speed.batch_size, speed.repeats) == (5, 4, 3, 2)
    assert 0 < speed.slowest <= speed.tokens_per_second <= speed.fastest
    assert speed.prefill_seconds > 0
    assert model.training


def test_decoding_uses_no_deprecated_name(caplog) -> None:
    with warnings.catch_warnings(action="error", category=FutureWarning):
        decode_speed(_llama(), prompt_tokens=4, new_tokens=3, repeats=1)
    assert not [record for record in caplog.records if "past_key_values" in record.getMessage()]


@pytest.mark.parametrize(
    ("forward", "field", "argument"),
    [
        (lambda input_ids, cache=None: None, "cache", "cache"),
        (lambda input_ids, past_key_values=None: None, "past_key_values", "past_key_values"),
        (lambda input_ids, past_key_values=None: None, "cache", "past_key_values"),
        (lambda **wrapped: None, "cache", "cache"),
        (lambda **wrapped: None, "past_key_values", "past_key_values"),
    ],
    ids=["5.24", "5.23", "own code under 5.24", "wrapped under 5.24", "wrapped under 5.23"],
)
def test_the_cache_is_passed_on_by_the_name_that_the_model_knows(forward, field: str, argument: str) -> None:
    cache_of = cache_reader(SimpleNamespace(forward=forward))
    assert cache_of({"logits": 0, field: "kept"}) == {argument: "kept"}
    assert cache_of({"logits": 0}) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens=0 must be at least 1"),
        ({"new_tokens": 1}, "new_tokens=1 must be at least 2"),
        ({"repeats": 0}, "repeats=0"),
        ({"warmup": -1}, "warmup=-1"),
        ({"prompt_tokens": 60, "new_tokens": 5}, "exceed the model's 64 positions"),
    ],
)
def test_bad_numbers_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_speed(_llama(), **change)
