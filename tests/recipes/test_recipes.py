"""Every recipe runs: two steps, on a tiny real model, from the command line's own entry."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

pytest.importorskip("trl")

RECIPES = Path(__file__).parents[2] / "recipes"


def recipe(name: str):
    return importlib.import_module(f"recipes.{name}")


@pytest.fixture
def instructions(tmp_path) -> str:
    """A jsonl file of prompt and completion."""
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Tom has {i} cats.", "completion": f" Tom is happy with {i} cats."} for i in range(24)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def test_recipes_are_short():
    for file in RECIPES.glob("*.py"):
        assert len(file.read_text().splitlines()) < 80, file.name


@pytest.mark.assets
def test_gradual_mop_sft(assets, instructions, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    base = str(assets / "models" / "stories260k_hf")
    out = tmp_path / "out"
    run = ["--model", base, "--dataset", instructions, "--ratio", "0.3", "--events", "2", "--output_dir", str(out)]
    recipe("gradual_mop_sft").main([*run, "--max_steps", "4", "--batch_size", "4", "--max_length", "32"])
    pruned = AutoModelForCausalLM.from_pretrained(out / "final")
    dense = AutoModelForCausalLM.from_pretrained(base)
    assert 1 - pruned.num_parameters() / dense.num_parameters() == pytest.approx(0.3, abs=0.01)
    assert json.loads((out / "final" / "config.json").read_text())["pruning"]["method"] == "mop"
    assert "| step |" in capsys.readouterr().out


@pytest.mark.assets
def test_cka_lora_sft(assets, instructions, tmp_path, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, out = str(assets / "models" / "stories260k_hf"), tmp_path / "out"
    run = ["--model", base, "--dataset", instructions, "--keep_ratio", "0.4", "--output_dir", str(out)]
    recipe("cka_lora_sft").main([*run, "--max_steps", "2", "--batch_size", "4", "--max_length", "32"])
    config = json.loads((out / "final" / "adapter_config.json").read_text())
    selection = json.loads((out / "selection.json").read_text())
    assert config["layers_to_transform"] == selection["layers"]
    assert len(selection["layers"]) == 2
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out / "final")
    assert any(p.abs().sum() > 0 for name, p in loaded.named_parameters() if "lora_B" in name), "it was trained"
    assert "cka" in capsys.readouterr().out


@pytest.mark.assets
@pytest.mark.parametrize("task", ["sst2", "rte"])
def test_glue_encoder(assets, task, tmp_path, capsys):
    from transformers import AutoTokenizer

    from tests.tiny import tiny_model

    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / "stories260k_hf")
    tokenizer.add_special_tokens({"pad_token": "<pad>", "cls_token": "<cls>"})
    model = tiny_model("bert", head="base", vocab_size=len(tokenizer), max_position_embeddings=256)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    files = {}
    for part in ("train", "dev"):
        rows = (assets / "glue" / f"{task}_{part}.jsonl").read_text().splitlines()[:40]
        files[part] = tmp_path / f"{part}.jsonl"
        files[part].write_text("\n".join(rows))
    run = ["--model", str(tmp_path / "model"), "--train", str(files["train"]), "--validation", str(files["dev"])]
    recipe("glue_encoder").main([*run, "--max_steps", "2", "--batch_size", "4", "--output_dir", str(tmp_path / "out")])
    config = json.loads((tmp_path / "out" / "final" / "adapter_config.json").read_text())
    assert len(config["layers_to_transform"]) == 2
    assert 0 not in config["layers_to_transform"], "the paper never adapts the first layer of an encoder"
    assert "accuracy 0." in capsys.readouterr().out


@pytest.mark.assets
def test_dpo_pruned(assets, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from hf_cka import PruningPlan, apply_plan, load_pruned, save_pruned

    base = str(assets / "models" / "stories260k_hf")
    plan = PruningPlan(num_layers=5, model_type="llama", removed_layers=(2,), removed_attention=(3,))
    save_pruned(apply_plan(AutoModelForCausalLM.from_pretrained(base), plan), tmp_path / "pruned", verify=False)
    rows = [{"prompt": f"Tom has {i}", "chosen": " cats.", "rejected": " dogs, and a bird."} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = ["--policy", str(tmp_path / "pruned"), "--reference", base, "--dataset", str(tmp_path / "rows.jsonl")]
    run += ["--max_steps", "2", "--batch_size", "4", "--max_length", "32", "--learning_rate", "1e-3"]
    recipe("dpo_pruned").main([*run, "--output_dir", str(tmp_path / "out")])
    before, after = load_pruned(tmp_path / "pruned"), load_pruned(tmp_path / "out" / "final")
    assert after.config.pruning["plan"] == before.config.pruning["plan"]
    changed = zip(before.parameters(), after.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in changed)


@pytest.mark.assets
def test_prune_then_recover_and_distill(assets, instructions, tmp_path):
    from transformers import AutoModelForCausalLM

    base = str(assets / "models" / "stories260k_hf")
    run = ["--dataset", instructions, "--max_steps", "2", "--batch_size", "4", "--max_length", "32"]
    first, second = tmp_path / "recovered", tmp_path / "distilled"
    recipe("prune_then_recover").main([*run, "--model", base, "--ratio", "0.2", "--output_dir", str(first)])
    pruned = AutoModelForCausalLM.from_pretrained(first)
    assert 1 - pruned.num_parameters() / AutoModelForCausalLM.from_pretrained(base).num_parameters() > 0.18
    given = ["--model", str(first), "--teacher", base, "--weight", "0.5", "--hidden_weight", "0.1"]
    recipe("distilled_recovery").main([*run, *given, "--output_dir", str(second)])
    before, after = (json.loads((folder / "config.json").read_text())["pruning"] for folder in (first, second))
    assert before["recovery"]["rank"] == 16
    assert after["plan"] == before["plan"]
    assert after["method"] == "width"
    assert after["recovery"]["distillation"] == {
        "weight": 0.5,
        "temperature": 1.0,
        "hidden_weight": 0.1,
        "cache_top_k": None,
    }
    assert [step.get("recovery", {}).get("rank") for step in after["history"]] == [16, 8]
