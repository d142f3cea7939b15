import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_cka import LayerSelection
from hf_cka.cli import app, demo_assets
from hf_cka.evaluation import ReportData


@pytest.fixture
def small_demo(stories, monkeypatch):
    """The demo on a 1 MB model, so that the suite can afford every step of it."""
    model, tokenizer = stories
    tokenizer.eos_token = "</s>"
    monkeypatch.setattr(demo_assets, "load_demo_model", lambda: (model, tokenizer, "stories260K, float32"))


@pytest.mark.assets
def test_every_step_runs_and_the_report_holds_what_was_printed(small_demo, tmp_path):
    done = CliRunner().invoke(app, ["demo", "--quick", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "FAIL" not in done.output
    data = ReportData.from_dict(json.loads((tmp_path / "report.json").read_text()))
    assert [section.title for section in data.sections] == [
        "What each layer does",
        "Adaptation",
        "Pruning",
        "What pruning changed",
        "The saved checkpoint",
    ]
    runs = data.sections[1].blocks[0].rows
    assert [row[0] for row in runs] == ["untuned", "all layers", "CKA half", "random half"]
    assert runs[2][2] == runs[3][2] < runs[1][2], "half the layers, fewer trainable parameters"
    assert LayerSelection.load(tmp_path).num_hidden_layers == 5
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert str(tmp_path) not in (tmp_path / "report.html").read_text(), "a report is shown to others"
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32)
    assert pruned.config.num_hidden_layers == 4
    assert all(check.passed for check in data.sections[4].blocks[0].checks)
