"""The `smollm2` fixture: a factory of fresh copies of the demo's real model. A conftest takes it in through
``pytest_plugins = ["tests.smollm2"]`` or ``from tests.smollm2 import smollm2``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def smollm2() -> Callable[[], tuple[Any, Any]]:
    """A function that returns (a fresh SmolLM2-135M-Instruct in float32 and eval mode, its tokenizer).

    The first use on a machine fetches the model (about a minute); skips where no source can be reached.
    """
    from hf_cka.cli.demo_assets import load_demo_model

    try:
        model, tokenizer, _ = load_demo_model()
    except (RuntimeError, ImportError) as error:
        pytest.skip(f"SmolLM2-135M-Instruct is not to be had here: {error}")
    return lambda: (copy.deepcopy(model), copy.deepcopy(tokenizer))
