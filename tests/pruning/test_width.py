"""Widths: exact accounting against real surgery, the papers' arithmetic, and every budget."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from hf_cka.anatomy import find_anatomy
from hf_cka.modeling.surgery import apply_plan
from hf_cka.pruning.criteria.base import WidthScores
from hf_cka.pruning.width import (
    BUDGETS,
    LayerParameters,
    ModelParameters,
    WidthSettings,
    WidthSizes,
    keep_best,
    layer_parameters,
    sizes_plan,
    width_plan,
    width_step,
)
from tests.tiny import SETTINGS, tiny_model

STRING_1 = "LGGLLLGGLLGLGLLGGL"
LLAMA2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
LLAMA3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def random_scores(anatomy, seed: int = 0) -> WidthScores:
    generator = torch.Generator().manual_seed(seed)
    sizes = [anatomy.sizes(i) for i in range(anatomy.num_layers)]
    return WidthScores(
        tuple(torch.rand(s.num_kv_heads, generator=generator, dtype=torch.float64) for s in sizes),
        tuple(torch.rand(s.intermediate_size, generator=generator, dtype=torch.float64) for s in sizes),
    )


@pytest.fixture(scope="module")
def llama2() -> ModelParameters:
    return layer_parameters(LlamaConfig(num_hidden_layers=32, **LLAMA2_7B))


@pytest.mark.parametrize("model_type", SETTINGS)
@pytest.mark.parametrize("uniform", [True, False])
def test_counted_parameters_are_those_of_the_pruned_model(model_type, uniform):
    changes = {"qk_layernorm": True} if model_type == "phi" else {}
    model = tiny_model(model_type, **changes)
    anatomy = find_anatomy(model)
    before = layer_parameters(anatomy)
    assert before.total == sum(p.numel() for p in model.parameters())
    groups, units = max(before.sizes.kv_groups), max(before.sizes.units)
    if uniform:
        sizes = WidthSizes((groups - 1,) * 4, (units - 5,) * 4)
    else:
        sizes = WidthSizes((groups, groups - 1, groups, 1), (units - 7, units, 5, units - 1))
    apply_plan(model, sizes_plan(anatomy, random_scores(anatomy), sizes))
    assert before.count(sizes) == sum(p.numel() for p in model.parameters())
    # what is left is counted alike
    assert layer_parameters(model).total == before.count(sizes)
    assert layer_parameters(model).sizes == sizes


@pytest.mark.parametrize(
    ("iteration", "heads", "units", "share", "billions"),
    [(7, 25, 8600, "21.02%", "5.322"), (10, 22, 7568, "30.03%", "4.715")],
)
def test_amp_removes_what_its_paper_says(llama2, iteration, heads, units, share, billions):
    """LLaMA-2-7B: `iteration` times the parameters of a layer, the same share of heads and units."""
    for rule in ("proportional", "exact"):
        step = width_step(llama2, iteration * llama2.layer_total(0), rule=rule)
        assert step.sizes == WidthSizes((heads,) * 32, (units,) * 32)
        assert f"{step.removed / llama2.total:.2%}" == share
        assert f"{(llama2.total - step.removed) / 1e9:.3f}" == billions


def mixture(parameters: ModelParameters, path: str, **how) -> list[ModelParameters]:
    """The arithmetic of a mixture: L removes the third-to-last layer, G as many parameters from all layers' widths."""
    carry, steps = Fraction(0), []
    for branch in path:
        if branch == "L":
            parameters = parameters.without_layers((len(parameters.layers) - 3,))
        else:
            step = width_step(parameters, parameters.layer_total(0), carry=carry, **how)
            carry, parameters = step.carry, parameters.resized(step.sizes)
        steps.append(parameters)
    return steps


def test_mop_string_1_on_llama_2_7b(llama2):
    steps = mixture(llama2, STRING_1, rule="proportional")
    shares = [f"{1 - steps[n - 1].total / llama2.total:.2%}" for n in (7, 11, 15)]
    assert shares == ["20.08%", "30.56%", "40.39%"]
    last = steps[14]
    assert (len(last.layers), last.sizes.kv_groups[0], last.sizes.units[0]) == (23, 26, 8848)
    assert last.total == 4_017_090_560


def test_mop_string_1_on_llama_3_8b_mlp_only():
    llama3 = layer_parameters(LlamaConfig(num_hidden_layers=32, **LLAMA3_8B))
    assert mixture(llama3, STRING_1[:17], structures="units")[-1].total == 4_740_333_568


def test_grouped_attention_is_matched_by_its_accumulated_share():
    """One whole KV group goes from every layer each time a whole one is owed; every step costs what a layer does."""
    llama3 = layer_parameters(LlamaConfig(num_hidden_layers=32, **LLAMA3_8B))
    before, groups = llama3, []
    for branch, after in zip(STRING_1, mixture(llama3, STRING_1, min_groups=2), strict=True):
        if branch == "G":
            assert abs((before.total - after.total) / before.layer_total(0) - 1) < 0.002
        groups.append(after.sizes.kv_groups[0])
        before = after
    assert groups[0] == 8
    assert groups[-1] == 6
    assert all(a - b in (0, 1) for a, b in itertools.pairwise(groups))
    # the floor holds, and the MLP takes what the attention cannot give
    small = llama3.resized(WidthSizes((2,) * 32, llama3.sizes.units))
    step = width_step(small, small.layer_total(0) * 8, min_groups=2)
    assert step.sizes.kv_groups[0] == 2
    assert abs(step.removed - 8 * small.layer_total(0)) <= small.layers[0].unit * 32 / 2


