"""What each recovery trains, exactly; that merging changes nothing; and what is refused before anything changes."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_cka import PruningPlan, apply_plan, find_anatomy, select_layers
from hf_cka.training.recovery import RecoveryConfig, finish_recovery, prepare_recovery, spread_ranks
from tests.tiny import tiny_batch, tiny_model
from tests.world import world_model

PLAN = {"removed_layers": (1,), "removed_mlp": (2,), "kept_units": {0: range(20)}}
BATCHES = [tiny_batch(seed=seed) for seed in range(4)]


def pruned(name="llama", head=None, **plan):
    return apply_plan(tiny_model(name, head), PruningPlan(num_layers=4, model_type=name, **(plan or PLAN)))


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapted(model):
    return {name.partition("base_model.model.")[2].partition(".lora_")[0] for name in trainable(model)}


def test_lora_trains_every_projection_that_is_left_and_nothing_else():
    model = prepare_recovery(pruned(), "lora")
    attention = {f"model.layers.{i}.self_attn.{p}_proj" for i in range(3) for p in "qkvo"}
    mlp = {f"model.layers.{i}.mlp.{p}_proj" for i in (0, 2) for p in ("gate", "up", "down")}
    assert adapted(model) == attention | mlp
    assert all("lora_" in name for name in trainable(model))


def test_cka_lora_trains_the_layers_that_select_layers_picks_on_the_pruned_model():
    chosen = select_layers(pruned(), BATCHES, 0.67, progress=False).layers
    model = prepare_recovery(pruned(), RecoveryConfig("cka_lora", keep_ratio=0.67), BATCHES)
    assert {int(name.split(".")[2]) for name in adapted(model)} == set(chosen)
    assert len(chosen) == 2


@pytest.mark.parametrize("method", ["lora", "cka_lora"])
def test_lora_goes_into_the_stack_that_was_pruned(method):
    model = world_model("bart", "AutoModelForSeq2SeqLM")
    stack = find_anatomy(model).on("encoder").stack.path
    model = apply_plan(model, PruningPlan(4, "bart", removed_layers=(1,), stack=stack))
    names = adapted(prepare_recovery(model, method, [tiny_batch(batch=8)]))
    assert names
    assert all(name.startswith(f"{stack}.") for name in names)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "bert", "modernbert", "opt"])
def test_norms_trains_norms_and_biases(name):
    plan = {"removed_layers": (2,)}
    model = prepare_recovery(pruned(name, **plan), "norms")
    matrices = {n for n, p in model.named_parameters() if p.ndim > 1}
    vectors = {n for n, p in model.named_parameters() if p.ndim == 1}
    assert trainable(model) == vectors
    assert not trainable(model) & matrices


def test_full_trains_everything():
    model = prepare_recovery(pruned(), "full")
    assert trainable(model) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("method", ["lora", "cka_lora", "norms", "full"])
@pytest.mark.parametrize(
    ("name", "head"), [("llama", None), ("gpt2", None), ("bert", "classification"), ("opt", None), ("phi3", None)]
)
def test_trained_and_finished_it_is_a_bare_model_that_computes_the_same(method, name, head):
    model = pruned(name, head)
    kind, names = type(model), [n for n, _ in model.named_parameters()]
    prepared = prepare_recovery(model, method, BATCHES)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in prepared.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
        expected = prepared.eval()(**tiny_batch()).logits
        before = kind(model.config).eval()(**tiny_batch()).logits
        finished = finish_recovery(prepared)
        got = finished.eval()(**tiny_batch()).logits
    assert type(finished) is kind
    assert [n for n, _ in finished.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in finished.parameters())
    assert torch.allclose(got, expected, atol=1e-5 * float(expected.abs().max()))
    assert not torch.allclose(got, before)
    assert not hasattr(finished, "peft_config")


def test_ranks_follow_block_influence_and_keep_their_sum():
    model = pruned()
    scores = select_layers(model, BATCHES, 1.0, criterion="block_influence", progress=False).scores
    prepared = prepare_recovery(model, RecoveryConfig("lora", rank=4, rank_budget="importance"), BATCHES)
    layers = prepared.base_model.model.model.layers
    ranks = [layer.self_attn.q_proj.r["default"] for layer in layers]
    scalings = {layer.self_attn.q_proj.scaling["default"] for layer in layers}
    assert sum(ranks) == 12
    assert ranks == spread_ranks(scores, 4)
    assert len(set(ranks)) > 1
    assert scalings == {2.0}


def test_ranks_of_layers_without_a_score():
    assert spread_ranks([None, 1.0, -2.0], 3) == [1, 7, 1]
    assert spread_ranks([None, 0.0], 3) == [3, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "lor"}, "Did you mean: 'lora'"),
        ({"method": "norms", "rank": 4}, r"rank=4 is for the method 'lora' and 'cka_lora'; 'norms' does not"),
        ({"method": "lora", "keep_ratio": 0.3}, "keep_ratio=0.3 is for the method 'cka_lora'"),
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"dropout": 1.0}, "dropout=1.0 must be"),
        ({"method": "cka_lora", "keep_ratio": 1.5}, "keep_ratio=1.5 must be"),
        ({"rank_budget": "uniforn"}, "Did you mean: 'uniform'"),
        ({"version": 2}, "reads version 1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        RecoveryConfig(**settings)


def test_refusals_leave_the_model_as_it_was():
    model = pruned()
    before = trainable(model)
    with pytest.raises(ValueError, match="pass batches"):
        prepare_recovery(model, "cka_lora")
    assert trainable(model) == before
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(ValueError, match=r"quantized \(first: model.layers.0.mlp.up_proj.weight\)"):
        prepare_recovery(model, "full")
    assert trainable(model) == before - {"model.layers.0.mlp.up_proj.weight"}
    with pytest.raises(ValueError, match="holds adapters already"):
        prepare_recovery(get_peft_model(pruned(), LoraConfig(target_modules=["q_proj"])), "norms")
