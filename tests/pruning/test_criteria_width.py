"""Width criteria: each against a plain reference, each with an answer known by construction."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_cka.anatomy import find_anatomy
from hf_cka.lookup import lookup
from hf_cka.pruning.criteria.base import ScoringContext, WidthScores, score
from hf_cka.pruning.criteria.inputs import output_projections, tapped
from hf_cka.pruning.criteria.width import WIDTH
from hf_cka.pruning.criteria.width_refit import eliminate
from hf_cka.representations import Pooling
from tests.tiny import DECODERS, SETTINGS, output_paths, tiny_batch, tiny_model

ACTIVATION_BASED = ("amp", "activation_norm", "taylor", "wanda", "flap", "variance", "kl", "obs")

WITHOUT_ADAPTERS = [name for name, entry in WIDTH.items() if not entry.needs_adapters]


def score_width(model, batches, name: str, **settings) -> WidthScores:
    context = ScoringContext(model, find_anatomy(model), batches, Pooling("last"), **settings)
    return score(lookup(WIDTH, name, "width criterion"), context)


def assert_same(a: WidthScores, b: WidthScores, rtol: float = 1e-4, atol: float = 1e-7) -> None:
    for left, right in ((a.kv_groups, b.kv_groups), (a.units, b.units)):
        assert len(left) == len(right)
        for x, y in zip(left, right, strict=True):
            torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


def batches_for(model_type: str, labels: bool = False) -> list[dict]:
    batch = tiny_batch()
    if labels and model_type not in DECODERS:
        batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    return [batch]


def inputs_by_row(model, batch) -> dict:
    """(layer, role) -> one (tokens, features) matrix per prompt: what the projection got, by a plain hook."""
    anatomy, caught = find_anatomy(model), {}
    mask = batch["attention_mask"].bool()

    def keep(layer, role, hidden):
        hidden = hidden.reshape(*mask.shape, -1)
        caught[layer, role] = [row[m].double() for row, m in zip(hidden, mask, strict=True)]

    with tapped(anatomy, keep), torch.no_grad():
        model(**batch)
    return caught


def matrix(model, layer, role):
    anatomy = find_anatomy(model)
    module = anatomy.layer(layer).get_submodule(output_paths(anatomy.model_type)[role])
    return (module.weight.T if anatomy.model_type == "gpt2" else module.weight).double()


def grouped(values, anatomy, layer):
    return values.reshape(anatomy.sizes(layer).num_kv_heads, -1).mean(dim=1)


@pytest.mark.parametrize("model_type", SETTINGS)
def test_equals_a_plain_reference_in_every_family(model_type):
    """AMP and Wanda written down from their formulas, on whole matrices."""
    model = tiny_model(model_type)
    batches = batches_for(model_type)
    anatomy, caught = find_anatomy(model), inputs_by_row(model, batches[0])
    amp, wanda = score_width(model, batches, "amp"), score_width(model, batches, "wanda")
    for layer in range(anatomy.num_layers):
        sizes = anatomy.sizes(layer)
        w_o, w_down = matrix(model, layer, "o"), matrix(model, layer, "down")
        rows = caught[layer, "down"]
        torch.testing.assert_close(amp.units[layer], sum(r.abs().mean(0) for r in rows) / 2, rtol=1e-5, atol=1e-7)
        norm = (sum(r.square().mean(0) for r in rows) / 2).sqrt()
        torch.testing.assert_close(wanda.units[layer], w_down.abs().sum(0) * norm, rtol=1e-5, atol=1e-7)
        heads = torch.stack(
            [
                sum((r[:, c] @ w_o[:, c].T).abs().sum(1).mean() for r in caught[layer, "o"]) / 2
                for c in torch.arange(sizes.num_heads * sizes.head_dim).split(sizes.head_dim)
            ]
        )
        torch.testing.assert_close(amp.kv_groups[layer], grouped(heads, anatomy, layer), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model_type", SETTINGS)
def test_taylor_is_weight_times_weight_gradient(model_type):
    """|sum over the group of W dL/dW| of the output projection, one prompt at a time, by autograd on the weights."""
    model = tiny_model(model_type)
    batch = batches_for(model_type, labels=True)[0]
    anatomy = find_anatomy(model)
    expected: dict = {}
    for row, length in ((0, 12), (1, 8)):
        model.zero_grad()
        one = {key: value[row : row + 1, :length] for key, value in batch.items()}
        logits = model(**{k: v for k, v in one.items() if k != "labels"}).logits[0]
        if model_type in DECODERS:
            loss = nn.functional.cross_entropy(logits[:-1], one["input_ids"][0, 1:])
        else:
            loss = nn.functional.cross_entropy(logits, one["labels"][0])
        loss.backward()
        for layer, role, module in output_projections(anatomy):
            product = (module.weight * module.weight.grad).double()
            columns = product.sum(dim=1 if model_type == "gpt2" else 0)
            count = anatomy.sizes(layer).num_kv_heads if role == "o" else len(columns)
            value = columns.reshape(count, -1).sum(1).abs() / 2
            expected[layer, role] = expected.get((layer, role), 0) + value
    model.zero_grad(set_to_none=True)
    found = score_width(model, [batch], "taylor")
    for layer in range(anatomy.num_layers):
        torch.testing.assert_close(found.kv_groups[layer], expected[layer, "o"], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(found.units[layer], expected[layer, "down"], rtol=1e-3, atol=1e-6)
    # no gradient was left behind, and every parameter still trains
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_other_formulas():
    model = tiny_model("llama")
    batch = tiny_batch()
    caught = inputs_by_row(model, batch)
    found = {name: score_width(model, [batch], name) for name in ("variance", "flap", "activation_norm")}
    anatomy = find_anatomy(model)
    for layer in range(4):
        for role in ("o", "down"):
            rows = caught[layer, role]
            weights = torch.cat([torch.full((len(r),), 0.5 / len(r), dtype=torch.float64) for r in rows])
            tokens = torch.cat(rows)
            mean = weights @ tokens
            variance = weights @ (tokens - mean).square()
            raw = variance * matrix(model, layer, role).square().sum(0)
            standard = (raw - raw.mean()) / raw.std()
            if role == "down":
                torch.testing.assert_close(found["variance"].units[layer], variance, rtol=1e-5, atol=1e-9)
                torch.testing.assert_close(found["flap"].units[layer], standard, rtol=1e-4, atol=1e-5)
                norm = torch.stack([r.abs().mean(0) for r in rows]).square().mean(0).sqrt()
                torch.testing.assert_close(found["activation_norm"].units[layer], norm, rtol=1e-5, atol=1e-7)
            else:
                torch.testing.assert_close(
                    found["flap"].kv_groups[layer], grouped(standard, anatomy, layer), rtol=1e-4, atol=1e-5
                )
                heads = torch.stack([r.unflatten(1, (4, 8)).norm(dim=2).mean(0) for r in rows]).square().mean(0).sqrt()
                torch.testing.assert_close(
                    found["activation_norm"].kv_groups[layer], grouped(heads, anatomy, layer), rtol=1e-5, atol=1e-7
                )


def test_kl_is_the_divergence_of_the_output_without_the_group():
    model = tiny_model("llama", num_hidden_layers=2, intermediate_size=6)
    batch = tiny_batch()
    found = score_width(model, [batch], "kl")
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        intact = model(**batch).logits.log_softmax(-1)
        for layer in range(2):
            for role, width, scores in (("o", 16, found.kv_groups), ("down", 1, found.units)):
                for group, value in enumerate(scores[layer]):
                    changed = copy.deepcopy(model)
                    module = {pair[:2]: pair[2] for pair in output_projections(find_anatomy(changed))}[layer, role]
                    module.weight[:, group * width : (group + 1) * width] = 0
                    without = changed(**batch).logits.log_softmax(-1)
                    tokens = (without.exp() * (without - intact)).sum(-1).double()
                    expected = sum(row[m].mean() for row, m in zip(tokens, mask, strict=True)) / 2
                    assert value.item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("size", [1, 3])
def test_elimination_is_greedy_least_squares(size):
    """Against refitting every candidate from scratch at every step."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 12, generator=generator, dtype=torch.float64)
    x[:, 5] = x[:, 4] + 0.1 * x[:, 5]  # nearly collinear: one of the two is cheap, the second is not
    weights = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    gram = x.T @ x
    order, cost = eliminate(gram, weights, size)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(12)

    def error(gone: list[int]) -> float:
        """Of the damped problem: the least that is left when the weights of these groups are zero."""
        features = [g * size + i for g in gone for i in range(size)]
        stay = [i for i in range(12) if i not in features]
        schur = damped[features][:, features] - damped[features][:, stay] @ torch.linalg.solve(
            damped[stay][:, stay], damped[stay][:, features]
        )
        return float((weights[features] * (schur @ weights[features])).sum())

    gone: list[int] = []
    highest = 0.0
    for _ in range(12 // size - 1):
        left = [g for g in range(12 // size) if g not in gone]
        best = min(left, key=lambda g: error([*gone, g]))
        highest = max(highest, error([*gone, best]) - (error(gone) if gone else 0.0))
        gone.append(best)
        assert cost[best] == pytest.approx(highest, rel=1e-6)
    assert order[:-1] == gone


def test_obs_is_in_units_of_the_output():
    """The scores of the cheapest 40 % of a layer's units add up to the KL that their refitted removal causes."""
    model = tiny_model("llama")
    batches = [tiny_batch(8, length=10, seed=s) for s in range(4)]
    scores = score_width(model, batches, "obs").units
    mask = [batch["attention_mask"].bool() for batch in batches]
    with torch.no_grad():
        intact = [model(**batch).logits.log_softmax(-1) for batch in batches]
    for layer in (0, 2):
        mlp = model.model.layers[layer].mlp
        caught: list = []
        hooks = [
            mlp.down_proj.register_forward_pre_hook(lambda _m, args, seen=caught: seen.append(args[0])),
            model.model.layers[layer].register_forward_hook(lambda _m, _a, out, seen=caught: seen.append(out)),
        ]
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        for hook in hooks:
            hook.remove()
        gram = torch.zeros(48, 48, dtype=torch.float64)
        for x, out, keep in zip(caught[::2], caught[1::2], mask, strict=True):
            weight = (1 / keep.sum(1, keepdim=True) / out.double().square().mean(-1))[keep]
            gram += (x[keep].double() * weight.unsqueeze(1)).T @ x[keep].double()
        gone = scores[layer].argsort()[:19]
        stay = torch.tensor([i for i in range(48) if i not in gone])
        damped = gram[stay][:, stay] + 0.01 * gram.diagonal().mean() * torch.eye(len(stay))
        refitted = copy.deepcopy(model)
        down = refitted.model.layers[layer].mlp.down_proj.weight
        with torch.no_grad():
            down[:, stay] += down[:, gone] @ torch.linalg.solve(damped, gram[stay][:, gone]).T.float()
            down[:, gone] = 0
            divergence = 0.0
            for batch, before, keep in zip(batches, intact, mask, strict=True):
                after = refitted(**batch).logits.log_softmax(-1)
                per_token = (before.exp() * (before - after)).sum(-1).masked_fill(~keep, 0)
                divergence += float((per_token.sum(1) / keep.sum(1)).sum())
        assert float(scores[layer][gone].sum()) == pytest.approx(divergence / 32, rel=0.01)


@pytest.mark.parametrize("name", ACTIVATION_BASED)
def test_what_does_nothing_goes_first(name):
    """A KV group whose values and a unit whose `up` row are zero, with zero output columns, are the least important."""
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight[8:] = 0  # the second KV group: 8 of 16 rows
            layer.self_attn.o_proj.weight[:, 16:] = 0
            layer.mlp.up_proj.weight[7] = 0
            layer.mlp.down_proj.weight[:, 7] = 0
    scores = score_width(model, [tiny_batch()], name)
    for groups, units in zip(scores.kv_groups, scores.units, strict=True):
        assert groups.argmin() == 1
        assert units.argmin() == 7
    turned = scores.reversed()
    assert all(units.argmax() == 7 for units in turned.units)


@pytest.mark.parametrize("model_type", SETTINGS)
def test_magnitude_counts_every_weight_of_a_group_once(model_type):
    model = tiny_model(model_type)
    anatomy = find_anatomy(model)
    scores = score_width(model, [], "magnitude")
    for layer in range(anatomy.num_layers):
        mlp = attention = torch.zeros((), dtype=torch.float64)
        for name, module in anatomy.layer(layer).named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                squares = module.weight.double().square().sum()
                if re.match(r"mlp|ffn|fc[12]|intermediate|output", name):
                    mlp = mlp + squares
                else:
                    attention = attention + squares
        torch.testing.assert_close(scores.units[layer].square().sum(), mlp)
        torch.testing.assert_close(scores.kv_groups[layer].square().sum(), attention)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt_neox", "gpt2"])
def test_magnitude_finds_a_group_in_fused_projections(model_type):
    """Zeroing exactly the queries, keys and values of the last group changes the score of that group alone."""
    model = tiny_model(model_type)
    anatomy = find_anatomy(model)
    before = score_width(model, [], "magnitude").kv_groups[0]
    attention = anatomy.layer(0).get_submodule({"gpt_neox": "attention", "gpt2": "attn"}.get(model_type, "self_attn"))
    with torch.no_grad():
        if model_type == "llama":
            for module, rows in ((attention.q_proj, slice(16, 32)), (attention.v_proj, slice(8, 16))):
                module.weight[rows] = 0
        elif model_type == "phi3":  # rows: 32 of queries, 16 of keys, 16 of values
            attention.qkv_proj.weight[[*range(16, 32), *range(40, 48), *range(56, 64)]] = 0
        elif model_type == "gpt_neox":  # query, key, value of each head in turn
            attention.query_key_value.weight[72:96] = 0
        else:  # Conv1D stores the transpose
            attention.c_attn.weight[:, [*range(24, 32), *range(56, 64), *range(88, 96)]] = 0
    after = score_width(model, [], "magnitude").kv_groups[0]
    assert after[-1] < before[-1]
    torch.testing.assert_close(after[:-1], before[:-1])


@pytest.mark.parametrize("name", WITHOUT_ADAPTERS)
def test_padding_and_batch_size_do_not_matter(name):
    model = tiny_model("llama", num_hidden_layers=2, intermediate_size=12)
    right, left = tiny_batch(pad="right"), tiny_batch(pad="left")
    left["input_ids"][1, 4:] = right["input_ids"][1, :8]
    singles = [
        {"input_ids": right["input_ids"][:1]},
        {"input_ids": right["input_ids"][1:, :8]},
    ]
    whole = score_width(model, [right], name)
    assert_same(whole, score_width(model, [left], name), rtol=1e-3, atol=1e-6)
    assert_same(whole, score_width(model, singles, name), rtol=1e-3, atol=1e-6)


def test_random_follows_the_seed():
    model = tiny_model("llama")
    first, again, other = (score_width(model, [], "random", seed=seed) for seed in (0, 0, 1))
    assert_same(first, again, rtol=0, atol=0)
    assert not torch.equal(first.units[0], other.units[0])


@pytest.mark.parametrize("name", ["amp", "wanda", "magnitude"])
def test_weights_that_are_stored_quantized(name):
    """A module that hides its weight, as a quantized one does, gets the score of the weight it computes with."""

    class Hidden(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            scale = linear.weight.abs().max() / 127
            self.register_buffer("packed", (linear.weight / scale).round().to(torch.int8))
            self.scale = scale

        def dequantized(self) -> torch.Tensor:
            return self.packed.float() * self.scale

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.dequantized().T

    model = tiny_model("llama")
    quantized = copy.deepcopy(model)
    with torch.no_grad():
        for plain, layer in zip(model.model.layers, quantized.model.layers, strict=True):
            for parent, child in (("self_attn", "o_proj"), ("mlp", "down_proj"), ("mlp", "up_proj")):
                hidden = Hidden(getattr(getattr(layer, parent), child))
                setattr(getattr(layer, parent), child, hidden)
                getattr(getattr(plain, parent), child).weight.copy_(hidden.dequantized())
    assert_same(score_width(model, [tiny_batch()], name), score_width(quantized, [tiny_batch()], name))


def test_half_precision_is_scored_in_float32():
    """Activations whose squares overflow float16 (above 65504) still have finite scores."""
    model = tiny_model("llama").to(torch.bfloat16)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1000)
    scores = score_width(model, [tiny_batch()], "wanda")
    assert scores.units[1].isfinite().all()
    assert scores.units[1].mean() > 100 * scores.units[0].mean()


def test_the_model_is_left_as_it_was():
    model = tiny_model("llama").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for name in WITHOUT_ADAPTERS:
        if name != "kl":
            score_width(model, [tiny_batch()], name)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_bad_input():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"needs calibration batches"):
        score_width(model, [], "amp")
    with pytest.raises(ValueError, match=r"Did you mean: 'wanda'"):
        score_width(model, [tiny_batch()], "wnada")
    with pytest.raises(ValueError, match=r"has no head"):
        score_width(model.model, [tiny_batch()], "taylor")
    with pytest.raises(ValueError, match=r"batch 0 has no labels for BertForMaskedLM"):
        score_width(tiny_model("bert"), [tiny_batch()], "taylor")
    with pytest.raises(ValueError, match=r"without any token to predict: \[0\]"):
        score_width(model, [{"input_ids": torch.tensor([[5]])}], "taylor")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3] = float("nan")
    with pytest.raises(ValueError, match=r"input of 'down' in layer 2 holds NaN"):
        score_width(model, [tiny_batch()], "variance")
    assert not any(m._forward_pre_hooks for m in model.modules())
