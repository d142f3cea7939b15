"""Checkpoints of the first format load for ever, and compute what they did."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from hf_cka.modeling import load_pruned, save_pruned
from hf_cka.modeling.plan import PruningPlan
from hf_cka.modeling.probe import align
from hf_cka.modeling.surgery import apply_plan
from hf_cka.pruning.history import recorded_plan
from tests.tiny import ENCODERS, tiny_batch, tiny_config, tiny_model

# model type -> the fields of its config that count heads and units
FIELDS = {
    "llama": (("num_attention_heads", "num_key_value_heads"), "intermediate_size"),
    "gemma2": (("num_attention_heads", "num_key_value_heads"), "intermediate_size"),
    "phi3": (("num_attention_heads", "num_key_value_heads"), "intermediate_size"),
    "olmo2": (("num_attention_heads", "num_key_value_heads"), "intermediate_size"),
    "gpt2": (("n_head",), "n_inner"),
    "gpt_neox": (("num_attention_heads",), "intermediate_size"),
    "opt": (("num_attention_heads",), "ffn_dim"),
    "bert": (("num_attention_heads",), "intermediate_size"),
    "distilbert": (("n_heads",), "hidden_dim"),
    "deberta-v2": (("num_attention_heads",), "intermediate_size"),
    "modernbert": (("num_attention_heads",), "intermediate_size"),
}
PLAN = {"removed_attention": (0,), "kept_units": {1: range(1, 48, 2)}, "kept_groups": {2: (1,)}, "removed_mlp": (3,)}


def first_format(model_type, folder):
    """A folder as the first format wrote it: the dense config, and per layer what it has less. Returns its model."""
    model = apply_plan(tiny_model(model_type), PruningPlan(4, model_type, **PLAN))
    heads, units = FIELDS[model_type]
    grouped = len(heads) > 1
    table = {
        "0": {"skip": ["attention"]},
        "1": {units: 24},
        "2": dict(zip(heads, (2, 1) if grouped else (1,), strict=True)),
        "3": {"skip": ["mlp"]},
    }
    plan = {
        "version": 1,
        "model_type": model_type,
        "num_layers": 4,
        "removed_layers": [],
        "removed_attention": [0],
        "removed_mlp": [3],
        "kept_groups": {"2": "1"},
        "kept_units": {"1": ",".join(map(str, range(1, 48, 2)))},
    }
    name = type(model).__name__
    config = tiny_config(model_type, dtype="float32").to_dict() | {
        "model_type": "hf_cka",
        "base_model_type": model_type,
        "architectures": [name],
        "auto_map": {"AutoConfig": f"modeling_hf_cka.{name}Config", "AutoModel": f"modeling_hf_cka.{name}"},
        "allow_global_per_layer_attribute_access": True,
        "hf_cka_layout": {"name": model_type, "attention": "elsewhere"},  # no name in it is followed
        "per_layer_config": table,
        "pruning": {
            "format_version": 1,
            "hf_cka_version": "0.1.0",
            "plan": plan,
            "parameters_before": sum(p.numel() for p in tiny_model(model_type).parameters()),
            "parameters_after": sum(p.numel() for p in model.parameters()),
            "widths_before": {"num_key_value_heads": [2 if grouped else 4] * 4, "intermediate_size": [48] * 4},
        },
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    stored = {}
    for key, value in model.state_dict().items():  # a tied weight once, under its first name
        stored.setdefault(value.data_ptr(), (key, value.contiguous()))
    save_file(dict(stored.values()), folder / "model.safetensors", {"format": "pt"})
    return model


def logits(model):
    align(model)
    with torch.no_grad():
        return model(**tiny_batch()).logits


@pytest.mark.parametrize("model_type", FIELDS)
def test_it_loads_and_computes_the_same(model_type, tmp_path):
    expected = first_format(model_type, tmp_path / "old")
    loaded = load_pruned(tmp_path / "old")
    assert type(loaded) is type(expected)
    assert torch.equal(logits(loaded), logits(expected))
    assert recorded_plan(loaded) == PruningPlan(4, model_type, **PLAN)
    if model_type not in ENCODERS:
        batch = tiny_batch(pad="left")
        common = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}
        assert torch.equal(loaded.generate(**batch, **common), loaded.generate(**batch, **common, use_cache=False))


def test_pruned_further_it_is_saved_in_the_second_format(tmp_path):
    first_format("llama", tmp_path / "old")
    model = apply_plan(load_pruned(tmp_path / "old"), PruningPlan(4, "llama", removed_layers=(3,)))
    assert save_pruned(model, tmp_path / "new").verification.passed
    record = json.loads((tmp_path / "new" / "config.json").read_text())["pruning"]
    assert record["format_version"] == 2
    assert PruningPlan.from_dict(record["plan"]) == PruningPlan(
        4, "llama", removed_layers=(3,), **{k: v for k, v in PLAN.items() if k != "removed_mlp"}
    )


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"7": {"skip": ["attention"]}}, r"names layers \[7\], but the model has 4"),
        ({"0": {"skip": ["experts"]}}, r"skips 'experts', which the layer does not have"),
        ({"1": {"intermediate_size": 4096}}, r"says 4096 units, but layer 'model\.layers\.1' has 48"),
    ],
)
def test_what_no_such_model_has_is_refused(table, message, tmp_path):
    first_format("llama", tmp_path / "old")
    file = tmp_path / "old" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"per_layer_config": table}))
    with pytest.raises(ValueError, match=message):
        load_pruned(tmp_path / "old")
