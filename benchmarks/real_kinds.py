"""Five real models, what is measured and trained with each, and what is removed from it; for `real_models.py`."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import real_weights
import torch
import transformers

from hf_cka import PruningConfig, calibration
from hf_cka.cli.demo_assets import load_demo_model
from hf_cka.data import decoder_start, load_processor, read_audio
from hf_cka.evaluation import classify_images, perplexity, sentence_similarity, word_error_rate
from hf_cka.pruning.width_budgets import WidthSettings

RANDOM_SEEDS = (0, 1, 2)
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Cut:
    """One way to make a model smaller.

    Args:
        what: in words.
        settings: of `PruningConfig`; the controls have a criterion of their own.
    """

    what: str
    settings: dict[str, Any]

    def configs(self) -> Iterator[tuple[str, PruningConfig]]:
        """Who chooses, and the config: a criterion (by default the method's), and the controls."""
        yield "", PruningConfig(**self.settings)
        yield "magnitude", PruningConfig(**{**self.settings, "criterion": "magnitude"})
        for seed in RANDOM_SEEDS:
            yield "random", PruningConfig(**{**self.settings, "criterion": "random", "seed": seed})


@dataclass(frozen=True)
class Kind:
    """A model, its data and what counts.

    Args:
        title: of its section.
        auto: the auto class that loads it.
        load: gives the model and its processor.
        batches: of calibration.
        score: name -> value, on data that nothing was calibrated with.
        cuts: what is removed.
        train: batches of training by a seed, each as the loss of a model on it; None trains nothing.
        steps: of training.
        rate: of learning.
        after: the scores that training is about, if they are others.
        seeds: how many runs of training, each with its own batches and adapters.
        note: what is measured, in words.
    """

    title: str
    auto: str
    load: Callable[[argparse.Namespace], tuple[Any, Any]]
    batches: Callable[[Any, Any, argparse.Namespace], Any]
    score: Callable[[Any, Any, argparse.Namespace], dict[str, float]]
    cuts: tuple[Cut, ...]
    train: Callable[[Any, Any, argparse.Namespace, int], Iterator[Callable[[Any], torch.Tensor]]] | None = None
    steps: int = 0
    rate: float = 5e-4
    after: Callable[[Any, Any, argparse.Namespace], dict[str, float]] | None = None
    seeds: int = 3
    note: str = ""


def layers(count: int, **more: Any) -> Cut:
    return Cut(f"{count} layer{'s' * (count > 1)}", {"method": "depth", "num_layers": count, **more})


def sublayers(count: int, **more: Any) -> Cut:
    settings = {"method": "depth", "structures": "sublayers", "num_layers": count, **more}
    return Cut(f"{count} sub-layers", settings)


def widths(what: str, structures: str, ratio: float, **more: Any) -> Cut:
    settings = {"method": "width", "ratio": ratio, "width": WidthSettings(structures=structures), **more}
    return Cut(what, settings)


def auto(name: str, folder: Callable[[], Path]) -> Callable[[argparse.Namespace], tuple[Any, Any]]:
    def load(options: argparse.Namespace) -> tuple[Any, Any]:
        place = folder(options.assets) if folder is real_weights.vit else folder()  # type: ignore[call-arg]
        return getattr(transformers, name).from_pretrained(place), load_processor(place)

    return load


# ---- sentence encoders ----


def pairs(part: str, options: argparse.Namespace, count: int | None = None, seed: int = 0) -> Rows:
    lines = (options.assets / "glue" / f"stsb_{part}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return rows if count is None else random.Random(seed).sample(rows, count)


def sentence_batches(model: Any, tokenizer: Any, options: argparse.Namespace, count: int = 128) -> Any:
    return calibration([row["sentence1"] for row in pairs("train", options)], tokenizer, count, max_length=64)


def sentence_score(model: Any, tokenizer: Any, options: argparse.Namespace, count: int = 300) -> dict[str, float]:
    rows = pairs("dev", options, count)
    return {"Spearman": 100 * sentence_similarity(model, tokenizer, rows, progress=False).spearman}


def cosine_steps(model: Any, tokenizer: Any, options: argparse.Namespace, seed: int) -> Iterator[Any]:
    """The cosine of two sentences should be their score, as in Sentence-BERT's regression."""
    draw, rows = random.Random(seed), pairs("train", options)

    def embedded(model: Any, texts: Sequence[str]) -> torch.Tensor:
        inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        mask = inputs["attention_mask"][:, :, None]
        return (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)

    while True:
        batch = draw.sample(rows, 8)

        def loss(model: Any, batch: Rows = batch) -> torch.Tensor:
            sides = [embedded(model, [row[side] for row in batch]) for side in ("sentence1", "sentence2")]
            wanted = torch.tensor([float(row.get("score", row.get("label"))) / 5 for row in batch])
            return torch.nn.functional.mse_loss(torch.cosine_similarity(*sides), wanted)

        yield loss


# ---- pictures ----


def picture_batches(model: Any, processor: Any, options: argparse.Namespace) -> Any:
    return calibration(real_weights.fashion_mnist("train", 128), processor, 128, batch_size=32)


def picture_score(model: Any, processor: Any, options: argparse.Namespace, lying: bool = False) -> dict[str, float]:
    rows = real_weights.fashion_mnist("t10k", 2000)
    return {"accuracy": 100 * classify_images(model, processor, turned(rows, lying), progress=False).accuracy}


def turned(rows: Rows, lying: bool) -> Rows:
    from PIL import Image

    side = Image.Transpose.ROTATE_90
    return [{**row, "image": row["image"].transpose(side)} for row in rows] if lying else rows


def picture_steps(model: Any, processor: Any, options: argparse.Namespace, seed: int) -> Iterator[Any]:
    """Training rows turned by 90 degrees, which the model never saw."""
    rows = turned(real_weights.fashion_mnist("train", 4000, seed), lying=True)
    pixels = torch.cat([b["pixel_values"] for b in calibration(rows, processor, len(rows), seed=0, batch_size=500)])
    labels = calibration(rows, processor, len(rows), seed=0, batch_size=500, label2id=model.config.label2id)
    targets = torch.cat([batch["labels"] for batch in labels])
    draw = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(rows), (32,), generator=draw)
        yield lambda model, at=chosen: model(pixel_values=pixels[at], labels=targets[at]).loss


# ---- speech ----


def recordings(options: argparse.Namespace) -> Rows:
    return [{"audio": str(options.assets / "audio" / "jfk.flac"), "text": real_weights.WORDS_OF_JFK}]


def heard(model: Any, processor: Any, options: argparse.Namespace) -> Rows:
    """Pieces of the speech, and the playing cards, with what the dense model writes down for them."""
    whole = read_audio(recordings(options)[0]["audio"], 16000)
    cards = [read_audio(row["audio"], 16000) for row in real_weights.sentences("cards")]
    sounds = [whole[at : at + 4 * 16000] for at in range(0, len(whole) - 4 * 16000, 3 * 16000)] + cards
    rows = [{"audio": {"array": sound, "sampling_rate": 16000}, "text": "unknown"} for sound in sounds]
    texts = [one.produced for one in word_error_rate(model, processor, rows, progress=False).transcripts]
    return [{**row, "text": text} for row, text in zip(rows, texts, strict=True) if text]


def speech_batches(model: Any, processor: Any, options: argparse.Namespace) -> Any:
    start = decoder_start(model.config)
    rows = heard(model, processor, options)
    return calibration(rows, processor, len(rows), batch_size=4, decoder_start_token_id=start)


def speech_score(model: Any, processor: Any, options: argparse.Namespace) -> dict[str, float]:
    book, speech = (
        word_error_rate(model, processor, rows, progress=False, max_new_tokens=64)
        for rows in (real_weights.sentences("librivox"), recordings(options))
    )
    return {"book WER": 100 * book.value, "JFK WER": 100 * speech.value}


def speech_steps(model: Any, processor: Any, options: argparse.Namespace, seed: int) -> Iterator[Any]:
    """The cards and the speech, with their words."""
    rows = real_weights.sentences("cards") + recordings(options)
    start = decoder_start(model.config)
    batches = list(calibration(rows, processor, len(rows), seed=seed, batch_size=2, decoder_start_token_id=start))
    while True:
        for batch in batches:
            yield lambda model, batch=batch: model(**batch).loss


def speech_loss(model: Any, processor: Any, options: argparse.Namespace) -> dict[str, float]:
    rows = real_weights.sentences("librivox")
    batch = calibration(rows, processor, 5, batch_size=5, decoder_start_token_id=decoder_start(model.config))[0]
    with torch.no_grad():
        return {**speech_score(model, processor, options), "book loss": float(model(**batch).loss)}


# ---- a decoder ----


def stories(options: argparse.Namespace) -> list[str]:
    lines = (options.assets / "lm" / "tinystories_a.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def text_batches(model: Any, tokenizer: Any, options: argparse.Namespace) -> Any:
    return calibration(stories(options)[200:], tokenizer, 32, max_length=128)


def text_score(model: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, float]:
    text = "\n".join(stories(options)[:20])
    found = perplexity(model, tokenizer, text, context=512, max_tokens=1024, batch_size=2, progress=False)
    return {"perplexity": found.value}


STS = "STS-B: rank correlation x 100 on {pairs} pairs of the development set (± {error}, the same pairs everywhere)."
KINDS = {
    "minilm": Kind(
        "all-MiniLM-L6-v2 (BERT, 6 layers)",
        "AutoModel",
        load=auto("AutoModel", real_weights.minilm),
        batches=sentence_batches,
        score=sentence_score,
        cuts=(
            layers(1),
            sublayers(2),
            widths("3 of 12 heads", "heads", 0.039),
            widths("a quarter of the units", "units", 0.078),
        ),
        train=cosine_steps,
        steps=30,
        rate=5e-4,
        note=STS.format(pairs=300, error="1.6"),
    ),
    "mpnet": Kind(
        "all-mpnet-base-v2 (MPNet, 12 layers)",
        "AutoModel",
        load=auto("AutoModel", real_weights.mpnet),
        batches=partial(sentence_batches, count=32),
        score=partial(sentence_score, count=100),
        cuts=(
            layers(2),
            widths("3 of 12 heads", "heads", 0.0647),
            widths("a quarter of the units", "units", 0.129),
        ),
        train=cosine_steps,
        steps=8,
        rate=5e-4,
        seeds=1,
        note=STS.format(pairs=100, error="2.8"),
    ),
    "vit": Kind(
        "ViT for Fashion-MNIST (8 layers)",
        "AutoModelForImageClassification",
        load=auto("AutoModelForImageClassification", real_weights.vit),
        batches=picture_batches,
        score=picture_score,
        cuts=(
            layers(2),
            sublayers(3),
            widths("1 of 4 heads", "heads", 0.123),
            widths("a quarter of the units", "units", 0.123),
        ),
        train=picture_steps,
        steps=150,
        rate=2e-3,
        after=partial(picture_score, lying=True),
        note="Accuracy in % on 2,000 test pictures (± 0.7). LoRA learns pictures that lie on their side.",
    ),
    "whisper": Kind(
        "Whisper tiny.en (4 + 4 layers)",
        "AutoModelForSpeechSeq2Seq",
        load=auto("AutoModelForSpeechSeq2Seq", real_weights.whisper),
        batches=speech_batches,
        score=speech_score,
        cuts=(
            Cut("1 encoder layer", {"method": "depth", "num_layers": 1, "stack": "encoder"}),
            Cut("1 decoder layer", {"method": "depth", "num_layers": 1, "stack": "decoder"}),
            sublayers(2, stack="decoder"),
            widths("1 of 6 encoder heads", "heads", 0.0105, stack="encoder"),
            widths("a quarter of the encoder's units", "units", 0.0312, stack="encoder"),
            widths("a quarter of the decoder's units", "units", 0.0312, stack="decoder"),
        ),
        train=speech_steps,
        steps=6,
        rate=5e-4,
        seeds=1,
        after=speech_loss,
        note="Word error rates in % on five sentences of a book (71 words) and on the speech of `jfk.flac` (22 words, "
        "pieces of which are calibration data). LoRA learns the speech and five names of playing cards.",
    ),
    "smollm2": Kind(
        "SmolLM2-135M-Instruct (Llama, 30 layers)",
        "AutoModelForCausalLM",
        load=lambda options: load_demo_model()[:2],
        batches=text_batches,
        score=text_score,
        cuts=(
            layers(3, criterion="block_influence", steps=1),
            sublayers(4, criterion="block_influence", steps=1),
            widths("1 of 3 KV groups", "heads", 0.0657),
            widths("an eighth of the units", "units", 0.074),
        ),
        note="Perplexity on 1,024 tokens of TinyStories (lower is better); calibration on other stories. LoRA "
        "in this model is measured in `lora_selection.md`.",
    ),
}
