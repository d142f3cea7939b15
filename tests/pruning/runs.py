"""What the tests of `prune` share: a tiny model whose layers differ, data, and a short way to run."""

from __future__ import annotations

from hf_cka import PruningConfig, prune
from tests.tiny import tiny_batch, tiny_model

BATCHES = [tiny_batch(6, length=8, seed=s) for s in range(2)]
# layers whose every part counts, and which differ
MODEL = tiny_model("llama", num_hidden_layers=8, num_key_value_heads=4)
LAYER = 4128 + 4640  # parameters of a layer: attention and MLP, each with its norm


def run(config=None, model=MODEL, batches=BATCHES, **rest):
    settings = {k: v for k, v in rest.items() if k in PruningConfig.__dataclass_fields__}
    keywords = {k: v for k, v in rest.items() if k not in settings}
    return prune(model, batches, config or PruningConfig(**settings), progress=False, **keywords)


def size(model):
    return sum(p.numel() for p in model.parameters())
