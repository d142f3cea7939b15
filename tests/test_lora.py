import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model

from hf_cka import CKALoraConfig, LayerSelection, select_layers
from hf_cka.data import calibration
from tests.tiny import tiny_batch, tiny_model

ROOT = Path(__file__).parents[1]


def _batches():
    return [tiny_batch(4, seed=seed) for seed in range(4)]


def _adapted_layers(model) -> set[int]:
    return {int(name.split("layers.")[1].split(".")[0]) for name, _ in model.named_parameters() if "lora_A" in name}


def _generator():
    yield from _batches()


@pytest.fixture
def expected():
    return set(select_layers(tiny_model("llama"), _batches(), 0.5, progress=False).layers)


@pytest.mark.parametrize("calibration_kind", [_batches, _generator], ids=["list", "generator"])
def test_lazy_selection_in_an_unmodified_get_peft_model(expected, calibration_kind):
    config = CKALoraConfig(r=4, keep_ratio=0.5, calibration=calibration_kind())
    model = get_peft_model(tiny_model("llama"), config)
    assert _adapted_layers(model) == expected == set(config.selection.layers)
    assert len(model.base_model.targeted_module_names) == 2 * 7
    assert config.peft_type is PeftType.LORA
    assert copy.deepcopy(config) == config


def test_the_explicit_door_gives_the_same(expected):
    base = tiny_model("llama")
    config = CKALoraConfig.from_model(base, _batches(), r=4, keep_ratio=0.5)
    assert config.is_resolved
    assert config.peft_type is PeftType.LORA
    assert _adapted_layers(get_peft_model(base, config)) == expected
    plain = LoraConfig(r=4, **select_layers(tiny_model("llama"), _batches(), 0.5, progress=False).lora_kwargs())
    assert _adapted_layers(get_peft_model(tiny_model("llama"), plain)) == expected


def test_transformers_own_add_adapter(expected):
    from importlib.metadata import version

    from packaging.version import Version
    from transformers.integrations.peft import MIN_PEFT_VERSION

    if Version(version("peft")) < Version(MIN_PEFT_VERSION):  # transformers 5.24 asks for a peft that is not out yet
        pytest.skip(f"transformers refuses peft {version('peft')}: it wants {MIN_PEFT_VERSION}")
    model = tiny_model("llama")
    model.add_adapter(CKALoraConfig(r=4, keep_ratio=0.5, calibration=_batches()))
    assert _adapted_layers(model) == expected
    model.set_adapter("default")


def test_low_cpu_mem_usage_and_checkpointing(expected):
    base = tiny_model("llama")
    base.gradient_checkpointing_enable()
    config = CKALoraConfig(r=4, keep_ratio=0.5, calibration=_batches())
    model = get_peft_model(base, config, low_cpu_mem_usage=True)
    assert _adapted_layers(model) == expected
    assert all(p.is_meta for name, p in model.named_parameters() if "lora_" in name)


def test_a_second_plain_adapter_can_join():
    model = get_peft_model(tiny_model("llama"), CKALoraConfig(r=4, calibration=_batches()))
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("plain")
    model(**tiny_batch()).logits.sum().backward()
    # and a second lazy one, chosen by another rule
    model.add_adapter("late", CKALoraConfig(r=2, criterion="last", keep_ratio=0.25))
    assert model.peft_config["late"].selection.layers == (3,)
    model.delete_adapter("plain")


def test_a_lazy_adapter_on_a_plain_peft_model_says_what_to_do():
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    config = CKALoraConfig(r=2, keep_ratio=0.5, calibration=_batches())
    with pytest.raises(ValueError, match=r"call config.resolve\(model\)"):
        model.add_adapter("cka", config)
    assert set(model.peft_config) == {"default"}
    config.resolve(model)
    model.add_adapter("cka", config)
    assert set(model.peft_config) == {"default", "cka"}


@pytest.mark.parametrize(
    "variant",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"use_dora": True},
        {"use_rslora": True},
        {"lora_bias": True},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": "all-linear"},
        {"rank_pattern": {"q_proj": 2}},
    ],
    ids=str,
)
def test_variants_of_lora_stay_inside_the_chosen_layers(expected, variant, tmp_path):
    config = CKALoraConfig(r=4, keep_ratio=0.5, calibration=_batches(), **variant)
    model = get_peft_model(tiny_model("llama"), config)
    assert _adapted_layers(model) == expected
    model(**tiny_batch()).logits.sum().backward()
    model.save_pretrained(tmp_path)
    fresh = tiny_model("llama") if "init_lora_weights" not in variant else None
    if fresh is not None:
        again = PeftModel.from_pretrained(fresh, tmp_path)
        torch.testing.assert_close(again(**tiny_batch()).logits, model.eval()(**tiny_batch()).logits)


