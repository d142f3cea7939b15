"""Shared fixtures: where the real models and data are, and tiny random models for shapes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.smollm2 import smollm2  # noqa: F401

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models and data, or a skip that says why."""
    root = Path(os.environ.get("HF_CKA_ASSETS", Path(__file__).parents[2] / "shared" / "assets"))
    if not (root / "models").is_dir():
        pytest.skip(f"real models and data are not at {root}; set HF_CKA_ASSETS to their folder")
    return root


@pytest.fixture
def stories(assets: Path):
    """The stories260K Llama (5 layers, 64 wide, real weights) and its tokenizer, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets / "models" / "stories260k_hf"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer
