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