def test_eva_initialises_only_the_chosen_layers(expected):
    from peft import EvaConfig, initialize_lora_eva_weights

    config = CKALoraConfig(
        r=4, keep_ratio=0.5, calibration=_batches(), init_lora_weights="eva", eva_config=EvaConfig(rho=1.0)
    )
    model = get_peft_model(tiny_model("llama"), config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(model, _batches() * 3, show_progress_bar=False)
    assert _adapted_layers(model) == expected
    assert not any(p.is_meta for p in model.parameters())


def test_the_file_is_a_plain_lora_config(tmp_path):
    model = get_peft_model(tiny_model("llama"), CKALoraConfig(r=4, calibration=_batches(), selection_seed=3))
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA"
    assert set(written) <= set(LoraConfig().to_dict()), "PEFT warns of keys it does not know"
    assert LayerSelection.load(tmp_path) == model.peft_config["default"].selection
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is LoraConfig, "loading never selects again"


def test_it_loads_where_hf_cka_is_not_installed(tmp_path):
    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, CKALoraConfig(r=4, calibration=_batches(), task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "adapter")
    torch.save((tiny_batch(), model.eval()(**tiny_batch()).logits), tmp_path / "expected.pt")
    code = """
import sys, warnings
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_cka":
            raise ImportError("hf_cka is not installed")
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForCausalLM
from peft import AutoPeftModelForCausalLM
warnings.simplefilter("error", UserWarning)  # not FutureWarning, which PEFT itself earns from transformers
model = AutoPeftModelForCausalLM.from_pretrained("adapter")
batch, logits = torch.load("expected.pt")
assert torch.equal(model.eval()(**batch).logits, logits)
"""
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    adapter["base_model_name_or_path"] = "base"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={**os.environ}, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "UserWarning" not in done.stderr


def test_a_stored_selection_is_used_again_without_data(tmp_path, expected):
    file = tmp_path / "cka_selection.json"
    first = CKALoraConfig(r=4, keep_ratio=0.5, calibration=_batches(), selection_file=str(file))
    get_peft_model(tiny_model("llama"), first)
    assert LayerSelection.load(file) == first.selection
    again = CKALoraConfig(r=4, keep_ratio=0.5, selection_file=str(file))
    assert _adapted_layers(get_peft_model(tiny_model("llama"), again)) == expected
    other = CKALoraConfig(r=4, selection_file=str(file))
    with pytest.raises(ValueError, match="made on another model"):
        get_peft_model(tiny_model("llama", num_hidden_layers=6), other)


def test_unfinished_configs_fail_loudly(tmp_path):
    config = CKALoraConfig(r=4)
    with pytest.raises(ValueError, match="pass calibration batches"):
        get_peft_model(tiny_model("llama"), config)
    with pytest.raises(ValueError, match="not chosen yet"):
        config.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="not chosen yet"):
        _ = config.selection
    with pytest.raises(ValueError, match=r"remove layers_to_transform=\[1\]"):
        CKALoraConfig(calibration=_batches(), target_modules=["q_proj"], layers_to_transform=[1])


def test_a_failed_selection_leaves_the_model_as_it_was():
    base = tiny_model("llama")
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match="Calibration is empty"):
        get_peft_model(base, CKALoraConfig(r=4, calibration=[]))
    assert [name for name, _ in base.named_modules()] == names


def test_plain_peft_is_not_disturbed():
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.lora import LoraModel

    CKALoraConfig(r=4, calibration=_batches())
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is LoraModel
    assert PEFT_TYPE_TO_TUNER_MAPPING["LORA"] is LoraModel
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    assert _adapted_layers(model) == {0, 1, 2, 3}


def test_merging_and_classification_heads(expected):
    config = CKALoraConfig(r=4, keep_ratio=0.5, calibration=_batches(), task_type="SEQ_CLS")
    model = get_peft_model(tiny_model("bert", head="classification"), config)
    assert any("modules_to_save" in name for name, p in model.named_parameters() if p.requires_grad)
    merged = get_peft_model(tiny_model("llama"), CKALoraConfig(r=4, calibration=_batches())).merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_modules())


@pytest.mark.assets
def test_sft_trainer_chooses_trains_saves_and_reloads(assets, stories, tmp_path):
    """A real two-step SFT run with the model named by its path, as TRL scripts do it."""
    from datasets import Dataset
    from peft import AutoPeftModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    _, tokenizer = stories
    texts = [f"Once upon a time there was a {color} cat." for color in ("red", "blue", "black", "white", "green")] * 4
    trainer = SFTTrainer(
        model=str(assets / "models" / "stories260k_hf"),
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            report_to="none",
            use_cpu=True,
            logging_steps=1,
            save_steps=2,
        ),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
        peft_config=CKALoraConfig(r=4, keep_ratio=0.4, calibration=calibration(texts, tokenizer), pooling="mean"),
    )
    chosen = _adapted_layers(trainer.model)
    assert len(chosen) == 2
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    for folder in ("adapter", "checkpoint-2"):
        assert set(LayerSelection.load(tmp_path / folder).layers) == chosen
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert _adapted_layers(again) == chosen
