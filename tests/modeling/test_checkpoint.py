"""Checkpoints: the ladder, what is written, and what bad input gets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from hf_cka import find_anatomy
from hf_cka.modeling import CheckpointError, load_pruned, save_pruned, verify, verify_many
from hf_cka.modeling import checkpoint as room
from hf_cka.modeling.plan import PruningPlan
from hf_cka.modeling.probe import align
from hf_cka.modeling.structure import rung_of
from hf_cka.modeling.surgery import apply_plan
from tests.media import tiny_vit, tiny_whisper
from tests.tiny import tiny_batch, tiny_model

UNEVEN = {"removed_attention": (0,), "kept_units": {1: (0, 5, 7)}, "kept_groups": {2: (1,)}, "removed_mlp": (3,)}


def pruned(model_type="llama", plan=None, **changes):
    plan = PruningPlan(num_layers=4, model_type=model_type, **(UNEVEN if plan is None else plan))
    return apply_plan(tiny_model(model_type, **changes), plan)


def test_a_saved_checkpoint_is_verified_and_says_what_was_done(tmp_path):
    model = pruned(dtype="float32")
    record = {
        "method": "leave-one-out CKA",
        "settings": {"ratio": 0.2},
        "calibration": {"source": "topics", "samples": 8, "seed": 0, "hash": "ab"},
        "base_model": "someone/llama",
    }
    saved = save_pruned(model, tmp_path / "out", record=record, scores={"layers": [0.1, 0.2]})
    assert saved.verification.passed
    assert saved.rung.name == "hf_cka"
    assert "no attention" in str(saved)
    assert sorted(os.listdir(tmp_path)) == ["out"], "no scratch folder is left"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "hf_cka"
    assert config["architectures"] == ["PrunedLlamaForCausalLM"]
    removed = {entry["module"] for entry in config["hf_cka"]["removed"]}
    assert {"model.layers.0.self_attn", "model.layers.3.mlp"} <= removed
    assert config["hf_cka"]["uncached"] == [0]
    kept = {path: left for entry in config["hf_cka"]["narrowed"] for path, left in entry["kept"].items()}
    assert kept == {"model.layers.1": "0,5,7", "model.layers.2": "1"}
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_hf_cka.PrunedLlamaForCausalLM"
    pruning = config["pruning"]
    assert {k: pruning[k] for k in record} == record
    assert pruning["format_version"] == 2
    assert PruningPlan.from_dict(pruning["plan"]).removed_attention == (0,)
    assert pruning["widths_before"]["intermediate_size"] == [48] * 4
    assert pruning["widths_after"] == {"num_key_value_heads": [0, 2, 1, 2], "intermediate_size": [48, 3, 48, 0]}
    assert pruning["parameters_before"] > pruning["parameters_after"] == saved.parameters
    assert pruning["parameters_after"] == sum(v.numel() for v in load_file(tmp_path / "out/model.safetensors").values())
    scores = json.loads((tmp_path / "out" / "pruning_scores.json").read_text())
    assert scores == {"format_version": 1, "scores": {"layers": [0.1, 0.2]}}


def test_auto_classes_load_it_after_import_hf_cka(tmp_path):
    model = pruned()
    save_pruned(model, tmp_path / "out", verify=False)
    batch = tiny_batch()
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert type(loaded) is type(model)
        align(loaded)
        assert torch.equal(loaded(**batch).logits, expected.logits)
        base = AutoModel.from_pretrained(tmp_path / "out")
        align(base)
        assert torch.equal(base(**batch).last_hidden_state, expected.hidden_states[-1])
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (type(config), config.hf_cka) == (type(model.config), model.config.hf_cka)


def test_saving_again_with_plain_save_pretrained_keeps_everything(tmp_path):
    """What `Trainer` checkpoints and `push_to_hub` do."""
    save_pruned(pruned(), tmp_path / "one", verify=False)
    AutoModelForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert (tmp_path / "two" / "modeling_hf_cka.py").is_file()
    one, two = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two"))
    assert one == two
    assert all(result.passed for result in verify_many([tmp_path / "one", tmp_path / "two"]))


def test_stock_code_without_hf_cka_refuses_rung_two_loudly(tmp_path):
    save_pruned(pruned(), tmp_path / "out", verify=False)
    code = "import transformers; transformers.AutoModelForCausalLM.from_pretrained('out')"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert run.returncode != 0
    assert "trust_remote_code" in run.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["auto_map"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode != 0
    assert "model type `hf_cka`" in run.stderr


def test_a_llama_that_llama_rejects_becomes_a_mistral(tmp_path):
    model = pruned(
        plan={"kept_groups": dict.fromkeys(range(4), (0, 1, 3))},
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=4,
        tie_word_embeddings=True,
    )
    saved = save_pruned(model, tmp_path / "out")
    assert saved.rung.name == "relabel"
    assert saved.verification.passed
    assert any("last bit" in check.name for check in saved.verification.checks)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded).__name__ == "MistralForCausalLM"
    align(loaded)
    assert "layer_types" not in json.loads((tmp_path / "out" / "config.json").read_text())
    with torch.no_grad():
        assert torch.equal(loaded(**tiny_batch()).logits, model(**tiny_batch()).logits)


def test_pruning_a_pruned_checkpoint_extends_its_record(tmp_path):
    save_pruned(pruned(), tmp_path / "one", record={"method": "first", "base_model": "someone/llama"}, verify=False)
    model = load_pruned(tmp_path / "one")
    apply_plan(model, PruningPlan(num_layers=4, model_type="llama", removed_layers=(3,), kept_units={1: (0, 2)}))
    save_pruned(model, tmp_path / "two", record={"method": "second"}, verify=False)
    record = json.loads((tmp_path / "two" / "config.json").read_text())["pruning"]
    assert record["plan"] == {
        "version": 2,
        "model_type": "llama",
        "stacks": {
            "": {
                "model_type": "llama",
                "num_layers": 4,
                "removed_layers": [3],
                "removed_branches": {"attention": [0]},
                "kept": {"heads": {"2": "1"}, "units": {"1": "0,7"}},
            }
        },
    }
    assert record["base_model"] == "someone/llama"
    assert [step["method"] for step in record["history"]] == ["first", "second"]
    assert record["parameters_before"] == sum(p.numel() for p in tiny_model("llama").parameters())
    assert verify(tmp_path / "two").passed


def test_shards_and_another_dtype(tmp_path):
    model = pruned().to(torch.bfloat16)
    saved = save_pruned(model, tmp_path / "out", max_shard_size="20KB")
    assert saved.verification.passed
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert load_pruned(tmp_path / "out").dtype == torch.bfloat16


def test_the_folder_of_the_base_model_does_not_get_into_the_record(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "secret" / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "secret" / "base")
    apply_plan(model, PruningPlan(num_layers=4, model_type="llama", **UNEVEN))
    save_pruned(model, tmp_path / "out", verify=False)
    assert "secret" not in (tmp_path / "out" / "config.json").read_text()
    assert model.config.pruning["base_model"] == "base"


# ---- bad input ----


def test_what_is_there_is_not_overwritten_unasked(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="not empty. Pass overwrite=True"):
        save_pruned(pruned(), tmp_path / "out", verify=False)
    with pytest.raises(FileExistsError, match="holds no checkpoint"):
        save_pruned(pruned(), tmp_path / "out", overwrite=True, verify=False)
    save_pruned(pruned(), tmp_path / "good", verify=False)
    (tmp_path / "good" / "old.bin").write_text("")
    save_pruned(pruned(), tmp_path / "good", overwrite=True, verify=False)
    assert not (tmp_path / "good" / "old.bin").exists()
    assert sorted(os.listdir(tmp_path)) == ["good", "out"]


@pytest.mark.parametrize("when", ["writing", "verifying", "moving"])
def test_a_failure_leaves_the_old_checkpoint_and_no_other(tmp_path, monkeypatch, when):
    save_pruned(pruned(), tmp_path / "out", verify=False)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    model = pruned(plan={"removed_layers": (1,)})
    record = json.dumps(model.config.pruning)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    if when == "writing":
        monkeypatch.setattr(type(model), "save_pretrained", fail)
    elif when == "moving":
        monkeypatch.setattr(room, "_move_into_place", fail)
    else:
        monkeypatch.setattr(room, "verify_many", fail)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_pruned(model, tmp_path / "out", overwrite=True, verify=when == "verifying")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert os.listdir(tmp_path) == ["out"]
    if when == "writing":
        assert json.dumps(model.config.pruning) == record


def test_no_space_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(CheckpointError, match=r"No space left for the checkpoint: it needs 0\.00 GB"):
        save_pruned(pruned(), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_model_that_does_not_survive_saving_is_deleted(tmp_path):
    """A change to a module that no config knows about, as a user's own patch would be."""
    model = pruned(plan={"removed_layers": (1,)})
    model.model.layers[0].self_attn.scaling *= 2
    with pytest.raises(CheckpointError, match=r"FAILED  logits equal to the last bit: largest difference"):
        save_pruned(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_adapters_and_unknown_fields_are_refused(tmp_path):
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match=r"Unknown fields \['metod'\] in record; it may hold method"):
        save_pruned(pruned(), tmp_path / "out", record={"metod": "x"})
    with pytest.raises(ValueError, match="adapters"):
        save_pruned(get_peft_model(pruned(), LoraConfig(target_modules=["q_proj"])), tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.fixture
def tampered(tmp_path):
    """Three copies of a good checkpoint, each spoiled in one way."""
    save_pruned(pruned(), tmp_path / "good", verify=False)
    folders = {name: shutil.copytree(tmp_path / "good", tmp_path / name) for name in ("missing", "narrow", "config")}
    weights = load_file(tmp_path / "good" / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    save_file(
        {k: v for k, v in weights.items() if k != name}, folders["missing"] / "model.safetensors", {"format": "pt"}
    )
    narrow = {**weights, name: weights[name][:40].contiguous()}
    save_file(narrow, folders["narrow"] / "model.safetensors", {"format": "pt"})
    config = json.loads((folders["config"] / "config.json").read_text())
    units = next(e for e in config["hf_cka"]["narrowed"] if "model.layers.1" in e["kept"])
    units["kept"]["model.layers.1"] = "0,5,7-8"
    (folders["config"] / "config.json").write_text(json.dumps(config))
    return folders


def test_a_tampered_checkpoint_is_refused_and_fails_verification(tampered):
    with pytest.raises(CheckpointError, match=r"missing keys \['model\.layers\.2\.mlp\.up_proj\.weight'\]"):
        load_pruned(tampered["missing"])
    for name in ("narrow", "config"):
        with pytest.raises(CheckpointError, match="does not hold what its config says"):
            load_pruned(tampered[name])
    for name, result in zip(tampered, verify_many(list(tampered.values())), strict=True):
        assert not result.passed, name
        assert "FAILED" in str(result)


def test_the_command_reports_and_fails_with_the_checkpoint(tampered, tmp_path):
    from typer.testing import CliRunner

    from hf_cka.cli import app

    good = CliRunner().invoke(app, ["verify", str(tmp_path / "good"), "--json"])
    assert good.exit_code == 0
    assert json.loads(good.stdout)["passed"]
    bad = CliRunner().invoke(app, ["verify", str(tampered["missing"])])
    assert bad.exit_code == 1
    assert "model.layers.2.mlp.up_proj.weight" in bad.stdout
    none = CliRunner().invoke(app, ["verify", str(tmp_path / "nowhere")])
    assert none.exit_code == 2
    assert "no config.json" in none.output


def test_the_stock_class_named_directly_is_not_prevented_but_the_config_tells(tmp_path):
    """transformers fills what is missing with random numbers there; nothing of ours runs."""
    save_pruned(pruned(), tmp_path / "out", verify=False)
    model, report = LlamaForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, ignore_mismatched_sizes=True
    )
    assert report["missing_keys"]
    assert model.config.architectures == ["PrunedLlamaForCausalLM"]


# ---- importing ----


def test_import_is_light_and_registers_later(tmp_path):
    save_pruned(pruned(), tmp_path / "out", verify=False)
    code = """
import sys, hf_cka
heavy = {"torch", "transformers", "peft", "trl", "datasets", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained("out")).__name__)
"""
    for script in (code, "import transformers.models.auto\n" + code.replace("assert not heavy, heavy", "")):
        run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
        assert run.stdout.strip() == "PrunedLlamaForCausalLM", run.stderr


@pytest.mark.parametrize(
    ("make", "stack", "field"),
    [
        (tiny_vit, "layers", "intermediate_size"),  # its class token and positions are no experts
        (lambda: tiny_whisper()[0], "decoder", "decoder_ffn_dim"),
        (lambda: tiny_whisper()[0], "encoder", "encoder_ffn_dim"),
    ],
)
def test_units_of_pictures_and_sound_are_said_by_the_stock_config(make, stack, field):
    model = make()
    anatomy = find_anatomy(model, stack)
    kept = dict.fromkeys(range(2), range(0, 24, 2))
    plan = PruningPlan(2, anatomy.model_type, stack=anatomy.layers_path, kept_units=kept)
    small = apply_plan(model, plan)
    assert rung_of(small).name == "stock"
    assert getattr(small.config, field) == 12
