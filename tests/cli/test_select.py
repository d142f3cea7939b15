import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from hf_cka import LayerSelection
from hf_cka.cli import app


@pytest.fixture
def folder(assets):
    return str(assets / "models" / "stories260k_hf")


@pytest.fixture
def stories_file(assets, tmp_path):
    lines = (assets / "lm" / "tinystories_a.jsonl").read_text().splitlines()[:64]
    rows = [{"text": json.loads(line)["text"][: 60 + 3 * i]} for i, line in enumerate(lines)]
    file = tmp_path / "stories.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def _run(*args: str):
    return CliRunner().invoke(app, args)


@pytest.mark.assets
def test_the_yaml_trains_with_the_unmodified_trl_sft(folder, stories_file, tmp_path):
    """`hf-cka select` writes it, `trl sft --config` (TRL's own script) trains two steps with it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    output = tmp_path / "cka.yaml"
    done = _run("select", "-m", folder, "-d", stories_file, "-o", str(output), "--keep-ratio", "0.4", "--pooling=mean")
    assert done.exit_code == 0, done.output
    assert "2 of 5 layers chosen by cka" in done.output
    selection = LayerSelection.load(tmp_path / "cka.json")
    assert len(selection.layers) == 2
    command = [sys.executable, "-m", "trl.scripts.sft", "--config", str(output), "--output_dir", str(tmp_path / "out")]
    options = "--max_steps 2 --per_device_train_batch_size 2 --report_to none --use_cpu --lora_r 2 --max_length 64"
    trained = subprocess.run(
        [*command, *options.split(), "--eos_token", "</s>"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert trained.returncode == 0, trained.stderr[-3000:]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "out")
    assert sorted(model.base_model.targeted_module_names) == sorted(selection.module_names())


@pytest.mark.assets
def test_json_output_and_one_projection(folder, stories_file, tmp_path):
    output = tmp_path / "cka.yaml"
    done = _run("select", "-m", folder, "-d", stories_file, "-o", str(output), "--target-modules=q_proj", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout[done.stdout.index("{") :])["layers"] == list(
        LayerSelection.load(tmp_path / "cka.json").layers
    )
    settings = yaml.safe_load(output.read_text())
    assert settings["use_peft"] is True
    assert settings["datasets"] == [{"path": "json", "data_files": str(Path(stories_file).resolve())}]
    assert settings["lora_target_modules"] == [
        LayerSelection.load(tmp_path / "cka.json").target_regex(["q_proj"]),
    ]


@pytest.mark.assets
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--dataset", "missing.jsonl"], "There is no file 'missing.jsonl'"),
        (["--keep-ratio", "2"], "keep_ratio must be above 0 and at most 1, got 2.0"),
        (["--text-column", "body"], "no column 'body'; its columns are: text"),
        (["--target-modules", "query"], "matches no projection"),
        (["--output", "cka.txt"], "must end in .yaml"),
        (["--dtype", "float8"], "Unknown dtype 'float8'"),
        (["--model", "/nowhere/model"], "There is no folder '/nowhere/model'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(folder, stories_file, tmp_path, monkeypatch, extra, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    done = _run("select", "--model", folder, "--dataset", stories_file, *extra)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output
    assert sorted(tmp_path.iterdir()) == before


def test_a_pruned_checkpoint_is_loaded_with_its_head(tmp_path):
    from hf_cka import PruningPlan, apply_plan, save_pruned
    from hf_cka.cli.options import load_model
    from tests.tiny import tiny_model

    model = apply_plan(tiny_model("llama"), PruningPlan(num_layers=4, model_type="llama", removed_mlp=(1,)))
    save_pruned(model, tmp_path / "pruned", verify=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.AutoTokenizer.from_pretrained", lambda name, **options: None)
        loaded, _ = load_model(str(tmp_path / "pruned"), "cpu")
    assert type(loaded).__name__ == "PrunedLlamaForCausalLM"


def test_what_trl_does_not_train_is_for_python(tmp_path):
    from tests import media

    media.tiny_vit().save_pretrained(tmp_path / "model")
    media.vit_processor().save_pretrained(tmp_path / "model")
    media.write(tmp_path / "pictures", media.pictures(8))
    output = tmp_path / "cka.yaml"
    done = _run("select", "-m", str(tmp_path / "model"), "-d", str(tmp_path / "pictures"), "-o", str(output))
    assert done.exit_code == 0, done.output
    assert not output.exists()
    assert "trl sft" not in done.output
    assert "LayerSelection.load" in done.output
    assert len(LayerSelection.load(tmp_path / "cka.json").layers) == 1
