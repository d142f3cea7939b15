"""Pruning whole experts: criteria against plain loops, budgets that stop at what a router needs, LoRA in experts."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional

from hf_cka import CKALoraConfig, PruningConfig, PruningPlan, apply_plan, prune
from hf_cka.anatomy import find_anatomy
from hf_cka.anatomy.experts import never_picked
from hf_cka.pruning.criteria import EXPERTS
from hf_cka.pruning.criteria.base import ScoringContext, score
from hf_cka.pruning.width_budgets import WidthSettings, share_sizes, width_step
from hf_cka.pruning.width_parameters import LayerParameters, ModelParameters, WidthSizes, layer_parameters
from hf_cka.representations import Pooling
from tests.tiny import tiny_batch, tiny_model
from tests.world import world_model

WHOLE = WidthSettings(structures="experts")


def scores_of(model, name, batches=None):
    context = ScoringContext(model, find_anatomy(model), batches or [tiny_batch()], Pooling("last"))
    return score(EXPERTS[name], context).units


def used(model, layer, batch):
    """(weight of each expert, norm of what it gives), per token that is no padding: a plain loop."""
    block = model.model.layers[layer].mlp
    seen = []
    handle = block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    hidden = seen[0][batch["attention_mask"].bool()]
    with torch.no_grad():
        _, weights, chosen = block.gate(hidden)
        gates, norms = torch.zeros(len(hidden), 4), torch.zeros(len(hidden), 4)
        for token, x in enumerate(hidden):
            for weight, expert in zip(weights[token], chosen[token].tolist(), strict=True):
                gate, up = (block.experts.gate_up_proj[expert] @ x).chunk(2)
                out = block.experts.down_proj[expert] @ (functional.silu(gate) * up)
                gates[token, expert], norms[token, expert] = weight, out.norm()
    return gates.double(), norms.double()


def test_reap_and_the_expert_norm_are_what_a_plain_loop_gives():
    model, batch = world_model("qwen3_moe", norm_topk_prob=True), tiny_batch(pad="left")
    reap, norm = scores_of(model, "reap", [batch]), scores_of(model, "expert_norm", [batch])
    for layer in (0, 3):
        gates, norms = used(model, layer, batch)
        picked = (gates > 0).sum(dim=0)
        torch.testing.assert_close(reap[layer], (gates * norms).sum(dim=0) / picked.clamp_min(1), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(norm[layer], norms.sum(dim=0) / len(norms), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["gpt_oss", "llama4_text", "deepseek_v3"])
def test_batch_size_does_not_matter_and_what_adds_nothing_scores_nothing(name):
    model, batch = world_model(name), tiny_batch(batch=4)
    layer = find_anatomy(model).num_layers - 1
    module = next(m for n, m in find_anatomy(model).layer(layer).named_modules() if n.endswith(".experts"))
    with torch.no_grad():
        module.down_proj[2] = 0
        if hasattr(module, "down_proj_bias"):
            module.down_proj_bias[2] = 0
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(4)]
    for criterion in ("reap", "expert_norm"):
        whole, apart = scores_of(model, criterion, [batch]), scores_of(model, criterion, rows)
        for one, two in zip(whole, apart, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
        assert whole[layer][2] == 0
        assert whole[layer].max() > 0


def test_leave_one_out_is_the_divergence_of_the_pruned_model():
    model, batch = world_model("mixtral"), tiny_batch(batch=2)
    batch = {"input_ids": batch["input_ids"]}
    found = scores_of(model, "kl", [batch])
    with torch.no_grad():
        intact = model(**batch).logits.double().log_softmax(-1)
        for layer, member in ((0, 1), (3, 2)):
            kept = {layer: [m for m in range(4) if m != member]}
            pruned = apply_plan(world_model("mixtral"), PruningPlan(4, "mixtral", kept={"experts": kept}))
            changed = pruned(**batch).logits.double().log_softmax(-1)
            expected = (changed.exp() * (changed - intact)).sum(-1).mean()
            torch.testing.assert_close(found[layer][member], expected, rtol=1e-3, atol=1e-6)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), world_model("mixtral").parameters(), strict=True))


@pytest.mark.parametrize("criterion", EXPERTS)
@pytest.mark.parametrize("budget", ["uniform", "global"])
def test_every_criterion_prunes_within_the_budget(criterion, budget):
    model = world_model("mixtral")
    config = PruningConfig(method="width", criterion=criterion, budget=budget, ratio=0.13, width=WHOLE)
    result = prune(model, [tiny_batch()], config, progress=False)
    one = layer_parameters(find_anatomy(model), "experts").layers[0].unit
    removed = sum(4 - len(kept) for kept in result.plan.kept["experts"].values()) * one
    assert removed == result.history.parameters - sum(p.numel() for p in result.model.parameters())
    half = 2 * one if budget == "uniform" else one / 2  # half an expert in every layer, or of all
    assert abs(removed - 0.13 * result.history.parameters) <= half
    assert type(result.model).__name__ == ("MixtralForCausalLM" if budget == "uniform" else "PrunedMixtralForCausalLM")
    assert "experts left" in result.history.steps[-1].removed[0]
    assert result.model.config.pruning["widths_before"]["num_experts"] == [4] * 4


def test_budgets_stop_at_what_the_router_needs():
    model = world_model("mixtral")
    with pytest.raises(ValueError, match=r"39\.9% of all\) can go, while 2 experts \(as many as the router picks\)"):
        prune(model, [tiny_batch()], PruningConfig(method="width", ratio=0.5, width=WHOLE), progress=False)
    config = PruningConfig(method="width", ratio=0.5, budget="global", width=WHOLE)
    with pytest.raises(ValueError, match="as many as the router picks"):
        prune(model, [tiny_batch()], config, progress=False)
    parts = (LayerParameters(0, 10, 2, least=3),) * 2
    even, odd = WidthSizes((0, 0), (8, 8)), WidthSizes((0, 0), (8, 6))
    assert width_step(ModelParameters(parts, even, 5), 100, structures="experts").sizes.units == (3, 3)
    assert share_sizes(ModelParameters(parts, odd, 5), 80, WHOLE).units == (3, 3)
    with pytest.raises(ValueError, match="3 experts"):
        share_sizes(ModelParameters(parts, odd, 5), 90, WHOLE)


def test_wrong_settings_name_what_works_before_anything_runs():
    with pytest.raises(
        ValueError, match="'amp' scores heads and units; whole experts are scored by 'reap', 'expert_norm'"
    ):
        PruningConfig(method="width", criterion="amp", ratio=0.2, width=WHOLE)
    with pytest.raises(ValueError, match=r"structures='experts'"):
        PruningConfig(method="width", criterion="reap", ratio=0.2)
    with pytest.raises(ValueError, match="Did you mean: 'reap'"):
        PruningConfig(method="width", criterion="reepp", ratio=0.2, width=WHOLE)
    assert PruningConfig(method="width", ratio=0.2, width=WHOLE).criterion == "reap"
    assert PruningConfig(method="mop", ratio=0.2, width=WHOLE).width_criterion == "reap"
    with pytest.raises(ValueError, match="the layers have no experts"):
        prune(
            tiny_model("llama"), [tiny_batch()], PruningConfig(method="width", ratio=0.2, width=WHOLE), progress=False
        )
    with pytest.raises(ValueError, match="does not show what each of them adds. Use 'kl'"):
        scores_of(world_model("jetmoe"), "reap")


def test_a_mixture_takes_experts_for_its_width():
    config = PruningConfig(method="mop", ratio=0.38, path="LG", width=WHOLE)
    result = prune(world_model("mixtral"), [tiny_batch(batch=8)], config, progress=False)
    assert len(result.plan.removed_layers) == 1
    assert all(len(kept) < 4 for kept in result.plan.kept["experts"].values())


def test_a_token_costs_the_same_with_fewer_experts():
    model = world_model("mixtral")
    plan = PruningPlan(4, "mixtral", kept={"experts": dict.fromkeys(range(4), (0, 1, 2))})
    price = plan.price(model)
    router = 4 * 2 * 32
    assert price.before.decode_flops - price.after.decode_flops == router
    assert apply_plan(model, plan) is model
    assert PruningPlan(4, "mixtral").price(model).after == price.after


def test_adapters_in_attention_follow_and_adapters_in_experts_are_refused():
    from peft import LoraConfig, get_peft_model

    batch = tiny_batch()
    plan = PruningPlan(4, "mixtral", kept={"experts": {1: (0, 2, 3)}})
    adapted = get_peft_model(
        world_model("mixtral"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    anatomy = find_anatomy(adapted)
    with never_picked(anatomy.layer(1), anatomy.width(1, "experts"), [1]), torch.no_grad():
        want = adapted(**batch).logits
    pruned = apply_plan(adapted, plan)
    with torch.no_grad():
        torch.testing.assert_close(pruned(**batch).logits, want, rtol=0, atol=1e-5)
    config = CKALoraConfig(r=2, keep_ratio=0.5, calibration=[tiny_batch(batch=8)], adapt_experts=True)
    inside = get_peft_model(world_model("mixtral"), config)
    with pytest.raises(ValueError, match="target_parameters"):
        apply_plan(inside, PruningPlan(4, "mixtral", kept={"experts": {3: (0, 2, 3)}}))


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss"])
def test_lora_goes_into_experts_when_asked(name, tmp_path):
    from peft import PeftModel, get_peft_model

    batch = tiny_batch(batch=8)
    for experts in (False, True):
        config = CKALoraConfig(r=2, keep_ratio=0.5, calibration=[batch], adapt_experts=experts, init_lora_weights=False)
        adapted = get_peft_model(world_model(name), config)
        found = {n.split(".lora_A")[0] for n, _ in adapted.named_parameters() if ".lora_A" in n}
        assert any(".self_attn." in n for n in found)
        assert not any(n.endswith((".gate", ".router")) for n in found)
        assert any(".shared_expert." in n for n in found) == (name == "qwen2_moe")
        layers = {int(n.split(".layers.")[1].split(".")[0]) for n in found if ".experts" in n}
        assert layers == (set(config.selection.layers) if experts else set())
        folder = tmp_path / str(experts)
        adapted.save_pretrained(folder)
        stored = json.loads((folder / "adapter_config.json").read_text())
        assert "adapt_experts" not in stored
        assert bool(stored["target_parameters"]) == experts
        with torch.no_grad():
            torch.testing.assert_close(
                PeftModel.from_pretrained(world_model(name), folder)(**batch).logits,
                adapted(**batch).logits,
                rtol=0,
                atol=1e-6,
            )


def test_experts_that_are_not_there_are_not_adapted_in_silence():
    config = CKALoraConfig(r=2, calibration=[tiny_batch(batch=8)], adapt_experts=True)
    with pytest.raises(ValueError, match="have no experts"):
        config.resolve(tiny_model("llama"))
    with pytest.raises(ValueError, match="leave adapt_experts out"):
        CKALoraConfig(r=2, calibration=[], adapt_experts=True, target_parameters=["mlp.experts.down_proj"])
