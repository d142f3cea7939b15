"""Publish pruned models: the model card, and the push that checks what it sends.

Names are loaded on first use. Measuring, pruning and saving never belong here.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "Finding": "private",
    "find_private": "private",
    "model_card": "card",
    "push_pruned": "push",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
