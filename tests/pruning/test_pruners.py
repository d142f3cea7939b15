"""prune(): every method, the ratio it ends on, its history, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_cka
from hf_cka import PruningConfig
from hf_cka.pruning.config import MOP_PATHS, PAPERS
from hf_cka.pruning.mixture import follow_path
from hf_cka.pruning.width_budgets import WidthSettings
from hf_cka.pruning.width_parameters import layer_parameters
from tests.pruning.runs import BATCHES, LAYER, MODEL, run, size
from tests.tiny import tiny_model

LLAMA2_7B = LlamaConfig(
    num_hidden_layers=32, hidden_size=4096, intermediate_size=11008, num_attention_heads=32, vocab_size=32000
)
LLAMA3_8B = LlamaConfig(
    num_hidden_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)


# ---- depth ----


@pytest.mark.parametrize("name", ["cka", "kl", "procrustes"])
def test_lazy_and_full_rescoring_remove_the_same(name):
    lazy = run(criterion=name, num_layers=5, model=tiny_model("llama", num_hidden_layers=14))
    full = run(criterion=name, num_layers=5, model=tiny_model("llama", num_hidden_layers=14), rescore="full")
    assert lazy.plan == full.plan
    assert [s.removed for s in lazy.history.steps] == [s.removed for s in full.history.steps]
    calls = [sum(step.layer_calls for step in result.history.steps) for result in (lazy, full)]
    assert calls[0] < 0.8 * calls[1]
    assert full.history.scored_share == 1
    assert lazy.history.scored_share == calls[0] / calls[1]


@pytest.mark.assets
def test_lazy_and_full_rescoring_remove_the_same_from_a_trained_model(stories):
    model, tokenizer = stories
    text = "Once upon a time there was a little girl who had a red ball and a big dog. "
    batches = hf_cka.calibration([text[i:] for i in range(16)], tokenizer, max_length=24)
    plans = [
        run(model=model, batches=batches, structures="sublayers", num_layers=4, rescore=how).plan
        for how in ("lazy", "full")
    ]
    assert plans[0] == plans[1]


def test_greedy_scores_against_the_network_as_it_is():
    one_by_one = run(num_layers=2, rescore="full")
    again = run(num_layers=1, model=run(num_layers=1).model)
    assert one_by_one.history.steps[1].score == pytest.approx(again.history.steps[0].score, rel=1e-5)


@pytest.mark.parametrize("structures", ["layers", "sublayers", "attention", "mlp"])
@pytest.mark.parametrize("reach", ["nearest", "at_least", "at_most"])
def test_the_ratio_is_met_to_half_of_the_smallest_structure(structures, reach):
    ratio = {"layers": 0.4, "sublayers": 0.37, "attention": 0.2, "mlp": 0.25}[structures]
    result = run(ratio=ratio, structures=structures, reach=reach, steps=2)
    total = size(MODEL)
    assert size(result.model) == result.history.steps[-1].parameters
    removed = total - size(result.model)
    smallest = {"layers": LAYER, "sublayers": 4128, "attention": 4128, "mlp": 4640}[structures]
    off = removed - ratio * total
    if reach == "nearest":
        assert abs(off) <= smallest / 2
    else:
        assert 0 <= (off if reach == "at_least" else -off) < smallest


def test_the_history_shows_every_metric_and_every_rank():
    step = run(method="consensus", num_layers=1).history.steps[0]
    ranks = {name: table for name, table in step.details.items() if name.startswith("rank of ")}
    assert len(ranks) == 7  # 12 samples are too few for CCA, as a note says
    assert any("cca: undefined" in note for note in step.notes)
    for layer, score in step.scores.items():
        assert score == sum(table[layer] for table in ranks.values())
    assert set(run(num_layers=1).history.steps[0].details) == {"cka", "cka_biased", "standard_error"}


def test_all_that_can_go_goes():
    result = run(ratio=0.8042, criterion="last")
    assert result.model.config.num_hidden_layers == 1
    assert len(run(num_layers=7, criterion="random").plan.removed_layers) == 7


def test_steps_score_a_share_at_a_time():
    result = run(num_layers=5, steps=2)
    assert [len(step.removed) for step in result.history.steps] == [2, 3]
    assert len(result.plan.removed_layers) == 5
    once = run(num_layers=3, steps=1, criterion="last")
    assert once.plan.removed_layers == (5, 6, 7)


def test_a_run_of_layers_goes_together():
    result = run(num_layers=3, steps=1, contiguous=True, criterion="angular")
    layers = result.plan.removed_layers
    assert layers == tuple(range(layers[0], layers[0] + 3))
    by_ratio = run(ratio=0.35, steps=1, contiguous=True)
    assert len(by_ratio.plan.removed_layers) == 3


def test_protected_layers_stay():
    free = run(criterion="last", num_layers=3).plan.removed_layers
    assert free == (5, 6, 7)
    assert run(criterion="last", num_layers=3, protect=(-1, 5)).plan.removed_layers == (3, 4, 6)
    assert run(criterion="third_to_last", num_layers=3).plan.removed_layers == (3, 4, 5)


def test_reversed_removes_the_most_important():
    scores = run(num_layers=1, rescore="full").history.steps[0].scores
    worst = max(scores, key=scores.__getitem__)
    assert run(num_layers=1, order="reversed").history.steps[0].removed == (worst,)


@pytest.mark.parametrize("family", ["gemma2", "bert", "gpt2", "modernbert", "phi"])
def test_other_families_go_through(family):
    result = run(model=tiny_model(family), ratio=0.2, structures="sublayers")
    with torch.no_grad():
        assert result.model(**BATCHES[0]).logits.isfinite().all()
    assert run(model=tiny_model(family), num_layers=1).model.config.num_hidden_layers == 3


# ---- width and mixtures ----


def test_width_and_amp_narrow_all_layers_alike():
    result = run(method="amp", ratio=0.25, width=WidthSettings("units"))
    assert abs(result.history.steps[-1].ratio - 0.25) * size(MODEL) <= 8 * 96 / 2
    assert result.model.config.intermediate_size == 23
    assert type(result.model).__name__ == "LlamaForCausalLM"
    result = run(method="amp", ratio=0.25)
    assert abs(result.history.steps[-1].ratio - 0.25) * size(MODEL) <= 8 * 96 / 2
    assert run(method="width", criterion="amp", ratio=0.25).plan == result.plan
    assert run(method="amp", ratio=0.25, order="reversed").plan != result.plan
    above, below = (
        run(method="amp", ratio=0.25, reach=side).history.steps[-1].ratio for side in ("at_least", "at_most")
    )
    assert below <= 0.25 <= above


def test_repair_lowers_what_width_pruning_costs():
    def divergence(model):
        with torch.no_grad():
            p, q = (m(**BATCHES[0]).logits.log_softmax(-1) for m in (MODEL, model))
        return float((p.exp() * (p - q)).sum(-1).mean())

    broken, repaired = (run(method="width", ratio=0.2, repair=how).model for how in (None, "least_squares"))
    assert size(broken) == size(repaired)
    assert divergence(repaired) < divergence(broken)


@pytest.mark.parametrize("path", ["cka", "cosine", "kl", "perplexity", "random", "LGGL"])
def test_a_mixture_meets_the_ratio_by_every_path(path):
    result = run(method="mop", ratio=0.33, path=path)
    assert abs(result.history.steps[-1].ratio - 0.33) * size(MODEL) <= 8 * 96 / 2
    if path in ("cka", "cosine", "kl", "perplexity"):
        for step in result.history.steps[:-1]:
            assert step.score == max(step.branches.values())
            assert step.branch == max(step.branches, key=step.branches.__getitem__)
    if path == "LGGL":
        assert [s.branch for s in result.history.steps[:3]] == ["depth", "width", "width"]


def test_branches_cost_the_same():
    depth, width = run(method="mop", num_layers=2, path="LG").history.steps
    assert size(MODEL) - depth.parameters == LAYER
    assert abs(depth.parameters - width.parameters - LAYER) <= 7 * 96 / 2


def test_the_arithmetic_of_the_strings_is_that_of_the_models_they_make():
    settings = PAPERS["mop"]["width"]
    for path in MOP_PATHS:
        result = run(PruningConfig.paper("mop", path=path, num_layers=5))
        weights = follow_path(layer_parameters(MODEL), path[:5], settings)
        assert [step.parameters for step in result.history.steps] == [w.total for w in weights]
        assert [step.branch for step in result.history.steps] == [
            {"L": "depth", "G": "width"}[letter] for letter in path[:5]
        ]


def test_the_released_arithmetic_on_the_papers_models():
    """METHODS of MoP: LLaMA-2-7B after 7, 11 and 15 steps of string 1, LLaMA-3-8B with the MLP alone."""
    llama2 = layer_parameters(LLAMA2_7B)
    weights = follow_path(llama2, MOP_PATHS[0], PAPERS["mop"]["width"])
    assert [f"{1 - weights[n - 1].total / llama2.total:.2%}" for n in (7, 11, 15)] == ["20.08%", "30.56%", "40.39%"]
    last = weights[14]
    assert (len(last.layers), last.sizes.kv_groups[0], last.sizes.units[0]) == (23, 26, 8848)
    assert last.total == 4_017_090_560
    llama3 = follow_path(layer_parameters(LLAMA3_8B), MOP_PATHS[0], WidthSettings(structures="units"))
    assert llama3[16].total == 4_740_333_568


def test_a_whole_paper_run_on_the_meta_device():
    """String 1 on the shape of LLaMA-2-7B: plans and surgery, without weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LLAMA2_7B)
    config = PruningConfig.paper("mop", path=MOP_PATHS[0], ratio=0.2, width_criterion="random")
    result = run(config, model=model, batches=[])
    assert [step.branch[0] for step in result.history.steps] == list("dwwdddw")
    assert f"{1 - size(result.model) / size(model):.2%}" == "20.08%"
    assert result.plan.removed_layers == (26, 27, 28, 29)


