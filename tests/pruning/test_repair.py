"""Repairs: less calibration error by construction, the closed form against a plain one, and held-out text."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from hf_cka.anatomy import find_anatomy
from hf_cka.modeling.plan import PruningPlan
from hf_cka.modeling.surgery import apply_plan
from hf_cka.pruning.criteria.base import ScoringContext
from hf_cka.pruning.criteria.width import WIDTH
from hf_cka.pruning.normal_equations import DAMPINGS, NormalEquations
from hf_cka.pruning.repair import repair
from hf_cka.pruning.walk import Walk
from hf_cka.pruning.width import WidthSettings, width_plan
from hf_cka.representations import Pooling
from tests.tiny import SETTINGS, output_paths, tiny_batch, tiny_model

ONE_BY_ONE = tuple(name for name in SETTINGS if name != "deberta-v2")  # a convolution follows its first layer


def plan_for(model, **more) -> PruningPlan:
    anatomy = find_anatomy(model)
    groups = anatomy.sizes(1).num_kv_heads
    return PruningPlan(
        anatomy.num_layers,
        anatomy.model_type,
        kept_groups={1: range(groups - 1)},
        kept_units={0: range(0, 48, 2), 1: range(30), 3: range(10, 40)},
        **more,
    )


def data(rows: int = 16, length: int = 12, seed: int = 0) -> list[dict]:
    return [tiny_batch(length=length, seed=seed + i) for i in range(rows)]


def output_error(model, dense, batches) -> float:
    """Squared error of the logits, padding left out."""
    error = 0.0
    with torch.no_grad():
        for batch in batches:
            mask = batch["attention_mask"].bool()
            error += float((model(**batch).logits - dense(**batch).logits)[mask].double().square().sum())
    return error


@pytest.mark.parametrize("model_type", ONE_BY_ONE)
def test_least_squares_lowers_the_error_in_every_family(model_type):
    """Each projection's calibration error goes down, and so does the error of the pruned model's logits."""
    dense = tiny_model(model_type)
    plan, batches = plan_for(dense), data()
    plain, repaired = copy.deepcopy(dense), copy.deepcopy(dense)
    report = repair(repaired, plan, batches, damping=0.01, progress=False)
    assert all(0 <= step.after <= step.before for step in report.repaired)
    cut = [(0, "down"), (1, "o"), (1, "down"), (3, "down")]
    assert [(step.layer, step.role) for step in report.repaired] == cut
    apply_plan(plain, plan)
    apply_plan(repaired, plan)
    assert output_error(repaired, dense, batches) < 0.7 * output_error(plain, dense, batches)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "deberta-v2"])
def test_least_squares_on_dense_activations(model_type):
    dense = tiny_model(model_type)
    plan, batches = plan_for(dense), data()
    plain, repaired = copy.deepcopy(dense), copy.deepcopy(dense)
    report = repair(repaired, plan, batches, sequential=False, progress=False)
    assert [(step.layer, step.role) for step in report.repaired] == [(0, "down"), (1, "down"), (1, "o"), (3, "down")]
    assert all(0 <= step.after < step.before for step in report.repaired)
    apply_plan(plain, plan)
    apply_plan(repaired, plan)
    assert output_error(repaired, dense, batches) < output_error(plain, dense, batches)


def test_the_closed_form_of_one_layer():
    """On dense activations: W_K + W_P Q' with Q = (X_K'X_K + damping)^-1 X_K'X_P, tokens of a prompt sharing 1."""
    model = tiny_model("llama")
    batch = tiny_batch(length=40, vocab=96)
    caught = []
    handle = model.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda _m, args: caught.append(args[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    mask = batch["attention_mask"].bool()
    weight = (1 / mask.sum(1, keepdim=True)).expand_as(mask)[mask].double()
    x = caught[0][mask].double() * weight.sqrt().unsqueeze(1)
    keep = list(range(40))
    k, p = x[:, :40], x[:, 40:]
    gram = k.T @ k
    q = torch.linalg.solve(gram + 0.05 * gram.diagonal().mean() * torch.eye(40), k.T @ p)
    w = model.model.layers[2].mlp.down_proj.weight.detach().double()
    expected = w[:, :40] + w[:, 40:] @ q.T
    repair(
        model, PruningPlan(4, "llama", kept_units={2: keep}), [batch], sequential=False, damping=0.05, progress=False
    )
    found = model.model.layers[2].mlp.down_proj.weight.detach().double()[:, :40]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_collinear_units_are_repaired_without_loss():
    """A removed unit that is a multiple of a kept one costs nothing after the repair."""
    dense = tiny_model("llama")
    with torch.no_grad():
        for layer in dense.model.layers:
            layer.mlp.gate_proj.weight[24:] = layer.mlp.gate_proj.weight[:24]
            layer.mlp.up_proj.weight[24:] = 0.5 * layer.mlp.up_proj.weight[:24]
    plan = PruningPlan(4, "llama", kept_units={i: range(24) for i in range(4)})
    plain, repaired = copy.deepcopy(dense), copy.deepcopy(dense)
    batches, other = data(), data(8, seed=500)
    repair(repaired, plan, batches, damping=1e-6, progress=False)
    apply_plan(plain, plan)
    apply_plan(repaired, plan)
    assert output_error(repaired, dense, other) < 1e-4 * output_error(plain, dense, other)


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "phi", "gpt_neox", "bert"])
def test_mean_shift_corrects_the_mean(model_type):
    dense = tiny_model(model_type)
    plan, batches = plan_for(dense), data()
    repaired = copy.deepcopy(dense)
    report = repair(repaired, plan, batches, "mean_shift", progress=False)
    assert all(step.after < step.before for step in report.repaired)
    # in the first layer the inputs are those of the dense model: the mean output of its MLP is restored
    anatomy, path = find_anatomy(dense), output_paths(model_type)["down"]
    means = []
    first = PruningPlan(4, plan.model_type, kept_units={0: plan.kept_units[0]})
    for model in (dense, apply_plan(repaired, first)):
        total, count = 0.0, 0
        outputs = []
        module = find_anatomy(model).layer(0).get_submodule(path)
        handle = module.register_forward_hook(lambda _m, _a, output, outputs=outputs: outputs.append(output))
        for batch in batches:
            with torch.no_grad():
                model(**batch)
            mask = batch["attention_mask"].bool()
            output = outputs.pop().reshape(*mask.shape, -1)
            total = total + sum(row[m].mean(0) for row, m in zip(output, mask, strict=True))
            count += len(mask)
        handle.remove()
        means.append(total / count)
    assert anatomy.num_layers == 4
    torch.testing.assert_close(means[0], means[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi", "granite", "qwen3"])
def test_a_removed_run_becomes_a_linear_map(model_type):
    dense = tiny_model(model_type)
    plan = PruningPlan(4, model_type, removed_layers=(1, 2))
    batches = data(24)
    errors = {}
    for method in (None, "linear_map", "least_squares"):
        model = copy.deepcopy(dense)
        if method:
            report = repair(model, plan, batches, method, progress=False)
            assert all(0 <= step.after <= step.before for step in report.repaired)
            assert any(step.after < 0.9 * step.before for step in report.repaired)
        errors[method] = output_error(apply_plan(model, plan), dense, batches)
    assert errors["linear_map"] < errors[None]
    assert errors["least_squares"] < errors["linear_map"]


def test_removed_sublayers_and_first_layers_are_corrected_by_what_stays():
    dense = tiny_model("llama")
    plan = PruningPlan(4, "llama", removed_layers=(0,), removed_attention=(2,), removed_mlp=(1,))
    plain, repaired = copy.deepcopy(dense), copy.deepcopy(dense)
    report = repair(repaired, plan, data(24), progress=False)
    assert [(s.layer, s.role) for s in report.repaired] == [(1, "o"), (2, "down"), (3, "o"), (3, "down")]
    apply_plan(plain, plan)
    apply_plan(repaired, plan)
    assert output_error(repaired, dense, data(24)) < 0.7 * output_error(plain, dense, data(24))


@pytest.mark.parametrize(("model_type", "gain"), [("llama", 1.0), ("granite", 0.7), ("gemma2", None), ("bert", None)])
def test_how_a_branch_reaches_the_stream_is_read_from_the_model(model_type, gain):
    model = tiny_model(model_type)
    walk = Walk(find_anatomy(model), plan_for(model), data(1))
    for role in ("o", "down"):
        assert walk.gain[role] == (gain if gain is None else pytest.approx(gain, rel=1e-4))


def test_padding_and_batch_size_do_not_matter():
    dense = tiny_model("llama")
    right = tiny_batch(length=24, pad="right")
    left = tiny_batch(length=24, pad="left")
    left["input_ids"][1, 4:] = right["input_ids"][1, :20]
    singles = [{"input_ids": right["input_ids"][:1]}, {"input_ids": right["input_ids"][1:, :20]}]
    weights = []
    for batches in ([right], [left], singles):
        model = copy.deepcopy(dense)
        repair(model, plan_for(dense), batches, damping=0.1, progress=False)
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    for other in weights[1:]:
        torch.testing.assert_close(weights[0], other, rtol=2e-3, atol=2e-4)


def test_streaming_equals_whole_and_the_intercept_is_free():
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(200, n, generator=generator) for n in (5, 2))
    y = x @ torch.randn(5, 2, generator=generator) + 7 + 0.1 * noise
    weight = torch.rand(200, generator=generator).double()
    parts, whole = NormalEquations(intercept=True), NormalEquations(intercept=True)
    for a, b, w in zip(x.split(33), y.split(33), weight.split(33), strict=True):
        parts.add(a, b, w)
    whole.add(x, y, weight)
    fit = parts.solve(1e-9)
    correction, shift, before, after = fit.correction, fit.shift, fit.before, fit.after
    torch.testing.assert_close(correction, whole.solve(1e-9).correction, rtol=1e-5, atol=1e-6)
    design = torch.cat([x, torch.ones(200, 1)], 1).double() * weight.sqrt().unsqueeze(1)
    plain = torch.linalg.lstsq(design, y.double() * weight.sqrt().unsqueeze(1)).solution
    torch.testing.assert_close(torch.cat([correction, shift.unsqueeze(0)]), plain, rtol=1e-4, atol=1e-5)
    left = y.double() - x.double() @ correction - shift
    assert after == pytest.approx(float((weight @ left.square()).sum() / weight.sum()), rel=1e-3)
    assert before == pytest.approx(float((weight @ y.double().square()).sum() / weight.sum()), rel=1e-6)


@pytest.mark.parametrize("intercept", [False, True])
def test_the_damping_is_the_one_that_explains_held_out_rows_best(intercept):
    """Few noisy rows want a strong one, many clean rows a weak one; the choice is checked against plain refits."""
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(20, 3, generator=generator)
    chosen = []
    for rows, noise in ((48, 20.0), (4000, 0.01)):
        x = torch.randn(rows, 20, generator=generator)
        y = x @ truth + noise * torch.randn(rows, 3, generator=generator) + 5 * intercept
        weight = torch.rand(rows, generator=generator).double() + 0.1
        held = torch.arange(rows) % 4 == 3
        equations = NormalEquations(intercept)
        for part in zip(x.split(100), y.split(100), weight.split(100), held.split(100), strict=True):
            equations.add(*part)
        errors = {}
        for damping in DAMPINGS:
            plain = NormalEquations(intercept)
            plain.add(x[~held], y[~held], weight[~held])
            fit = plain.solve(damping)
            left = y[held].double() - x[held].double() @ fit.correction - (fit.shift if intercept else 0)
            errors[damping] = float((weight[held] @ left.square()).sum())
        chosen.append(equations.solve().damping)
        assert chosen[-1] == min(errors, key=errors.get)
    assert chosen[0] > chosen[1]


def test_the_chosen_damping_does_not_depend_on_the_batch_size():
    rows = torch.cat([batch["input_ids"] for batch in data(3)])
    found = []
    for size in (1, 2, len(rows)):
        model = tiny_model("llama")
        batches = [{"input_ids": part} for part in rows.split(size)]
        found.append([r.damping for r in repair(model, plan_for(model), batches, progress=False).repaired])
    assert found[0] == found[1] == found[2]
    assert None not in found[0]


def test_an_error_leaves_the_weights_as_they_were():
    model = tiny_model("llama").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = plan_for(model)
    broken = tiny_batch()
    broken["input_ids"][0, 3] = 10_000  # not in the vocabulary
    with pytest.raises(IndexError):
        repair(model, plan, [tiny_batch(), broken], progress=False)
    for method, message in (("mean_shift", "'llama' has none there"), ("linear_map", "needs a run of removed layers")):
        with pytest.raises(ValueError, match=message):
            repair(model, plan, data(2), method, progress=False)
    with pytest.raises(ValueError, match="damping must be positive, got 0"):
        repair(model, plan, data(2), damping=0, progress=False)
    with pytest.raises(ValueError, match="Did you mean: 'least_squares'"):
        repair(model, plan, data(2), "least_square", progress=False)
    with pytest.raises(ValueError, match="cannot repair removed layers"):
        repair(model, PruningPlan(4, "llama", removed_layers=(1,)), data(2), sequential=False, progress=False)
    with pytest.raises(ValueError, match="Calibration is empty"):
        repair(model, plan, [], progress=False)
    other = tiny_model("deberta-v2", conv_kernel_size=3, conv_act="gelu")
    with pytest.raises(ValueError, match="changes the hidden states between layers 0 and 1"):
        repair(other, plan_for(other), data(1), progress=False)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_interruption_in_the_middle_puts_every_weight_back(monkeypatch):
    model = tiny_model("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    changed = "model.layers.0.mlp.down_proj.weight"
    leave, left = Walk.leave, []

    def interrupted(self, layer):
        if layer == 2:
            left.append(not torch.equal(model.state_dict()[changed], before[changed]))
            raise KeyboardInterrupt
        leave(self, layer)

    monkeypatch.setattr(Walk, "leave", interrupted)
    with pytest.raises(KeyboardInterrupt):
        repair(model, plan_for(model), data(2), progress=False)
    assert left == [True]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.fixture
def story_batches(assets, stories):
    """Calibration and held-out text: batches of different stories."""
    model, tokenizer = stories
    lines = (assets / "lm" / "tinystories_a.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines[:48]]

    def batches(part):
        rows = [tokenizer(text)["input_ids"][:96] for text in part]
        return [{"input_ids": torch.tensor([row])} for row in rows]

    return model, batches(texts[:36]), batches(texts[36:])


@pytest.mark.assets
@pytest.mark.parametrize(
    ("what", "method", "share"),
    [
        ("units", "least_squares", 0.8),
        ("both", "least_squares", 0.8),
        ("depth", "linear_map", 0.95),
        ("depth", "least_squares", 0.9),
    ],
)
def test_real_weights_on_held_out_text(story_batches, what, method, share):
    """A repaired model loses less of its quality on stories it was not calibrated with."""
    dense, calibration, held_out = story_batches

    def loss(model):
        with torch.no_grad():
            return sum(float(model(**b, labels=b["input_ids"]).loss) for b in held_out) / len(held_out)

    if what == "depth":
        plan = PruningPlan(5, "llama", removed_layers=(2,))
    else:
        context = ScoringContext(dense, find_anatomy(dense), calibration, Pooling("last"))
        plan = width_plan(dense, WIDTH["amp"].score(context), 0.2, settings=WidthSettings(what))
    plain, repaired = copy.deepcopy(dense), copy.deepcopy(dense)
    repair(repaired, plan, calibration, method, progress=False)
    base, before, after = loss(dense), loss(apply_plan(plain, plan)), loss(apply_plan(repaired, plan))
    assert base < after < before
    assert after - base < share * (before - base)
