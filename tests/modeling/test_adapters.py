"""An adapter that was trained on the dense model never lands on other layers of the pruned one."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_cka.modeling import load_adapter, translate_adapter
from hf_cka.modeling.plan import PruningPlan
from hf_cka.modeling.surgery import apply_plan
from tests.tiny import tiny_batch, tiny_model

DEPTH = {"removed_layers": (1,), "removed_attention": (2,)}


def pruned(**plan):
    return apply_plan(tiny_model("llama"), PruningPlan(num_layers=4, model_type="llama", **(plan or DEPTH)))


def adapter(model, folder, **config):
    """An adapter whose weights all differ, as after training."""
    wrapped = get_peft_model(model, LoraConfig(**{"target_modules": ["q_proj", "up_proj"], "r": 2, **config}))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    wrapped.save_pretrained(folder)
    return wrapped


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"layers_to_transform": [0, 1, 3], "layers_pattern": "layers"},
        {"target_modules": [f"model.layers.{i}.{m}" for i in range(4) for m in ("self_attn.q_proj", "mlp.up_proj")]},
    ],
    ids=["by suffix", "by layer number", "by full name"],
)
def test_translated_it_computes_what_the_merged_dense_model_pruned_does(tmp_path, config):
    merged = adapter(tiny_model("llama"), tmp_path / "a", **config).merge_and_unload()
    expected = apply_plan(merged, PruningPlan(num_layers=4, model_type="llama", **DEPTH)).eval()
    loaded = load_adapter(pruned(), tmp_path / "a").eval()
    with torch.no_grad():
        one, two = loaded(**tiny_batch()).logits, expected(**tiny_batch()).logits
    assert torch.allclose(one, two, atol=1e-4 * float(two.abs().max()))


def test_what_was_dropped_is_told(tmp_path):
    adapter(tiny_model("llama"), tmp_path / "a")
    told = translate_adapter(tmp_path / "a", pruned(), tmp_path / "b")
    assert all(".layers.1." in name or ".layers.2.self_attn." in name for name in told["dropped"])
    assert len(told["dropped"]) == 6
    assert len(told["kept"]) == 10
    assert not any(".layers.3." in name for name in told["kept"])


def test_an_adapter_of_the_pruned_model_is_loaded_as_it_is(tmp_path):
    model = pruned()
    model.name_or_path = "someone/pruned"
    trained = adapter(model, tmp_path / "a").eval()
    again = pruned()
    again.name_or_path = "someone/pruned"
    with torch.no_grad():
        loaded = load_adapter(again, tmp_path / "a").eval()
        assert torch.equal(loaded(**tiny_batch()).logits, trained(**tiny_batch()).logits)


def test_an_adapter_that_cannot_be_told_apart_is_refused(tmp_path):
    adapter(tiny_model("llama"), tmp_path / "a", layers_to_transform=[0, 1])
    with pytest.raises(ValueError, match=r"could mean either\. Pass trained_on='dense' or trained_on='pruned'"):
        load_adapter(pruned(), tmp_path / "a")
    assert load_adapter(pruned(), tmp_path / "a", trained_on="dense").peft_config["default"].layers_to_transform == [0]


def test_narrowed_projections_and_patterns_are_refused_and_nothing_is_written(tmp_path):
    adapter(tiny_model("llama"), tmp_path / "a")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj.*whose width was pruned"):
        translate_adapter(tmp_path / "a", pruned(kept_units={0: range(5)}), tmp_path / "b")
    adapter(tiny_model("llama"), tmp_path / "c", target_modules=r".*layers\.[13]\..*q_proj")
    with pytest.raises(ValueError, match="may name layers by number"):
        translate_adapter(tmp_path / "c", pruned(), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_model_that_was_not_pruned_needs_no_translation(tmp_path):
    adapter(tiny_model("llama"), tmp_path / "a")
    with pytest.raises(ValueError, match="no pruning record"):
        load_adapter(tiny_model("llama"), tmp_path / "a")


def test_the_written_config_is_plain_peft(tmp_path):
    adapter(tiny_model("llama"), tmp_path / "a")
    translate_adapter(tmp_path / "a", pruned(), tmp_path / "b")
    before, after = (json.loads((tmp_path / x / "adapter_config.json").read_text()) for x in "ab")
    assert set(before) == set(after)
