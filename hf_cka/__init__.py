"""hf_cka: adapt and compress Hugging Face models by representation similarity.

Public names are loaded on first use, so that ``import hf_cka`` stays light: it pulls in neither peft, trl,
datasets nor matplotlib.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# public name -> the room it lives in
_PUBLIC = {
    "CKALoraConfig": "hf_cka.lora",
    "LayerSelection": "hf_cka.selection",
    "calibration": "hf_cka.data",
    "cka": "hf_cka.similarity",
    "collect": "hf_cka.representations",
    "find_anatomy": "hf_cka.anatomy",
    "select_layers": "hf_cka.selection",
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
