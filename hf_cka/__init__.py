"""hf_cka: adapt and compress Hugging Face models by representation similarity.

Public names are loaded on first use, so that ``import hf_cka`` stays light: it pulls in neither peft, trl,
datasets nor matplotlib.
"""

from __future__ import annotations

import importlib
from typing import Any

from hf_cka.modeling.register import register as _register

__version__ = "0.1.0"

# public name -> the room it lives in
_PUBLIC = {
    "CKALoraConfig": "hf_cka.lora",
    "LayerSelection": "hf_cka.selection",
    "PruningCallback": "hf_cka.training",
    "PruningConfig": "hf_cka.pruning.config",
    "PruningPlan": "hf_cka.modeling.plan",
    "PruningResult": "hf_cka.pruning.pruners",
    "PruningSchedule": "hf_cka.training",
    "TrainerPlugin": "hf_cka.training",
    "apply_plan": "hf_cka.modeling.surgery",
    "calibration": "hf_cka.data",
    "cka": "hf_cka.similarity",
    "collect": "hf_cka.representations",
    "evaluate": "hf_cka.evaluation.tasks",
    "find_anatomy": "hf_cka.anatomy",
    "load_pruned": "hf_cka.modeling",
    "prune": "hf_cka.pruning.pruners",
    "recover": "hf_cka.training",
    "save_pruned": "hf_cka.modeling",
    "select_layers": "hf_cka.selection",
    "verify": "hf_cka.modeling",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'hf_cka' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


# AutoConfig and the auto classes know pruned checkpoints from now on; costs nothing until they are used
_register()
