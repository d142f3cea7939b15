"""What enters the matrices of experts is seen, whichever way transformers runs them, and scores follow from it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_cka.anatomy import find_anatomy
from hf_cka.lookup import lookup
from hf_cka.pruning.criteria.base import ScoringContext, score
from hf_cka.pruning.criteria.experts import watched
from hf_cka.pruning.criteria.weights import weight_matrix
from hf_cka.pruning.criteria.width import WIDTH
from hf_cka.representations import Pooling
from tests.tiny import tiny_batch
from tests.world import world_model

MODELS = ("qwen3_moe", "mixtral")
WAYS = ("eager", "batched_mm")


def experts_of(model, layer=0):
    return model.model.layers[layer].mlp.experts


def called_with(model, batch):
    """What the experts of the first layer are given: tokens, and the experts of each."""
    seen = []
    handle = experts_of(model).register_forward_pre_hook(lambda _m, args: seen.append(args))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return seen[0][0].reshape(-1, seen[0][0].shape[-1]), seen[0][1]


def inner(experts, hidden, expert):
    """What one expert's down projection gets from each token, by its formula."""
    gate, up = nn.functional.linear(hidden, experts.gate_up_proj[expert]).chunk(2, dim=-1)
    return experts.act_fn(gate) * up


def same_rows(found, expected):
    """Whether two matrices have the same rows, in any order."""
    assert found.shape == expected.shape
    distance = torch.cdist(found.detach().double(), expected.detach().double())
    assert sorted(distance.argmin(dim=1).tolist()) == list(range(len(expected)))
    return float(distance.min(dim=1).values.max()) < 1e-5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", MODELS)
def test_every_row_that_enters_a_matrix_is_seen_with_its_token(model_type, way):
    model = world_model(model_type)
    model.set_experts_implementation(way)
    batch = tiny_batch()
    hidden, chosen = called_with(model, batch)
    experts, seen = experts_of(model), []
    with watched(experts, "down_proj", 2, lambda *args: seen.append(args) or None), torch.no_grad():
        model(**batch)
    rows = torch.cat([rows for rows, _, _ in seen])
    expected = torch.cat([inner(experts, hidden[i : i + 1], int(e)) for i, row in enumerate(chosen) for e in row])
    assert same_rows(rows, expected)
    for values, tokens, given in seen:
        assert torch.equal(given.reshape(hidden.shape), hidden)
        for value, token in zip(values, tokens, strict=True):
            own = torch.cat([inner(experts, hidden[token : token + 1], int(e)) for e in chosen[token]])
            assert float((own - value).abs().sum(dim=1).min()) < 1e-5
    assert "forward" not in experts.__dict__, "nothing is left behind"


@pytest.mark.parametrize("way", WAYS)
def test_what_a_tap_returns_takes_the_place_of_the_rows(way):
    model, batch = world_model("mixtral"), tiny_batch()
    model.set_experts_implementation(way)
    experts = experts_of(model)
    gone = torch.tensor([3, 7])
    with watched(experts, "down_proj", 2, lambda rows, *_: rows.index_fill(-1, gone, 0)), torch.no_grad():
        found = model(**batch).logits
    with torch.no_grad():
        before = model(**batch).logits
        experts.down_proj.index_fill_(2, gone, 0)
        expected = model(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found - before).abs().max() > 1e-3


def scores_of(model, name):
    context = ScoringContext(model, find_anatomy(model), [tiny_batch()], Pooling("last"))
    return score(lookup(WIDTH, name, "width criterion"), context)


@pytest.mark.parametrize("name", ["amp", "activation_norm", "wanda", "flap", "variance", "taylor", "magnitude"])
@pytest.mark.parametrize("model_type", MODELS)
def test_a_unit_that_does_nothing_in_any_expert_goes_first(model_type, name):
    model = world_model(model_type)
    width = find_anatomy(model).width(0, "units")
    with torch.no_grad():
        for layer in range(4):
            experts = experts_of(model, layer)
            experts.gate_up_proj[:, [5, width.members + 5]] = 0
            experts.down_proj[:, :, 5] = 0
    units = scores_of(model, name).units
    assert [int(layer.argmin()) for layer in units] == [5] * 4
    assert [len(layer) for layer in units] == [width.members] * 4


@pytest.mark.parametrize("name", ["amp", "wanda"])
def test_scores_do_not_depend_on_how_experts_are_run(name):
    found = []
    for way in WAYS:
        model = world_model("qwen3_moe")
        model.set_experts_implementation(way)
        found.append(scores_of(model, name))
    for one, other in zip(found[0].units, found[1].units, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_the_magnitude_of_a_unit_counts_all_experts():
    model = world_model("qwen3_moe")
    experts = experts_of(model, 1)
    count = find_anatomy(model).width(1, "units").members
    squares = experts.gate_up_proj.double().square().sum(dim=(0, 2)).unflatten(0, (2, count)).sum(dim=0)
    squares = squares + experts.down_proj.double().square().sum(dim=(0, 1))
    torch.testing.assert_close(scores_of(model, "magnitude").units[1], squares.sqrt().detach())
    matrix = weight_matrix(find_anatomy(model), 1, "down")
    assert torch.equal(matrix, experts.down_proj.detach().reshape(-1, count))
