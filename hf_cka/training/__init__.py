"""Training on top of transformers and TRL: healing a pruned model, and pruning while training.

Names are loaded on first use. A training loop of its own never belongs here.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "PruningCallback": "callback",
    "PruningSchedule": "schedule",
    "TrainerPlugin": "plugin",
    "RecoveryConfig": "recovery",
    "DistillationConfig": "distillation",
    "DistillationMixin": "distillation",
    "RecoveryResult": "recovery_run",
    "recover": "recovery_run",
    "finish_recovery": "recovery",
    "scatter_adapter": "scatter",
    "prepare_recovery": "recovery",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
