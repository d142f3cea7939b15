"""Small pictures and recordings on disk, and tiny processors and models that take them."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

RATE = 16000


def png(shade: int, size: tuple[int, int] = (12, 10)) -> bytes:
    """A picture of one colour with a bright corner, as PNG."""
    from PIL import Image

    pixels = np.full((size[1], size[0], 3), shade, np.uint8)
    pixels[:3, :3] = (255, 0, shade)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def wav(frequency: float, seconds: float = 0.5, rate: int = RATE, channels: int = 1) -> bytes:
    """A tone, as WAV."""
    import soundfile

    tone = 0.3 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)
    file = io.BytesIO()
    soundfile.write(file, np.stack([tone] * channels, axis=1), rate, format="WAV")
    return file.getvalue()


def write(root: Path, files: dict[str, bytes]) -> Path:
    """Write files below a folder, or into it as a zip where its name ends so."""
    if root.suffix == ".zip":
        with zipfile.ZipFile(root, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return root
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def pictures(count: int = 3) -> dict[str, bytes]:
    """Class folders "cat" and "dog" of pictures that all differ."""
    return {
        f"{kind}/{i}.png": png((20 * i + 100 * at) % 251)
        for at, kind in enumerate(("cat", "dog"))
        for i in range(count)
    }


def sounds(count: int = 2) -> dict[str, bytes]:
    """Class folders "high" and "low" of tones that differ in length."""
    tones = (("high", 2000.0), ("low", 200.0))
    return {f"{kind}/{i}.wav": wav(tone + i, 0.4 + 0.05 * i) for kind, tone in tones for i in range(count)}


def vit_processor(size: int = 16, channels: int = 3) -> Any:
    from transformers import ViTImageProcessor

    half = [0.5] * channels
    return ViTImageProcessor(size={"height": size, "width": size}, image_mean=half, image_std=half)


def tiny_vit(labels: tuple[str, ...] = ("cat", "dog"), channels: int = 3) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    names = dict(enumerate(labels))
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        num_channels=channels,
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    return ViTForImageClassification(config).eval()


def ctc_processor(folder: Path) -> Any:
    import json

    from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

    known = ["<pad>", "<s>", "</s>", "<unk>", "|", *map(chr, range(ord("a"), ord("z") + 1))]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(known)}))
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    return Wav2Vec2Processor(Wav2Vec2FeatureExtractor(return_attention_mask=False), tokenizer)


_WAV2VEC2 = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 8),
    "conv_stride": (5, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
}


def tiny_ctc() -> Any:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    torch.manual_seed(0)
    return Wav2Vec2ForCTC(Wav2Vec2Config(**_WAV2VEC2)).eval()


def tiny_listener(labels: tuple[str, ...] = ("high", "low")) -> Any:
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    torch.manual_seed(0)
    names = dict(enumerate(labels))
    config = Wav2Vec2Config(**_WAV2VEC2, id2label=names, label2id={name: index for index, name in names.items()})
    return Wav2Vec2ForSequenceClassification(config).eval()


def tiny_whisper() -> tuple[Any, Any]:
    """A random Whisper that hears one second, and its processor."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor
    from transformers.models.whisper.tokenization_whisper import WhisperTokenizer

    torch.manual_seed(0)
    vocabulary = {"<|endoftext|>": 0, "<|startoftranscript|>": 1, "<|notimestamps|>": 2}
    vocabulary |= {letter: index + 3 for index, letter in enumerate("abcdefghijklmnopqrstuvwxyzĠ")}
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[], pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|startoftranscript|>", "<|notimestamps|>"]})
    processor = WhisperProcessor(WhisperFeatureExtractor(feature_size=20, chunk_length=1), tokenizer)
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_mel_bins=20,
        max_source_positions=50,
        max_target_positions=32,
        decoder_start_token_id=1,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        begin_suppress_tokens=None,
        suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config).eval()
    return model, processor