def test_everything_keeps_the_child_nearer_to_its_parent_and_its_tuning():
    tuned = []

    def tune(model):
        tuned.append(size(model))
        with torch.no_grad():
            model.lm_head.weight.mul_(1.01)

    config = PruningConfig(
        method="everything", num_layers=2, criterion="cka", width_criterion="amp", width=WidthSettings("units")
    )
    result = run(config, tune=tune)
    assert len(tuned) == 4
    assert all(set(step.branches) == {"depth", "width"} for step in result.history.steps)
    torch.testing.assert_close(result.model.lm_head.weight, MODEL.lm_head.weight * 1.01**2)
    mop = run(method="mop", num_layers=1, tune=tune)
    torch.testing.assert_close(mop.model.lm_head.weight, MODEL.lm_head.weight)


def test_ties_go_to_depth(monkeypatch):
    from hf_cka.pruning import mixture

    monkeypatch.setitem(mixture.RULES, "cka", lambda parent, child: 0.5)
    assert [s.branch for s in run(method="mop", num_layers=2).history.steps] == ["depth", "depth"]


# ---- bad input ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.2, "method": "depht"}, "Unknown pruning method 'depht'. Did you mean: 'depth'"),
        ({"ratio": 0.2, "criterion": "block_inf"}, "Did you mean: 'block_influence'"),
        ({"ratio": 0.2, "method": "mop", "path": "cosin"}, "Did you mean: 'cosine'"),
        ({"ratio": 0.2, "method": "width", "criterion": "apm"}, "Unknown width criterion 'apm'. Did you mean: 'amp'"),
        ({"ratio": 0.2, "repair": "least_square"}, "Did you mean: 'least_squares'"),
        ({"ratio": 1.2}, "ratio=1.2 must lie between 0 and 1"),
        ({}, "give exactly one of them"),
        ({"ratio": 0.2, "num_layers": 3}, "give exactly one of them"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"ratio": 0.2, "contiguous": True}, "needs steps"),
        ({"ratio": 0.2, "path": "cka"}, "method='depth' does not use path='cka'"),
        ({"num_layers": 2, "method": "width"}, "method='width' does not use num_layers=2"),
        ({"ratio": 0.2, "pooling": "men"}, "Unknown pooling 'men'. Did you mean: 'mean'"),
        ({"ratio": 0.2, "version": 2}, "version 2"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError) as error:
        PruningConfig(**settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.95}, r"ratio=0.95 cannot be reached .* from 0.1149 .* to 0.8042"),
        ({"ratio": 0.001}, r"ratio=0.001 cannot be reached"),
        ({"num_layers": 8}, "num_layers=8: at most 7 of the model's layers"),
        ({"num_layers": 16, "structures": "sublayers"}, "num_layers=16: at most 1[45] of"),
        ({"num_layers": 1, "protect": (9,)}, r"protect=\[9\] is out of range: the model has 8 layers"),
        ({"num_layers": 1, "protect": tuple(range(8))}, "Nothing can be removed: of 8 layers, 8 are protected"),
        ({"num_layers": 7, "criterion": "third_to_last"}, "Nothing is left that 'third_to_last' would remove after 6"),
        ({"ratio": 0.95, "method": "width"}, "can go"),
        ({"ratio": 0.95, "method": "mop"}, "ratio=0.95 cannot be reached: from 0 to 0.90"),
        ({"ratio": 0.5, "method": "mop", "path": "LG"}, "path='LG' has 2 letters and removes 0.2"),
        ({"num_layers": 3, "method": "mop", "path": "LG"}, "too few for num_layers=3"),
    ],
)
def test_what_cannot_be_reached_is_an_error_that_names_the_range(settings, message):
    with pytest.raises(ValueError, match=message):
        run(**settings)


