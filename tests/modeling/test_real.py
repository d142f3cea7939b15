"""Real weights through every operation: they compute the same after saving, and still read."""

from __future__ import annotations

import json

import pytest
import torch

from hf_cka.modeling.checkpoint import save_pruned
from hf_cka.modeling.plan import PruningPlan
from hf_cka.modeling.probe import first_output
from hf_cka.modeling.surgery import apply_plan
from hf_cka.modeling.verification import probe_inputs, verify_many

pytestmark = pytest.mark.assets

OPERATIONS = {
    "layers": {"removed_layers": (2,)},
    "attention": {"removed_attention": (0, 3)},
    "mlp": {"removed_mlp": (2,)},
    "units": {"kept_units": {1: range(0, 100), 3: range(20, 172)}},
    "groups": {"kept_groups": {1: (0, 1, 3), 4: (2,)}},
    "mixed": {
        "removed_layers": (3,),
        "removed_attention": (2,),
        "kept_units": {1: range(150)},
        "kept_groups": {4: (0, 2)},
    },
    "uniform units": {"kept_units": dict.fromkeys(range(5), range(128))},
    "uniform groups": {"kept_groups": dict.fromkeys(range(5), (0, 1, 3))},
}
RUNGS = {"layers": "stock", "uniform units": "stock", "uniform groups": "relabel"}


def loss(model, tokenizer, text):
    batch = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        return float(model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss)


@pytest.fixture
def text(assets):
    """A few hundred tokens of the stories the model was trained on."""
    with open(assets / "lm" / "tinystories_a.jsonl") as lines:
        return " ".join(json.loads(next(lines))["text"] for _ in range(2))[:1200]


def test_stories260k_through_every_operation(stories, text, tmp_path):
    model, tokenizer = stories
    state, config = model.state_dict(), model.config
    dense = loss(model, tokenizer, text)
    assert dense < 2.0, "real weights"
    folders, expected, losses = {}, {}, {}
    for name, operation in OPERATIONS.items():
        fresh = type(model)(type(config).from_dict(config.to_dict())).eval()
        fresh.load_state_dict({k: v.clone() for k, v in state.items()})
        apply_plan(fresh, PruningPlan(num_layers=5, model_type="llama", **operation))
        losses[name] = loss(fresh, tokenizer, text)
        folder = tmp_path / name.replace(" ", "_")
        saved = save_pruned(fresh, folder, tokenizer=tokenizer, verify=False)
        assert saved.rung.name == RUNGS.get(name, "hf_cka")
        expected[len(folders)] = first_output(fresh, probe_inputs(json.loads((folder / "config.json").read_text())))
        folders[name] = folder
    for name, result in zip(folders, verify_many(list(folders.values()), expected=expected), strict=True):
        assert result.passed, str(result)
        # worse than the dense model, and better than a model that knows nothing (log of 512 tokens)
        assert dense < losses[name] < 6.3, name
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("layers", "mixed", "uniform groups"):
        loaded = AutoModelForCausalLM.from_pretrained(folders[name])
        again = AutoTokenizer.from_pretrained(folders[name])
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loss(loaded, again, text) == pytest.approx(losses[name], abs=1e-4)


SMOL = {
    "layers": {"removed_layers": (10, 20)},
    "attention": {"removed_attention": (12, 18)},
    "mlp": {"removed_mlp": (21,)},
    "units": {"kept_units": {5: range(1024), 6: range(0, 1536, 2)}},
    "groups": {"kept_groups": {8: (0, 2), 20: (1,)}},
    "mixed": {
        "removed_layers": (25,),
        "removed_attention": (12, 18),
        "removed_mlp": (21,),
        "kept_units": {5: range(1024), 6: range(0, 1536, 2)},
        "kept_groups": {8: (0, 2)},
    },
    "uniform units": {"kept_units": dict.fromkeys(range(30), range(1280))},
    "uniform groups": {"kept_groups": dict.fromkeys(range(30), (0, 2))},
}


@pytest.mark.slow
def test_smollm2_through_every_operation(smollm2, tmp_path):
    model, tokenizer = smollm2()
    state, config = {k: v.clone() for k, v in model.state_dict().items()}, model.config
    sentence = "The capital of France is Paris. The capital of Italy is Rome. The capital of Germany is Berlin."
    dense = loss(model, tokenizer, sentence)
    folders, expected = {}, {}
    for name, operation in SMOL.items():
        fresh = type(model)(type(config).from_dict(config.to_dict())).eval()
        fresh.load_state_dict(state)
        fresh.tie_weights()
        price = PruningPlan(num_layers=30, model_type="llama", **operation).price(fresh)
        apply_plan(fresh, PruningPlan(num_layers=30, model_type="llama", **operation))
        assert sum(p.numel() for p in fresh.parameters()) == price.after.parameters
        assert dense < loss(fresh, tokenizer, sentence) < 10.9, name
        folder = tmp_path / name.replace(" ", "_")
        save_pruned(fresh, folder, tokenizer=tokenizer, verify=False)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        assert size == pytest.approx(4 * price.after.parameters, rel=0.01)
        expected[len(folders)] = first_output(fresh, probe_inputs(json.loads((folder / "config.json").read_text())))
        folders[name] = folder
    for result in verify_many(list(folders.values()), expected=expected):
        assert result.passed, str(result)
