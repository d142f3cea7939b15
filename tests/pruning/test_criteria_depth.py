"""Every depth criterion on a model where the right answer is known by construction."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from hf_cka.anatomy import find_anatomy
from hf_cka.modeling.surgery import apply_plan
from hf_cka.pruning.criteria.base import DepthScores, ScoringContext, Structure, score
from hf_cka.pruning.criteria.depth import DEPTH
from hf_cka.pruning.criteria.shapes import DISSIMILARITIES
from hf_cka.pruning.removable import Removable
from hf_cka.representations import Pooling, resolve_pooling
from hf_cka.similarity import cka
from tests.tiny import tiny_batch, tiny_model

BLIND = ("random", "magnitude", "last", "third_to_last")
SEEING = [name for name in DEPTH if name not in BLIND and not DEPTH[name].needs_adapters]


def batches(labels=False, rows=20):
    made = [tiny_batch(rows, length=8, seed=s, pad="left" if s else "right") for s in range(2)]
    if labels:
        for batch in made:
            batch["labels"] = torch.arange(rows) % 2
    return made


def own_words(model):
    """Text that the model itself finds likely, so that every part of it that matters lowers the perplexity."""
    prompts = tiny_batch(20, length=2, seed=0)["input_ids"].clamp(min=3)
    return [{"input_ids": model.generate(prompts, max_new_tokens=8, min_new_tokens=8, do_sample=False)}]


def context(model, data=None, pooling="mean", seed=0):
    anatomy = find_anatomy(model)
    return ScoringContext(model, anatomy, data or batches(), resolve_pooling(pooling, anatomy.kind), seed)


def layers(count, kind="layer"):
    return [Structure(kind, i) for i in range(count)]


@torch.no_grad()
def silence(model, layer, *kinds):
    """Make a sub-layer add nothing."""
    for kind in kinds:
        block = model.model.layers[layer]
        (block.self_attn.o_proj if kind == "attention" else block.mlp.down_proj).weight.zero_()


@pytest.mark.parametrize("name", SEEING)
def test_an_identity_layer_goes_first(name):
    # a narrow readout, so that 40 samples are enough for CCA as well
    model = tiny_model("llama", num_hidden_layers=5)
    silence(model, 2, "attention", "mlp")
    given = context(model, own_words(model) if name == "perplexity" else batches(labels="class" in name))
    scores = score(DEPTH[name], given, layers(5))
    assert str(scores.weakest()) == "layer 2"
    if name not in ("consensus", "consensus_by_class", "perplexity"):
        assert scores.of(Structure("layer", 2)) == pytest.approx(0, abs=1e-6)
    assert sorted(scores.importance)[1] > min(scores.importance)
    assert str(score(DEPTH[name], given, layers(5), "reversed").weakest()) != "layer 2"


@pytest.mark.parametrize("name", [n for n in SEEING if n not in ("angular", "perplexity")])
def test_a_sublayer_that_adds_nothing_goes_first(name):
    model = tiny_model("llama")
    silence(model, 1, "mlp")
    silence(model, 3, "attention")
    structures = [s for i in range(4) for s in (Structure("attention", i), Structure("mlp", i))]
    scores = score(DEPTH[name], context(model, batches(labels="class" in name)), structures)
    assert {str(s) for s in scores.ranking()[:2]} == {"mlp 1", "attention 3"}


@pytest.mark.parametrize("name", ["angular", "cka", "block_influence"])
def test_a_run_of_identity_layers_goes_first(name):
    model = tiny_model("llama", num_hidden_layers=6)
    for layer in (2, 3):
        silence(model, layer, "attention", "mlp")
    runs = [Structure("layer", i, 2) for i in range(5)]
    assert str(score(DEPTH[name], context(model), runs).weakest()) == "layers 2-3"


def test_magnitude_removes_the_smallest_weights_first():
    model = tiny_model("gpt2")
    with torch.no_grad():
        for parameter in model.transformer.h[1].parameters():
            parameter.mul_(0.1)
        model.transformer.h[3].mlp.c_fc.weight.mul_(0.01)
        model.transformer.h[3].mlp.c_proj.weight.mul_(0.01)
    given = context(model)
    assert str(score(DEPTH["magnitude"], given, layers(4)).weakest()) == "layer 1"
    assert str(score(DEPTH["magnitude"], given, layers(4, "mlp")).weakest()) == "mlp 3"


def test_positions():
    given = context(tiny_model("llama", num_hidden_layers=6))
    order = [str(s) for s in score(DEPTH["last"], given, layers(6)).ranking()]
    assert order == [f"layer {i}" for i in (5, 4, 3, 2, 1, 0)]
    third = score(DEPTH["third_to_last"], given, layers(6))
    assert str(third.weakest()) == "layer 3"
    assert third.importance[4:] == (math.inf, math.inf)
    assert "protected" in third.notes[Structure("layer", 5)]
    halves = [Structure("attention", 5), Structure("mlp", 5), Structure("mlp", 4)]
    assert [str(s) for s in score(DEPTH["last"], given, halves).ranking()] == ["mlp 5", "attention 5", "mlp 4"]


def test_random_follows_the_seed_alone():
    model = tiny_model("llama")
    draws = [score(DEPTH["random"], context(model, seed=seed), layers(4)).importance for seed in (0, 0, 1)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


def test_cka_is_that_of_the_readouts_of_a_model_that_was_cut():
    model = tiny_model("qwen3")
    given = context(model, pooling="last")
    scores = score(DEPTH["cka"], given, layers(4))
    biased = score(DEPTH["cka_biased"], given, layers(4))

    def readout(m):
        rows = []
        for batch in given.batches:
            with torch.no_grad():
                hidden = m.model(**batch).last_hidden_state
            last = (batch["attention_mask"] * torch.arange(8)).argmax(1)
            rows.append(hidden[torch.arange(len(hidden)), last])
        return torch.cat(rows)

    for layer in range(4):
        cut = apply_plan(copy.deepcopy(model), Removable(given.anatomy).plan([Structure("layer", layer)]))
        assert 1 - scores.importance[layer] == pytest.approx(cka(readout(model), readout(cut)), abs=1e-5)
        expected = cka(readout(model), readout(cut), estimator="biased")
        assert 1 - biased.importance[layer] == pytest.approx(expected, abs=1e-5)
    assert all(0 < e < 1 for e in scores.details["standard_error"])


def test_block_influence_is_that_of_the_hidden_states():
    model = tiny_model("phi")
    data = batches()[1:]
    scores = score(DEPTH["block_influence"], context(model, data), layers(3))  # the last one is normed in hidden_states
    with torch.no_grad():
        states = model(**data[0], output_hidden_states=True).hidden_states
    keep = data[0]["attention_mask"].bool()
    for layer in range(3):
        cosine = torch.cosine_similarity(states[layer][keep], states[layer + 1][keep], dim=-1).mean()
        assert scores.importance[layer] == pytest.approx(1 - float(cosine), abs=1e-5)
    run = score(DEPTH["angular"], context(model, data), [Structure("layer", 0, 3)])
    cosine = torch.cosine_similarity(states[0][:, -1], states[3][:, -1], dim=-1)
    assert run.importance[0] == pytest.approx(float(torch.arccos(cosine).mean()) / math.pi, abs=1e-5)


def test_taylor_is_weight_times_gradient_and_leaves_no_gradient():
    model = tiny_model("llama")
    model.requires_grad_(False)
    data = batches()[:1]
    scores = score(DEPTH["taylor"], context(model, data), [Structure("mlp", 1)])
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    twin = copy.deepcopy(model).requires_grad_(True)
    labels = data[0]["input_ids"].where(data[0]["attention_mask"].bool(), -100)
    twin(**data[0], labels=labels).loss.backward()
    mlp = twin.model.layers[1].mlp
    expected = sum(float((p.detach() * p.grad).abs().sum()) for p in mlp.parameters())
    assert scores.importance[0] == pytest.approx(expected, rel=1e-4)


def test_consensus_sums_the_ranks_it_shows():
    model = tiny_model("llama")
    scores = score(DEPTH["consensus"], context(model), layers(4))
    ranks = [scores.details[f"rank of {name}"] for name in DISSIMILARITIES]
    assert scores.importance == tuple(map(sum, zip(*ranks, strict=True)))
    assert all(sorted(r) == [1, 2, 3, 4] for r in ranks)
    for name in DISSIMILARITIES:
        order = sorted(range(4), key=lambda i: scores.details[name][i])
        assert [scores.details[f"rank of {name}"][i] for i in order] == [1, 2, 3, 4]


def test_consensus_says_when_a_voice_cannot_vote():
    scores = score(DEPTH["consensus"], context(tiny_model("llama"), batches(rows=5)), layers(4))
    assert "rank of cca" not in scores.details
    assert "does not vote" in scores.notes["cca"]
    with pytest.raises(ValueError, match="'cca' is undefined for every structure: 10 samples are too few"):
        score(DEPTH["cca"], context(tiny_model("llama"), batches(rows=5)), layers(4))


def test_an_undefined_structure_is_kept_and_noted():
    """Only layer 1 lets tokens see each other; without it the last token, which is the same in every row, is all."""
    model = tiny_model("llama")
    for layer in (0, 2, 3):
        silence(model, layer, "attention")
    data = batches()[1:]
    data[0]["input_ids"][:, -1] = 7
    scores = score(DEPTH["cka"], context(model, data, "last"), layers(4))
    assert scores.of(Structure("layer", 1)) == math.inf
    assert "constant" in scores.notes[Structure("layer", 1)]
    assert scores.weakest() != Structure("layer", 1)
    assert score(DEPTH["cka"], context(model, data, "last"), layers(4), "reversed").weakest() != Structure("layer", 1)


def test_bad_input_is_named():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="'third_to_last' cannot score mlp"):
        score(DEPTH["third_to_last"], context(model), layers(4, "mlp"))
    with pytest.raises(ValueError, match="needs labels, and batches \\[0, 1\\] have none"):
        score(DEPTH["consensus_by_class"], context(model), layers(4))
    with pytest.raises(ValueError, match="has no head"):
        score(DEPTH["kl"], context(tiny_model("llama", head="base")), layers(4))
    with pytest.raises(ValueError, match="is an encoder"):
        score(DEPTH["perplexity"], context(tiny_model("bert")), layers(4))
    with pytest.raises(ValueError, match="its loss|no labels"):
        score(DEPTH["taylor"], context(tiny_model("bert")), layers(4))
    with pytest.raises(ValueError, match="needs calibration batches"):
        score(DEPTH["cka"], ScoringContext(model, find_anatomy(model), [], Pooling("last")), layers(4))
    with pytest.raises(ValueError, match="3 samples: the debiased estimator needs at least 4"):
        score(DEPTH["cka"], context(model, [tiny_batch(3)]), layers(4))
    with pytest.raises(ValueError, match="layer 0 is NaN"):
        DepthScores((Structure("layer", 0),), (math.nan,))


@pytest.mark.parametrize("name", ["kl", "taylor"])
def test_a_classifier_is_scored_on_its_own_output(name):
    model = tiny_model("bert", head="classification")
    data = batches(labels=True)
    with torch.no_grad():
        block = model.bert.encoder.layer[2]
        block.attention.output.dense.weight.mul_(1e-6)
        block.attention.output.dense.bias.zero_()
    scores = score(DEPTH[name], context(model, data), layers(4, "attention"))
    assert str(scores.weakest()) == "attention 2"
