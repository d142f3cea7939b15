"""LoRAPrune on adapters for which the right answer is known by construction."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_cka.anatomy import find_anatomy
from hf_cka.pruning.config import PruningConfig
from hf_cka.pruning.criteria.base import ScoringContext, Structure, score
from hf_cka.pruning.criteria.depth import DEPTH
from hf_cka.pruning.criteria.groups import group_sums
from hf_cka.pruning.criteria.loraprune import _adapted, _importance
from hf_cka.pruning.criteria.width import WIDTH
from hf_cka.pruning.pruners import prune
from hf_cka.pruning.width_budgets import WidthSettings
from hf_cka.representations import resolve_pooling
from tests.modeling.test_carried import adapted
from tests.tiny import tiny_batch, tiny_model


def context(model, data=None):
    anatomy = find_anatomy(model)
    return ScoringContext(anatomy.model, anatomy, data or [tiny_batch()], resolve_pooling("mean", anatomy.kind))


def width(model, data=None):
    return score(WIDTH["loraprune"], context(model, data))


def small_steps(model, size=1e-5):
    """Adapters for which the estimate is exact where it is taken: B is zero and A spans the whole input."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
            if "lora_A" in name:
                parameter.zero_()
                parameter.fill_diagonal_(1.0)
    return model


def test_with_full_rank_the_estimate_is_the_gradient():
    """With A the identity and B zero, dB is the gradient of the weight and dA is zero: (gradient * weight)^2."""
    model = small_steps(adapted("llama", target_modules=["up_proj", "q_proj"], r=32, lora_alpha=32))
    given = context(model)
    importance = _importance(given, _adapted(given.anatomy))
    base = find_anatomy(model).layer(1).mlp.up_proj.base_layer
    base.weight.requires_grad_(True)
    batch = tiny_batch()
    logits = model(**batch).logits
    losses = []
    for row, length in zip(range(2), (12, 8), strict=True):
        losses.append(torch.nn.functional.cross_entropy(logits[row, : length - 1], batch["input_ids"][row, 1:length]))
    gradient = torch.autograd.grad(torch.stack(losses).mean(), base.weight)[0]
    torch.testing.assert_close(importance(1, "mlp.up_proj.weight"), (gradient * base.weight.detach()).square())


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "gpt_neox"])
def test_what_cannot_change_the_loss_goes_first(model_type):
    """A unit and a group whose output is thrown away, and on whose rows the adapters did nothing."""
    model = adapted(model_type)
    anatomy = find_anatomy(model)
    layer = anatomy.layer(1)
    with torch.no_grad():
        for kind, member in (("heads", 1), ("units", 5)):
            for part in anatomy.width(1, kind).slices:
                if not part.parameter.endswith(".weight"):
                    continue
                module, gone = layer.get_submodule(part.module), torch.tensor(part.indices([member]))
                if (part.axis == 0) != (model_type == "gpt2"):  # GPT-2 stores the transpose
                    module.lora_B["default"].weight[gone] = 0
                else:
                    module.lora_A["default"].weight[:, gone] = 0
                    module.base_layer.weight.index_fill_(part.axis, gone, 0)
    scores = width(model)
    assert (int(scores.units[1].argmin()), float(scores.units[1][5])) == (5, 0)
    assert (int(scores.kv_groups[1].argmin()), float(scores.kv_groups[1][1])) == (1, 0)
    assert (scores.units[1] > 0).sum() == 47


def test_a_layer_that_gives_nothing_goes_first():
    model = adapted("llama")
    layer = find_anatomy(model).layer(2)
    with torch.no_grad():
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.base_layer.weight.zero_()
            module.lora_B["default"].weight.zero_()
        for name, parameter in layer.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    structures = [Structure("layer", i) for i in range(4)]
    scores = score(DEPTH["loraprune"], context(model), structures)
    assert scores.weakest() == structures[2]
    halves = [Structure(kind, i) for i in range(4) for kind in ("attention", "mlp")]
    parts = score(DEPTH["loraprune"], context(model), halves)
    for i, whole in enumerate(structures):
        assert scores.of(whole) == pytest.approx(parts.importance[2 * i] + parts.importance[2 * i + 1])


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "gpt_neox", "bert"])
def test_groups_and_units_hold_every_weight_once(model_type):
    """For each layer the scores of its parts sum up to that of the layer."""
    model = adapted(model_type)
    batch = tiny_batch()
    if model_type == "bert":
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    scores = width(model, [batch])
    layers = score(DEPTH["loraprune"], context(model, [batch]), [Structure("layer", i) for i in range(4)])
    for i in range(4):
        total = scores.kv_groups[i].sum() + scores.units[i].sum()
        assert float(total) == pytest.approx(layers.importance[i], rel=1e-9)


def test_batch_size_does_not_matter_and_nothing_is_changed():
    model = adapted("llama")
    model.requires_grad_(False).train()
    before = copy.deepcopy(model.state_dict())
    batch = tiny_batch(batch=1)
    other = tiny_batch(batch=1, seed=1)
    whole = {key: torch.cat([batch[key], other[key]]) for key in batch}
    one, two = width(model, [batch, other]), width(model, [whole])
    for a, b in zip(one.units + one.kv_groups, two.units + two.kv_groups, strict=True):
        torch.testing.assert_close(a, b)
    assert model.training
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_prunes_an_adapted_model():
    units = WidthSettings(structures="units")
    config = PruningConfig(method="width", criterion="loraprune", ratio=0.2, width=units)
    only_mlp = adapted("llama", target_modules=["gate_proj", "up_proj", "down_proj"])
    for model in (adapted("llama"), only_mlp):
        result = prune(model, [tiny_batch()], config, progress=False)
        assert result.history.steps[-1].ratio == pytest.approx(0.2, abs=0.01)
        assert result.model.peft_config["default"].r == 3


def test_models_without_adapters_or_with_some_are_refused():
    with pytest.raises(ValueError, match=r"'loraprune' reads LoRA adapters, and LlamaForCausalLM carries none"):
        width(tiny_model("llama"))
    some = adapted("llama", target_modules=["up_proj"], layers_to_transform=[0, 2])
    with pytest.raises(ValueError, match=r"the MLP of layers \[1, 3\] carries none"):
        width(some)
    with pytest.raises(ValueError, match=r"layer 1, layer 3 carry none.*all-linear"):
        score(DEPTH["loraprune"], context(some), [Structure("layer", i) for i in range(4)])


def test_group_sums_ask_for_every_projection():
    asked = []
    anatomy = find_anatomy(tiny_model("llama"))
    groups, units = group_sums(anatomy, lambda layer, role: asked.append((layer, role)))
    assert len(asked) == len(set(asked)) == 4 * 7
    assert not any(values.any() for values in [*groups, *units])
