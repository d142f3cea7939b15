"""Perplexity: equal to the plain reference for every window, stride and batch size, and honest about bad input."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_cka.evaluation import perplexity


def reference(model, ids: torch.Tensor, context: int, stride: int) -> tuple[float, int]:
    """The sliding window as the transformers documentation writes it, in float64: (mean nll, scored tokens)."""
    total, count, previous = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        window, labels = ids[None, begin:end], ids[None, begin:end].clone()
        labels[:, : -(end - previous)] = -100
        with torch.no_grad():
            logits = model(window).logits.double()
        kept = labels[0, 1:] != -100
        logprobs = logits[0, :-1].log_softmax(-1)[kept].gather(1, labels[0, 1:][kept][:, None])
        total, count, previous = total - logprobs.sum().item(), count + int(kept.sum()), end
        if end == len(ids):
            break
    return total / count, count


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.assets
@pytest.mark.parametrize(("context", "stride"), [(128, 128), (128, 48), (100, 99), (512, 512)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_equals_the_reference_on_a_real_model(stories, assets, context: int, stride: int, batch_size: int) -> None:
    model, tokenizer = stories
    text = (assets / "lm" / "tinystories_a.jsonl").read_text(encoding="utf-8")[:2500]
    ids = torch.tensor(tokenizer(text).input_ids)
    nll, tokens = reference(model.eval(), ids, context, stride)
    result = perplexity(model, tokenizer, text, context=context, stride=stride, batch_size=batch_size)
    assert result.tokens == tokens
    assert math.isclose(result.nll, nll, abs_tol=1e-6)
    assert math.isclose(result.value, math.exp(nll), rel_tol=1e-6)
    assert (result.context, result.stride) == (context, stride)


@pytest.mark.parametrize("length", [2, 15, 16, 17, 32, 33, 63])
@pytest.mark.parametrize("stride", [1, 5, 15, 16])
def test_every_token_is_scored_once(tiny, length: int, stride: int) -> None:
    """At window ends too: with overlap all tokens but the first; without, all but each window's first."""
    ids = torch.arange(length) % 64
    nll, tokens = reference(tiny, ids, 16, stride)
    result = perplexity(tiny, None, ids, context=16, stride=stride, batch_size=4)
    assert result.tokens == tokens == (length - math.ceil(length / 16) if stride == 16 else length - 1)
    assert math.isclose(result.nll, nll, abs_tol=1e-6)


def test_max_tokens_takes_the_beginning(tiny) -> None:
    ids = torch.arange(60) * 7 % 64
    assert perplexity(tiny, None, ids, context=16, max_tokens=20) == perplexity(tiny, None, ids[:20], context=16)


def test_bfloat16_loses_no_more_than_its_logits(tiny) -> None:
    """The loss is in float32 and its sum in float64: only the forward pass is in the model's own precision."""
    model = LlamaForCausalLM(tiny.config).bfloat16().eval()
    ids = torch.arange(60) * 7 % 64
    nll, _ = reference(model, ids, 16, 16)  # float64 loss of the same bfloat16 logits
    assert math.isclose(perplexity(model, None, ids, context=16).nll, nll, abs_tol=1e-6)


def test_training_mode_is_put_back_and_dropout_is_off(tiny) -> None:
    config = LlamaConfig(**{**tiny.config.to_dict(), "attention_dropout": 0.5})
    model = LlamaForCausalLM(config).train()
    model.model.layers[0].eval()  # a mixed state comes back as it was
    ids = torch.arange(40)
    assert perplexity(model, None, ids, context=16) == perplexity(model, None, ids, context=16)
    assert model.training
    assert not model.model.layers[0].training


def test_a_hopeless_model_has_infinite_perplexity_not_an_overflow(tiny) -> None:
    model = LlamaForCausalLM(tiny.config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    assert perplexity(model, None, torch.arange(60), context=16).value == math.inf


def _masked_lm() -> BertForMaskedLM:
    return BertForMaskedLM(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=64)
    )


def _encoder_decoder() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=64))


def _without_weights() -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": 1}, "context=1 must be at least 2"),
        ({"context": 65}, "context=65 is longer than the model's 64 positions"),
        ({"stride": 0}, "stride=0 must be between 1 and context=16"),
        ({"stride": 17}, "stride=17"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_tokens": 1}, "max_tokens=1"),
        ({"text": [5]}, r"has 1 token\(s\)"),
        ({"text": []}, r"has 0 token\(s\)"),
        ({"text": "words"}, "Pass the model's tokenizer"),
        ({"text": [[1, 2], [3, 4]]}, r"shape is \(2, 2\)"),
        ({"model": _masked_lm}, "BertForMaskedLM"),
        ({"model": _encoder_decoder}, "T5ForConditionalGeneration"),
        ({"model": _without_weights}, "meta device"),
    ],
)
def test_bad_input_is_named(tiny, change: dict, message: str) -> None:
    arguments = {"context": 16, "text": list(range(40)), **change}
    model = arguments.pop("model", lambda: tiny)()
    text = arguments.pop("text")
    with pytest.raises(ValueError, match=message):
        perplexity(model, None, text, **arguments)
