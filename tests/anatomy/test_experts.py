"""Whole experts as a width: found, proven against a router that never picks them, cut out, saved and loaded."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from hf_cka import PruningPlan, apply_plan, load_pruned, save_pruned
from hf_cka.anatomy import find_anatomy
from hf_cka.anatomy.experts import in_double, never_picked
from hf_cka.modeling.verification import verify_many
from tests.tiny import tiny_batch, tiny_model
from tests.world import SEQ2SEQ, world_model

GROUPED = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}
SPARSE = {"num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
TWO = {"num_hidden_layers": 2, "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]}
# one of every kind of router and of experts -> changes, (members, least, whether a stock config can say fewer)
TYPES = {
    "mixtral": ({}, (4, 2, True)),  # softmax over the chosen
    "qwen3_moe": ({"norm_topk_prob": True}, (4, 2, True)),  # softmax over all, shared out among the chosen
    "qwen2_moe": ({}, (4, 2, True)),  # with a shared expert behind a gate of its own
    "olmoe": ({"num_experts_per_tok": 1}, (4, 1, True)),  # softmax over all, and no sharing out
    "deepseek_v3": ({}, (4, 2, True)),  # sigmoid, a correction that is a buffer, dense first layers
    "gpt_oss": ({}, (4, 2, True)),  # biases of router and experts, interleaved and transposed
    "granitemoe": ({}, (4, 2, True)),
    "llama4_text": ({**TWO, "moe_layers": [0, 1]}, (4, 2, True)),  # every expert sees every token, times its weight
    "ernie4_5_moe": ({"moe_num_experts": 4}, (4, 2, True)),  # a correction with an axis too many
    "phimoe": ({}, (4, 2, True)),  # one choice after the other
    "lfm2_moe": (
        {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
        (4, 2, True),
    ),  # the correction belongs to the block
    "jetmoe": ({}, (4, 2, False)),  # two modules of experts; attention has experts too, of the same number
}


def expert_layers(anatomy):
    return [i for i in range(anatomy.num_layers) if anatomy.width(i, "experts")]


def masked(model, kept, batch):
    """The logits of the dense model whose routers never pick what is not kept."""
    anatomy = find_anatomy(model)
    with ExitStack() as stack, torch.no_grad():
        for i, stay in kept.items():
            width = anatomy.width(i, "experts")
            gone = [m for m in range(width.members) if m not in stay]
            stack.enter_context(never_picked(anatomy.layer(i), width, gone))
        return model(**batch).logits


def plan_of(anatomy, kept):
    return PruningPlan(anatomy.num_layers, anatomy.model_type, kept={"experts": kept})


@pytest.mark.parametrize("name", TYPES)
def test_experts_go_as_if_never_picked_and_reload(name, tmp_path):
    changes, (members, least, stock) = TYPES[name]
    batch = tiny_batch()
    model = world_model(name, **changes)
    anatomy = find_anatomy(model)
    layers = expert_layers(anatomy)
    width = anatomy.width(layers[0], "experts")
    assert (width.members, width.least) == (members, least)
    even = {i: tuple(range(1, members)) for i in layers}
    for rung, kept in (("stock", even), ("hf_cka", {**even, layers[-1]: tuple(range(least))})):
        model = world_model(name, **changes)
        want = masked(model, kept, batch)
        priced = plan_of(anatomy, kept).price(model).after.parameters
        pruned = apply_plan(model, plan_of(anatomy, kept))
        with torch.no_grad():
            got = pruned(**batch).logits
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        assert sum(p.numel() for p in pruned.parameters()) == priced
        saved = save_pruned(pruned, tmp_path / rung, verify=False)
        assert saved.rung.name == (rung if stock else "hf_cka")
        loaded = load_pruned(tmp_path / rung)
        assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in pruned.named_parameters()}
        with torch.no_grad():
            torch.testing.assert_close(loaded(**batch).logits, got, rtol=0, atol=1e-5)


def test_both_rungs_load_with_and_without_hf_cka(tmp_path):
    rungs = {"stock": (1, 2, 3), "hf_cka": (0, 2)}
    for rung, last in rungs.items():
        model = world_model("qwen3_moe")
        anatomy = find_anatomy(model)
        plan = plan_of(anatomy, {0: (0, 1, 3), 1: (0, 2, 3), 2: (1, 2, 3), 3: last})
        save_pruned(apply_plan(model, plan), tmp_path / rung, verify=False)
    for rung, proof in zip(rungs, verify_many([tmp_path / rung for rung in rungs]), strict=True):
        assert proof.passed, proof
        assert sum("loads" in check.name for check in proof.checks) == (1 if rung == "stock" else 2)


def test_double_precision_agrees_to_the_last_digits():
    model = world_model("mixtral").double()
    model.set_experts_implementation("eager")
    batch, kept = tiny_batch(), {1: (0, 3), 2: (1, 2, 3)}
    with in_double():
        want = masked(model, kept, batch)
        with torch.no_grad():
            got = apply_plan(model, plan_of(find_anatomy(model), kept))(**batch).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_a_router_that_chooses_groups_first_loses_whole_groups():
    model = world_model("deepseek_v3", **GROUPED)
    anatomy = find_anatomy(model)
    width = anatomy.width(2, "experts")
    assert (width.members, width.output.block, width.least) == (4, 2, 2)
    batch, kept = tiny_batch(), {2: (0, 2, 3)}
    want = masked(model, kept, batch)
    pruned = apply_plan(model, plan_of(anatomy, kept))
    gate = pruned.model.layers[2].mlp.gate
    assert (gate.num_experts, gate.num_group, len(gate.weight)) == (6, 3, 6)
    with torch.no_grad():
        torch.testing.assert_close(pruned(**batch).logits, want, rtol=0, atol=1e-5)


def test_fewer_than_the_router_picks_is_refused_before_anything_changes():
    model = world_model("mixtral")
    before = {n: p.clone() for n, p in model.named_parameters()}
    plan = plan_of(find_anatomy(model), {0: (0, 1, 2), 1: (3,)})
    with pytest.raises(ValueError, match=r"keeps 1 of 4 experts, but 2 must stay in layer 1: its router"):
        apply_plan(model, plan)
    assert type(model).__name__ == "MixtralForCausalLM"
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_plans_of_experts_compose_and_go_with_their_branch():
    model = world_model("mixtral")
    first = plan_of(find_anatomy(model), {1: (0, 1, 3)})
    pruned = apply_plan(model, first)
    width = find_anatomy(pruned).width(1, "experts")
    assert (width.members, width.least) == (3, 2)
    second = plan_of(find_anatomy(pruned), {1: (0, 2)})
    assert dict(first.then(second).kept["experts"]) == {1: (0, 3)}
    apply_plan(pruned, second)
    assert pruned.model.layers[1].mlp.experts.down_proj.shape[0] == 2
    with pytest.raises(ValueError, match="2 must stay"):
        apply_plan(pruned, plan_of(find_anatomy(pruned), {1: (0,)}))
    with pytest.raises(ValueError, match="name each in one of them"):
        PruningPlan(4, "mixtral", removed_mlp=(1,), kept={"experts": {1: (0, 1)}})


def test_experts_and_the_units_inside_them_narrow_together():
    model, batch = world_model("qwen3_moe"), tiny_batch()
    anatomy = find_anatomy(model)
    kept = {"experts": {1: (0, 2, 3)}, "units": {1: tuple(range(0, 16, 2))}}
    both = apply_plan(model, PruningPlan(4, "qwen3_moe", kept=kept))
    assert both.model.layers[1].mlp.experts.down_proj.shape == (3, 32, 8)
    other = apply_plan(world_model("qwen3_moe"), PruningPlan(4, "qwen3_moe", kept={"units": kept["units"]}))
    want = masked(other, {1: kept["experts"][1]}, batch)
    with torch.no_grad():
        torch.testing.assert_close(both(**batch).logits, want, rtol=0, atol=1e-5)
    assert anatomy.width(1, "units").members == 16


def test_the_balancing_loss_counts_the_experts_that_are_left():
    model = world_model("mixtral")
    pruned = apply_plan(model, plan_of(find_anatomy(model), dict.fromkeys(range(4), (0, 1, 2))))
    batch = tiny_batch()
    assert pruned(**batch, labels=batch["input_ids"], output_router_logits=True).aux_loss.isfinite()


def test_layers_that_keep_their_experts_say_why():
    apart = find_anatomy(world_model("switch_transformers", SEQ2SEQ, **SPARSE))
    widths = [w for stack in apart.stacks for layer in stack.layers for w in layer.widths if w.kind == "experts"]
    assert widths
    assert all("a module of its own" in w.reason for w in widths)
    assert "a module of its own" in apart.table()
    assert not any(
        w.kind == "experts" for layer in find_anatomy(tiny_model("llama")).stack.layers for w in layer.widths
    )
