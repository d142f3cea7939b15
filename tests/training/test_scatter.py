"""An adapter trained on the pruned model, scattered to the dense one, does there what it did, and nothing elsewhere."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from hf_cka import PruningPlan, apply_plan
from hf_cka.training.scatter import scatter_adapter
from tests.tiny import tiny_batch, tiny_model

DEPTH = {"removed_layers": (1,), "removed_attention": (2,)}
WIDTH = {"removed_layers": (1,), "kept_units": {0: [3, 7, 20, 21]}, "kept_groups": {2: [1]}, "removed_mlp": (3,)}
HEADS = {"kept_groups": {0: [0, 3]}, "kept_units": {3: range(5, 30)}}


def trained(model, folder, **config):
    """An adapter whose weights all differ, as after training."""
    wrapped = get_peft_model(model, LoraConfig(**{"target_modules": "all-linear", "r": 2, **config})).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    wrapped.save_pretrained(folder)
    return wrapped


@pytest.mark.parametrize(
    ("family", "plan"), [("llama", DEPTH), ("llama", WIDTH), ("gpt2", HEADS), ("gpt_neox", HEADS), ("phi3", WIDTH)]
)
def test_on_the_kept_parts_it_computes_the_same(family, plan, tmp_path):
    plan = PruningPlan(num_layers=4, model_type=family, **plan)
    pruned = apply_plan(tiny_model(family).double(), plan)
    ranks = {"rank_pattern": {r".*layers\.0\.mlp.*": 3}, "alpha_pattern": {r".*layers\.0\.mlp.*": 5}}
    small = trained(pruned, tmp_path / "a", **(ranks if family == "llama" else {}))
    dense = tiny_model(family).double()
    told = scatter_adapter(tmp_path / "a", pruned, dense, tmp_path / "b")
    assert all(parameter.requires_grad for parameter in dense.parameters())
    whole = PeftModel.from_pretrained(dense, tmp_path / "b").eval()
    cut = apply_plan(whole, plan)
    with torch.no_grad():
        expected = small(**tiny_batch()).logits
        torch.testing.assert_close(cut(**tiny_batch()).logits, expected, rtol=1e-10, atol=1e-10)
    assert told["adapted"]
    assert bool(told["widened"]) == bool(plan.kept_units or plan.kept_groups)


def test_the_parts_that_were_removed_are_not_touched(tmp_path):
    plan = PruningPlan(num_layers=4, model_type="llama", **WIDTH)
    trained(apply_plan(tiny_model("llama"), plan), tmp_path / "a")
    before, dense = tiny_model("llama"), tiny_model("llama")
    scatter_adapter(tmp_path / "a", plan, dense, tmp_path / "b")
    merged = PeftModel.from_pretrained(dense, tmp_path / "b").merge_and_unload()
    for index, (old, new) in enumerate(zip(before.model.layers, merged.model.layers, strict=True)):
        change = {name: dict(new.named_parameters())[name] != p for name, p in old.named_parameters()}
        if index == 1:
            assert not any(c.any() for c in change.values())
        if index == 3:
            assert not any(c.any() for name, c in change.items() if "mlp" in name)
        if index == 0:
            rows = change["mlp.up_proj.weight"].any(dim=1).nonzero().flatten().tolist()
            columns = change["mlp.down_proj.weight"].any(dim=0).nonzero().flatten().tolist()
            assert rows == columns == [3, 7, 20, 21]
        if index == 2:
            assert change["self_attn.k_proj.weight"].any(dim=1).nonzero().flatten().tolist() == list(range(8, 16))


def test_what_cannot_be_scattered_is_refused_and_nothing_is_written(tmp_path):
    plan = PruningPlan(num_layers=4, model_type="llama", **DEPTH)
    pruned, dense = apply_plan(tiny_model("llama"), plan), tiny_model("llama")
    trained(apply_plan(tiny_model("llama"), plan), tmp_path / "dora", use_dora=True)
    trained(tiny_model("llama"), tmp_path / "dense")
    with pytest.raises(ValueError, match="Only plain LoRA.*use_dora=True"):
        scatter_adapter(tmp_path / "dora", pruned, dense, tmp_path / "out")
    with pytest.raises(ValueError, match=r"which the plan does not leave"):
        scatter_adapter(tmp_path / "dense", pruned, dense, tmp_path / "out")
    with pytest.raises(ValueError, match="has no pruning record"):
        scatter_adapter(tmp_path / "dense", dense, dense, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileExistsError):
        scatter_adapter(tmp_path / "dense", plan, dense, tmp_path / "dora")
