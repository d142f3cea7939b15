"""A model's memory is that of a process of its own: nothing held here counts, and a bigger model takes more."""

from __future__ import annotations

import pytest
import torch

from hf_cka.evaluation import model_memory
from tests.tiny import tiny_model, tiny_tokenizer

MEBI = 1 << 20


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, changes in {"small": {}, "large": {"vocab_size": 96, "intermediate_size": 1 << 17}}.items():
        tiny_model("llama", **changes).save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    return root


def test_a_bigger_model_has_a_bigger_peak(folders) -> None:
    held = torch.ones(150 * MEBI)  # 600 MiB here, none of it there
    small, large = (model_memory(str(folders / name), device="cpu", batch_size=2) for name in ("small", "large"))
    weights = 4 * 3 * 32 * ((1 << 17) - 48) * 4  # layers, projections, width, units, bytes
    assert weights > 180 * MEBI
    assert large.peak_bytes - small.peak_bytes > weights * 0.9
    for one in (small, large):
        assert MEBI < one.imported_bytes <= one.loaded_bytes <= one.peak_bytes
        assert one.cuda_bytes is None
        assert (one.prompt_tokens, one.new_tokens, one.batch_size) == (12, 24, 2)
    assert small.peak_bytes - small.imported_bytes < held.nbytes / 4  # the libraries are there before the model


def test_the_error_of_the_process_is_told(folders) -> None:
    with pytest.raises(RuntimeError, match=r"FileNotFoundError: There is no folder '\./nowhere'"):
        model_memory("./nowhere")
    with pytest.raises(RuntimeError, match="prompt_tokens=60 and new_tokens=24 exceed the model's 64 positions"):
        model_memory(str(folders / "small"), prompt_tokens=60, device="cpu")
