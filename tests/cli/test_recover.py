"""hf-cka recover: from a pruned folder to a recovered one that keeps its record; going on; and what it refuses."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from hf_cka import PruningPlan, apply_plan, load_pruned, save_pruned
from hf_cka.cli.recover import recover_command

pytest.importorskip("trl")
pytestmark = pytest.mark.assets


@pytest.fixture
def given(assets, stories, tmp_path):
    model, tokenizer = stories
    plan = PruningPlan(num_layers=5, model_type="llama", removed_layers=(2,), removed_attention=(3,))
    save_pruned(apply_plan(model, plan), tmp_path / "pruned", tokenizer=tokenizer, verify=False)
    rows = [{"instruction": "Tell a story.", "input": "", "output": f"Tom has {i} cats."} for i in range(24)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    run = ["-m", tmp_path / "pruned", "-d", tmp_path / "rows.json", "-o", tmp_path / "out", "--device", "cpu"]
    return [*run, "--max-steps", 4, "--batch-size", 4, "--max-length", 32, "--learning-rate", 1e-3]


def call(*arguments):
    app = typer.Typer()
    app.command()(recover_command)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_a_distilled_recovery_keeps_the_record_of_the_pruning(given, assets, tmp_path):
    dense = assets / "models" / "stories260k_hf"
    answers = tmp_path / "answers"
    keep = ["--teacher-cache", answers, "--teacher-top-k", 16]
    done = call(*given, "--teacher", dense, "--weight", 0.5, *keep, "--json")
    assert done.exit_code == 0, done.exception
    before, after = load_pruned(tmp_path / "pruned"), load_pruned(tmp_path / "out")
    record = after.config.pruning
    assert record["plan"] == before.config.pruning["plan"]
    assert record["recovery"]["method"] == "lora"
    assert record["recovery"]["teacher"] == "stories260k_hf"
    assert record["recovery"]["distillation"]["weight"] == 0.5
    assert record["recovery"]["distillation"]["cache_top_k"] == 16
    assert list(answers.glob("*/*.safetensors"))
    assert str(answers) not in json.dumps(record)
    assert record["history"][-1]["recovery"] == record["recovery"]
    assert json.loads(done.stdout.splitlines()[-1])["recovery"] == record["recovery"]
    changed = [n for n, p in after.named_parameters() if not p.equal(dict(before.named_parameters())[n])]
    assert changed
    assert all("_proj" in name for name in changed)


def test_an_interrupted_recovery_goes_on(given, tmp_path):
    assert call(*given, "--save-steps", 2).exit_code == 0
    whole = load_pruned(tmp_path / "out").state_dict()
    (last := tmp_path / "out.checkpoints" / "checkpoint-4").rename(tmp_path / "elsewhere")
    done = call(*given, "--save-steps", 2, "--resume", "--overwrite")
    assert done.exit_code == 0, done.exception
    assert last.exists()
    resumed = load_pruned(tmp_path / "out").state_dict()
    assert all(whole[name].equal(resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "norm"], "Did you mean: 'norms'"),
        (["--method", "norms", "--rank", 4], "rank=4 is for the method"),
        (["--temperature", 2], "needs a teacher"),
        (["--resume"], "holds no checkpoint to go on from"),
        (["--text-column", "story"], "has no column 'story'"),
    ],
)
def test_bad_options_are_named(given, options, message, tmp_path):
    assert message in str(call(*given, *options).exception)
    assert not (tmp_path / "out").exists()


def test_rows_without_a_text_are_refused(given, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"height": 3}] * 8))
    assert "the columns are: height" in str(call(*given).exception)
