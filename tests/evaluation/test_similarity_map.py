"""Two models side by side on the same samples: by original index, zero against itself, largest where it changed."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from hf_cka import PruningPlan, apply_plan, calibration
from hf_cka.evaluation.disagreement import disagreements
from hf_cka.evaluation.similarity_map import layer_similarity
from hf_cka.representations import collect
from hf_cka.similarity import cka
from tests.tiny import tiny_batch, tiny_model


@pytest.fixture
def batches():
    return [tiny_batch(seed=seed, batch=4) for seed in range(4)]


def test_a_model_equals_itself(batches) -> None:
    model = tiny_model("llama")
    similarity = layer_similarity(model, model, batches)
    assert all(similarity.values[i][i] == pytest.approx(1) for i in range(4))
    assert all(abs(change) < 1e-6 for change, _ in similarity.changes.values())


def test_each_value_is_the_cka_of_the_two_outputs(batches) -> None:
    base, other = tiny_model("llama"), tiny_model("llama")
    apply_plan(other, PruningPlan(num_layers=4, model_type="llama", removed_layers=(1,)))
    similarity = layer_similarity(base, other, batches)
    first, second = collect(base, batches), collect(other, batches)
    assert similarity.other_layers == (0, 2, 3)
    for i in range(4):
        for j in range(3):
            assert similarity.values[i][j] == pytest.approx(cka(first.outputs[i], second.outputs[j]), abs=1e-6)
    # before the removed layer nothing changed; after it, the same original numbers are compared
    assert abs(similarity.changes[0][0]) < 1e-6
    assert similarity.changes[3][0] == pytest.approx(1 - similarity.values[3][2])
    assert similarity.heatmap().column_labels == ("0", "2", "3")
    chart = similarity.change_chart()
    assert (chart.scores[1], chart.status[1]) == (None, "removed")


def test_the_layer_that_was_changed_is_named_first(batches) -> None:
    base = tiny_model("llama")
    other = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in other.model.layers[3].parameters():
            parameter.copy_(torch.randn_like(parameter))
    similarity = layer_similarity(base, other, batches)
    assert similarity.ranked[0] == 3
    assert all(abs(similarity.changes[i][0]) < 1e-6 for i in range(3))


def test_models_that_are_not_related_are_refused(batches) -> None:
    pruned = apply_plan(tiny_model("llama"), PruningPlan(num_layers=4, model_type="llama", removed_layers=(3,)))
    with pytest.raises(ValueError, match="from a model with 3 layers, the other from one with 4"):
        layer_similarity(tiny_model("llama", num_hidden_layers=3), pruned, batches)
    with pytest.raises(ValueError, match="pass a list"):
        layer_similarity(pruned, pruned, iter(batches))
    other = collect(pruned, batches[:2])
    with pytest.raises(ValueError, match="other samples"):
        layer_similarity(pruned, pruned, batches, base_readouts=other)


@pytest.mark.assets
def test_disagreement_is_the_kl_of_the_next_tokens_and_padding_does_not_matter(stories) -> None:
    model, tokenizer = stories
    other = copy.deepcopy(model)
    apply_plan(other, PruningPlan(num_layers=5, model_type="llama", removed_layers=(2,)))
    texts = ["Once upon a time, there was a girl.", "Tom had a red ball and he liked it very much.", "The sun was hot."]
    batches = calibration(texts, tokenizer, batch_size=3)
    found = disagreements(model, other, tokenizer, batches, top=2)
    expected = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            first, second = (m(ids).logits[0, :-1].double().log_softmax(-1) for m in (model, other))
        expected.append(float((first.exp() * (first - second)).sum(-1).mean()))
    assert found.kl == pytest.approx(sum(expected) / 3, rel=1e-4)
    assert [item.kl for item in found.most] == pytest.approx(sorted(expected, reverse=True)[:2], rel=1e-4)
    assert math.isclose(found.standard_error, torch.tensor(expected).std().item() / math.sqrt(3), rel_tol=1e-3)
    same = disagreements(model, model, tokenizer, batches)
    assert (same.kl, same.same_top) == (pytest.approx(0, abs=1e-6), 1.0)
    assert len(found.excerpts().excerpts) == 2


def test_vocabularies_must_agree(batches) -> None:
    with pytest.raises(ValueError, match="vocabularies of 96 and 128"):
        disagreements(tiny_model("llama"), tiny_model("llama", vocab_size=128), None, batches)
