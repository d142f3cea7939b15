"""hf-cka prune: from a folder and a file to a checkpoint that loads; planned, interrupted, and refused."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_cka import PruningPlan
from hf_cka.cli.prune import prune_command
from hf_cka.pruning.history import FILE, PruningHistory

pytestmark = pytest.mark.assets


@pytest.fixture
def given(assets, tmp_path):
    lines = (assets / "lm" / "tinystories_a.jsonl").read_text().splitlines()[:24]
    file = tmp_path / "stories.jsonl"
    file.write_text("".join(json.dumps({"text": json.loads(line)["text"][:120]}) + "\n" for line in lines))
    folder = str(assets / "models" / "stories260k_hf")
    return ["-m", folder, "-d", str(file), "--device", "cpu", "--max-length", "32", "-o", str(tmp_path / "out")]


def call(*arguments):
    app = typer.Typer()
    app.command()(prune_command)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_a_checkpoint_that_stock_transformers_loads(given, tmp_path):
    done = call(*given, "--num-layers", 2)
    assert done.exit_code == 0, done.output
    assert "of those outside embeddings" in done.output
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert model.config.num_hidden_layers == 3
    assert not info["missing_keys"]
    record = json.loads((tmp_path / "out" / "config.json").read_text())["pruning"]
    assert record["method"] == "depth"
    assert record["settings"]["num_layers"] == 2
    assert record["calibration"]["samples"] == 24
    assert record["base_model"] == "stories260k_hf"
    scores = json.loads((tmp_path / "out" / "pruning_scores.json").read_text())["scores"]
    assert len(scores["steps"]) == 2
    assert not (tmp_path / "out.progress").exists()
    again = call(*given, "--num-layers", 2)
    assert "is not empty" in str(again.exception)


def test_a_dry_run_plans_and_writes_nothing(given, tmp_path):
    done = call(*given, "--method", "mop", "--ratio", 0.3, "--path", "LG", "--widths", "units", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "rung 'stock'" in done.output
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.progress").exists()


def test_json_for_programs(given):
    done = call(*given, "--paper", "shortgpt", "--num-layers", 1, "--dry-run", "--json")
    data = json.loads(done.stdout)
    assert data["history"]["config"]["criterion"] == "block_influence"
    assert data["parameters"][0] * (1 - data["ratio"]) == pytest.approx(data["parameters"][1])
    assert len(PruningPlan.from_dict(data["plan"]).removed_layers) == 1
    assert data["output"] is None


def test_an_interrupted_run_goes_on(given, tmp_path, monkeypatch):
    from hf_cka.pruning import history

    whole = json.loads(call(*given, "--num-layers", 3, "--dry-run", "--json").stdout)
    save = history.PruningHistory.save

    def save_and_die(self, folder):
        save(self, folder)
        if len(self.steps) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(history.PruningHistory, "save", save_and_die)
    assert call(*given, "--num-layers", 3).exit_code != 0
    assert not (tmp_path / "out").exists()
    assert len(PruningHistory.load(tmp_path / "out.progress").steps) == 2
    monkeypatch.undo()
    import hf_cka.pruning.depth as depth

    scored = []
    monkeypatch.setattr(depth, "score", lambda *a, real=depth.score: scored.append(1) or real(*a))
    monkeypatch.setattr("hf_cka.cli.prune._save", lambda *a: None)
    done = call(*given, "--num-layers", 3, "--json")
    assert json.loads(done.stdout)["plan"] == whole["plan"]
    assert len(scored) == 1  # of the third step alone
    assert not (tmp_path / "out.progress" / FILE).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ratio", "0.2", "--criterion", "ck"], "Did you mean: 'cka'"),
        (["--method", "mop", "--ratio", "0.2", "--path", "cosinus"], "Did you mean: 'cosine'"),
        (["--ratio", "0.2", "--paper", "short_gpt"], "Did you mean: 'shortgpt'"),
        ([], "give exactly one of them"),
        (["--ratio", "0.95"], "cannot be reached"),
    ],
)
def test_bad_options_are_named(given, options, message, tmp_path):
    assert message in str(call(*given, *options).exception)
    assert not (tmp_path / "out").exists()


def test_the_model_saved_is_the_model_pruned(given, tmp_path, monkeypatch):
    seen = {}

    def keep(result, *rest):
        seen["model"] = result.model

    monkeypatch.setattr("hf_cka.cli.prune._save", keep)
    assert call(*given, "--method", "width", "--ratio", 0.2, "--repair", "least_squares").exit_code == 0
    with torch.no_grad():
        assert seen["model"](torch.tensor([[1, 2, 3]])).logits.isfinite().all()
