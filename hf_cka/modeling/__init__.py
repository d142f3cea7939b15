"""Models whose layers differ, and checkpoints that prove themselves: save, verify, load.

Names are loaded on first use: `import hf_cka` only leaves a note here for the auto classes (see `register.py`).
Choosing what to prune never belongs here.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "CheckpointError": "checkpoint",
    "Rung": "structure",
    "rung_for": "structure",
    "load_adapter": "adapters",
    "load_pruned": "checkpoint",
    "rung_of": "structure",
    "rungs_of": "rungs",
    "save_pruned": "checkpoint",
    "translate_adapter": "adapters",
    "verify": "verification",
    "verify_many": "verification",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