def test_what_surgery_refuses_is_refused_before_anything_is_scored(monkeypatch):
    from peft import IA3Config, get_peft_model

    from hf_cka.pruning import depth

    monkeypatch.setattr(depth, "score", lambda *a: pytest.fail("it was scored"))
    adapted = get_peft_model(tiny_model("llama"), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="is of type IA3; only LoRA"):
        run(num_layers=1, model=adapted)


def test_layers_that_compute_with_their_index_keep_it():
    model = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    result = run(num_layers=1, model=model)
    (gone,) = result.plan.removed_layers
    model.transformer.h[gone].forward = lambda hidden, *args, **kwargs: hidden
    try:
        with torch.no_grad():
            torch.testing.assert_close(result.model(**BATCHES[0]).logits, model(**BATCHES[0], use_cache=False).logits)
    finally:
        del model.transformer.h[gone].forward


def test_data_that_cannot_be_used():
    with pytest.raises(ValueError, match="needs calibration batches"):
        run(num_layers=1, batches=[])
    with pytest.raises(ValueError, match="'consensus_by_class' needs labels"):
        run(num_layers=1, criterion="consensus_by_class")
    with pytest.raises(ValueError, match="tune is for methods that compare branches"):
        run(num_layers=1, tune=lambda model: None)
    assert run(num_layers=1, criterion="random", batches=[]).plan.removed_layers