def test_a_multiple_is_kept(llama2):
    step = width_step(llama2, 7 * llama2.layer_total(0), structures="units", multiple_of=256)
    assert step.sizes.units[0] % 256 == 0
    plan_sizes = BUDGETS["importance"](
        llama2,
        10**9,
        None,
        WidthSettings(structures="units", multiple_of=64, layer_importance=tuple(map(float, range(32)))),
    )
    assert all(n % 64 == 0 for n in plan_sizes.units)


PARTS = st.integers(1, 30)


@settings(deadline=None, max_examples=60)
@given(
    costs=st.tuples(PARTS, PARTS, st.integers(0, 9)),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 8), st.integers(4, 40)),
    share=st.floats(0, 0.6),
    structures=st.sampled_from(["both", "units"]),
    budget=st.sampled_from(sorted(BUDGETS)),
    seed=st.integers(0, 99),
)
def test_the_budget_is_met_to_half_a_structure(costs, shape, share, structures, budget, seed):
    group, unit, fixed = costs
    layers, groups, units = shape
    model = ModelParameters(
        (LayerParameters(group, unit, fixed),) * layers, WidthSizes((groups,) * layers, (units,) * layers), other=7
    )
    generator = torch.Generator().manual_seed(seed)
    scores = WidthScores(
        tuple(torch.rand(groups, generator=generator, dtype=torch.float64) for _ in range(layers)),
        tuple(torch.rand(units, generator=generator, dtype=torch.float64) for _ in range(layers)),
    )
    how = WidthSettings(structures=structures, layer_importance=tuple(torch.rand(layers, generator=generator).tolist()))
    # of what the units alone can give, so that every budget can reach it
    wanted = round(share * layers * (units - max(1, -(-units // 10))) * unit)
    sizes = BUDGETS[budget](model, wanted, scores, how)
    missed = abs(model.total - model.count(sizes) - wanted)
    step = layers if budget == "uniform" else 1
    if structures == "units" or budget == "global":
        assert 2 * missed <= max(unit, group if structures == "both" else 0) * step
    else:  # whole groups may overshoot where the units cannot take less than nothing
        assert 2 * missed <= max(unit, group) * layers
    assert all(1 <= n <= groups for n in sizes.kv_groups)
    assert all(1 <= n <= units for n in sizes.units)


def test_an_important_layer_loses_less():
    model = tiny_model("llama")
    plan = width_plan(
        model,
        random_scores(find_anatomy(model)),
        0.2,
        budget="importance",
        settings=WidthSettings(structures="units", layer_importance=(0.9, 0.1, 0.5, 0.5)),
    )
    kept = [len(plan.kept_units[i]) for i in range(4)]
    assert kept[0] > kept[2] == kept[3] > kept[1]


def test_one_threshold_empties_the_worst_layer_down_to_its_floor():
    model = tiny_model("llama")
    scores = random_scores(find_anatomy(model))
    units = (scores.units[0] + 5, scores.units[1], scores.units[2] + 5, scores.units[3] + 5)
    plan = width_plan(
        model,
        WidthScores(scores.kv_groups, units),
        0.18,
        budget="global",
        settings=WidthSettings(structures="units", floor=0.25),
    )
    assert len(plan.kept_units[1]) == 12  # a quarter of 48, although all of it scores lowest
    assert plan.kept_units[1] == keep_best(units[1], 12)


def test_a_uniform_plan_leaves_a_stock_model():
    model = tiny_model("llama")
    before = sum(p.numel() for p in model.parameters())
    apply_plan(model, width_plan(model, random_scores(find_anatomy(model)), 0.2, settings=WidthSettings("units")))
    assert type(model).__name__ == "LlamaForCausalLM"
    after = sum(p.numel() for p in model.parameters())
    assert abs(1 - after / before - 0.2) <= 4 * 3 * 32 / 2 / before


def test_the_best_stay_and_ties_keep_the_lower_index():
    assert keep_best(torch.tensor([1.0, 3, 3, 3, 0]), 2) == (1, 2)
    with pytest.raises(ValueError, match="Cannot keep 6 of 5"):
        keep_best(torch.zeros(5), 6)


def test_bad_input(llama2):
    model = tiny_model("llama")
    scores = random_scores(find_anatomy(model))
    with pytest.raises(ValueError, match=r"ratio must be between 0 and 1, got 1.5"):
        width_plan(model, scores, 1.5)
    with pytest.raises(ValueError, match=r"between 0 and [\d,]+ \(\d+\.\d% of all\) can go"):
        width_plan(model, scores, 0.9)
    with pytest.raises(ValueError, match=r"between 0 and [\d,]+ \(\d+\.\d% of all\) can go"):
        width_plan(model, scores, 0.9, budget="global")
    with pytest.raises(ValueError, match=r"Did you mean: 'uniform'"):
        width_plan(model, scores, 0.2, budget="unifrom")
    with pytest.raises(ValueError, match=r"needs one finite layer_importance per layer \(4\), got None"):
        width_plan(model, scores, 0.2, budget="importance")
    with pytest.raises(ValueError, match=r"in equal shares: between 0 and [\d,]+ \(\d+\.\d% of all\) can go"):
        width_step(llama2.resized(WidthSizes((32,) * 32, (8, *llama2.sizes.units[1:]))), 7 * 10**9)
    with pytest.raises(ValueError, match=r"score this very model"):
        width_plan(model, WidthScores(scores.kv_groups, tuple(u[:-1] for u in scores.units)), 0.2)
    with pytest.raises(ValueError, match=r"floor must be between 0 and 1, got 2"):
        WidthSettings(floor=2)
