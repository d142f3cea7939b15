"""On real hidden states, and on its own: the room needs no model library."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from hf_cka.similarity import StreamingCKA, pairwise_similarity


@pytest.fixture
def hidden_states(stories, assets) -> tuple[torch.Tensor, ...]:
    """``(texts, tokens, width)`` per layer: 160 stories cut to 40 tokens, every one starting with the same token."""
    model, tokenizer = stories
    with open(assets / "lm" / "tinystories_a.jsonl") as file:
        texts = [json.loads(line)["text"] for _, line in zip(range(160), file, strict=False)]
    tokens = torch.tensor([[tokenizer.bos_token_id, *tokenizer(t)["input_ids"][1:40]] for t in texts])
    with torch.no_grad():
        return model(tokens, output_hidden_states=True).hidden_states


@pytest.mark.assets
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_on_a_real_model_match_the_oracle(hidden_states, dtype, oracle):
    layers = [h[:, -1].to(dtype) for h in hidden_states]
    for precision in ("auto", "fp32"):
        result = pairwise_similarity(layers, precision=precision)
        for estimator in ("biased", "debiased"):
            want = [oracle(layers[i], layers[j], estimator) for i, j in result.pairs]
            np.testing.assert_allclose(getattr(result, estimator), want, atol=1e-5)


@pytest.mark.assets
def test_a_token_that_never_changes_is_constant_at_every_layer(hidden_states):
    """A causal model sees nothing else at its first token; rounding may differ between rows, but is no signal."""
    result = pairwise_similarity([h[:, 0] for h in hidden_states])
    assert set(result.status) <= {"constant", "low_signal"}
    assert np.isnan(result.values).all()


@pytest.mark.assets
def test_streamed_tokens_of_a_real_model_equal_all_at_once(hidden_states, oracle):
    stream = StreamingCKA(len(hidden_states))
    for rows in torch.arange(40).split(7):
        stream.update([h[rows].flatten(0, 1) for h in hidden_states])
    tokens = [h[:40].flatten(0, 1) for h in hidden_states]
    whole = pairwise_similarity(tokens, pairs="consecutive")
    np.testing.assert_allclose(stream.result().values, whole.values, atol=1e-6)
    np.testing.assert_allclose(whole.values[0], oracle(*tokens[:2]), atol=1e-6)


def test_the_room_imports_no_model_library():
    libraries = "{'transformers', 'peft', 'datasets', 'matplotlib', 'scipy'}"
    code = f"import sys, hf_cka.similarity; print({libraries} & {{*sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
