"""Three pruned checkpoints, one of each rung of the ladder, made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from hf_cka import PruningPlan, apply_plan, save_pruned
from tests.tiny import tiny_batch, tiny_model, tiny_tokenizer

RECORD = {
    "method": "depth",
    "settings": {"criterion": "cka", "num_layers": 1, "seed": 3},
    "calibration": {"source": "someone/texts:plain", "samples": 128, "num_tokens": 9000, "seed": 7, "hash": "ab12"},
    "base_model": "someone/tiny-llama",
    "base_revision": "0123abc",
}
PLANS: dict[str, dict[str, Any]] = {
    "stock": {"removed_layers": (1,)},
    "relabel": {"kept_groups": dict.fromkeys(range(4), (0, 1, 3))},
    "uneven": {"removed_attention": (1,), "removed_mlp": (2,), "kept_units": {0: range(0, 48, 2), 3: range(12)}},
}


class Saved(NamedTuple):
    folder: Path
    logits: torch.Tensor


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> dict[str, Saved]:
    """Never write into these folders; copy them (`shutil.copytree`)."""
    root = tmp_path_factory.mktemp("checkpoints")
    found = {}
    for name, plan in PLANS.items():
        model = tiny_model("llama", num_key_value_heads=4)
        apply_plan(model, PruningPlan(num_layers=4, model_type="llama", **plan))
        scores = {f"layer {i}": i / 10 for i in range(4)}
        folder = save_pruned(
            model, root / name, tokenizer=tiny_tokenizer("/home/someone/"), record=RECORD, scores=scores, verify=False
        ).folder
        with torch.no_grad():
            found[name] = Saved(folder, model(**tiny_batch(pad="left"), use_cache=False).logits)
    return found
