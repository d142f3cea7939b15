"""Real models of four kinds, end to end: select, prune, save, reload, measure; and LoRA where CKA chooses the layers.

    python benchmarks/real_models.py --assets FOLDER [--models minilm mpnet vit whisper smollm2] [--output FILE]

Each model loses layers, sub-layers, heads and MLP units, chosen by hf_cka's default criterion of each, by magnitude and
by a draw with two seeds, and is measured before any training. Every pruned model is saved, loaded by its auto class in
a process that never saw it, and measured there; its output on one batch must equal, to the last bit, that of the model
in memory. Then adapters are trained for a few steps in all layers, the half that CKA chooses, and half at random.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import real_weights
import torch
import transformers
from safetensors.torch import load_file, save_file

from hf_cka import CKALoraConfig, PruningConfig, calibration, prune, save_pruned, select_layers
from hf_cka.cli.demo_assets import load_demo_model
from hf_cka.data import decoder_start, load_processor
from hf_cka.evaluation import classify_images, count_parameters, perplexity, sentence_similarity, word_error_rate
from hf_cka.lookup import lookup
from hf_cka.pruning.width_budgets import WidthSettings

RANDOM_SEEDS = (0, 1)
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Cut:
    """One way to make a model smaller.

    Args:
        what: in words.
        settings: of `PruningConfig`, without the criterion.
    """

    what: str
    settings: dict[str, Any]

    def configs(self) -> Iterator[tuple[str, PruningConfig]]:
        """Who chooses, and the config: the default criterion of the method, and the controls."""
        yield "", PruningConfig(**self.settings)
        yield "magnitude", PruningConfig(**self.settings, criterion="magnitude")
        for seed in RANDOM_SEEDS:
            yield "random", PruningConfig(**self.settings, criterion="random", seed=seed)


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
        train: one batch of training by number, as (the loss of a model on it).
        steps, rate: of training.
        alter: changes the scores for training: another task, or other data.
    """

    title: str
    auto: str
    load: Callable[[argparse.Namespace], tuple[Any, Any]]
    batches: Callable[[Any, Any, argparse.Namespace], Any]
    score: Callable[[Any, Any, argparse.Namespace], dict[str, float]]
    cuts: tuple[Cut, ...]
    train: Callable[[Any, Any, argparse.Namespace, int], Iterator[Callable[[Any], torch.Tensor]]]
    steps: int
    rate: float
    after: Callable[[Any, Any, argparse.Namespace], dict[str, float]] | None = None
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


def sentence_batches(model: Any, tokenizer: Any, options: argparse.Namespace) -> Any:
    return calibration([row["sentence1"] for row in pairs("train", options)], tokenizer, 128, max_length=64)


def sentence_score(model: Any, tokenizer: Any, options: argparse.Namespace, count: int = 400) -> dict[str, float]:
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
        batch = draw.sample(rows, 16)

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
    from hf_cka.data import read_audio

    whole = read_audio(recordings(options)[0]["audio"], 16000)
    cards = [read_audio(row["audio"], 16000) for row in real_weights.sentences("cards")]
    sounds = [whole[at : at + 4 * 16000] for at in range(0, len(whole) - 4 * 16000, 16000)] + cards
    rows = [{"audio": {"array": sound, "sampling_rate": 16000}, "text": "?"} for sound in sounds]
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
    return calibration(stories(options)[200:], tokenizer, 64, max_length=128)


def text_score(model: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, float]:
    text = "\n".join(stories(options)[:20])
    found = perplexity(model, tokenizer, text, context=512, max_tokens=2048, batch_size=2, progress=False)
    return {"perplexity": found.value}


def text_steps(model: Any, tokenizer: Any, options: argparse.Namespace, seed: int) -> Iterator[Any]:
    draw, texts = random.Random(seed), stories(options)[200:]
    while True:
        inputs = tokenizer(draw.sample(texts, 4), truncation=True, max_length=128, padding=True, return_tensors="pt")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        yield lambda model, inputs=inputs, labels=labels: model(**inputs, labels=labels).loss


SENTENCES = {"auto": "AutoModel", "batches": sentence_batches, "score": sentence_score, "train": cosine_steps}
STS = "STS-B: rank correlation x 100 on 400 pairs of the development set (± {error}, the same pairs everywhere)."
KINDS = {
    "minilm": Kind(
        "all-MiniLM-L6-v2 (BERT, 6 layers)",
        load=auto("AutoModel", real_weights.minilm),
        cuts=(
            layers(1),
            sublayers(2),
            widths("3 of 12 heads", "heads", 0.039),
            widths("a quarter of the units", "units", 0.078),
        ),
        steps=60,
        rate=5e-4,
        note=STS.format(error="1.4"),
        **SENTENCES,
    ),
    "mpnet": Kind(
        "all-mpnet-base-v2 (MPNet, 12 layers)",
        load=auto("AutoModel", real_weights.mpnet),
        cuts=(
            layers(2),
            sublayers(3),
            widths("3 of 12 heads", "heads", 0.0647),
            widths("a quarter of the units", "units", 0.129),
        ),
        steps=15,
        rate=5e-4,
        note=STS.format(error="1.4"),
        **SENTENCES,
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
        steps=9,
        rate=5e-4,
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
            layers(3),
            sublayers(4),
            widths("1 of 3 KV groups", "heads", 0.0657),
            widths("an eighth of the units", "units", 0.074),
        ),
        train=text_steps,
        steps=10,
        rate=5e-4,
        note="Perplexity on 2,048 tokens of TinyStories (lower is better); calibration and training on other stories.",
    ),
}


# ---- the process that loads ----


def serve(kind: Kind, options: argparse.Namespace) -> None:
    """Load each folder that comes in by its auto class, compare its output, measure it."""
    transformers.logging.set_verbosity_error()
    for line in sys.stdin:
        folder = Path(line.strip())
        model = getattr(transformers, kind.auto).from_pretrained(folder, dtype=torch.float32).eval()
        probe = load_file(folder / "probe.safetensors")
        wanted = probe.pop("output")
        same = torch.equal(output_of(model, probe), wanted)
        answer = {"same": same, **kind.score(model, load_processor(folder), options)}
        print("ANSWER " + json.dumps(answer), flush=True)


class Reader:
    """A fresh process in which saved models are loaded and measured."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--serve", name, "--assets", str(options.assets)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def read(self, folder: Path) -> dict[str, Any]:
        """Whether the loaded model's output is the same, and its scores."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(folder, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise RuntimeError(f"{folder} could not be loaded in a fresh process.")


def output_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits, or else the last hidden states."""
    model.eval()
    with torch.no_grad():
        output = model(**batch)
    return output.logits if "logits" in output else output.last_hidden_state


def measured(model: Any, processor: Any, batches: Any, reader: Reader) -> dict[str, Any]:
    """Save a model, and return what the fresh process finds in the folder."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "pruned"
        saved = save_pruned(model, folder, tokenizer=processor, verify=False)
        probe = {name: value[:2].clone() for name, value in batches[0].items() if name != "labels"}
        save_file({**probe, "output": output_of(model, probe).contiguous()}, folder / "probe.safetensors")
        return {"rung": saved.rung.name, "parameters": saved.parameters, **reader.read(folder)}


# ---- the benchmark ----


def pruned(name: str, kind: Kind, options: argparse.Namespace) -> Iterator[str]:
    """The table of one model, line by line."""
    model, processor = kind.load(options)
    model.eval()
    batches = kind.batches(model, processor, options)
    total = count_parameters(model).total
    start = time.perf_counter()
    selection = select_layers(model, batches, 0.5, progress=False)
    chosen = "; ".join(
        f"`{one.layers_path}` {', '.join(map(str, one.layers))}" for one in (selection, *selection.others)
    )
    yield f"`select_layers` keeps {chosen} ({time.perf_counter() - start:.1f} s on {batches.num_samples} samples)."
    yield ""
    with Reader(name, options) as reader:
        dense = measured(model, processor, batches, reader)
        metrics = [key for key in dense if key not in ("rung", "parameters", "same")]
        yield "| removed | chosen by | parameters | " + " | ".join(metrics) + " | rung | reload | seconds |"
        yield "|---" * (6 + len(metrics)) + "|"
        yield line("nothing", "", [{**dense, "seconds": 0.0}], total, metrics)
        for cut in kind.cuts:
            found: dict[str, list[dict[str, Any]]] = {}
            for by, config in cut.configs():
                start = time.perf_counter()
                result = prune(model, batches, config, progress=False)
                seconds = time.perf_counter() - start
                row = {**measured(result.model, processor, batches, reader), "seconds": seconds}
                found.setdefault(by or str(config.criterion), []).append(row)
                del result
            for by, rows in found.items():
                yield line(cut.what, by, rows, total, metrics)


def line(what: str, by: str, rows: Sequence[dict[str, Any]], total: int, metrics: Sequence[str]) -> str:
    """One row of a table; of several runs the mean and the range."""

    def several(values: Sequence[float], form: str) -> str:
        text = format(mean(values), form)
        return text if len(set(values)) == 1 else f"{text} ({min(values):{form}}-{max(values):{form}})"

    cells = [what, f"{by}, {len(rows)} seeds" if len(rows) > 1 else by]
    cells += [several([row["parameters"] / total for row in rows], ".3f")]
    cells += [several([row[name] for row in rows], ".1f") for name in metrics]
    cells += [", ".join(dict.fromkeys(row["rung"] for row in rows))]
    cells += ["equal" if all(row["same"] for row in rows) else "DIFFERENT"]
    return "| " + " | ".join([*cells, f"{mean(row['seconds'] for row in rows):.1f}"]) + " |"


def adapted(kind: Kind, options: argparse.Namespace) -> Iterator[str]:
    """The table of LoRA in all layers, half by CKA and half at random."""
    from peft import get_peft_model

    score = kind.after or kind.score
    base, processor = kind.load(options)
    batches = kind.batches(base, processor, options)
    before = score(base.eval(), processor, options)
    yield f"LoRA (r=8), {kind.steps} steps, {len(options.seeds)} seeds: mean ± standard deviation."
    yield ""
    yield "| adapters in | trainable | " + " | ".join(before) + " | seconds a step |"
    yield "|---" * (3 + len(before)) + "|"
    yield "| none |  | " + " | ".join(f"{value:.2f}" for value in before.values()) + " |  |"
    everything = 0
    for criterion, ratio in (("all", 1.0), ("cka", 0.5), ("random", 0.5)):
        found: list[dict[str, float]] = []
        for seed in options.seeds:
            model, _ = kind.load(options)
            torch.manual_seed(seed)
            config = CKALoraConfig(
                r=8, lora_alpha=16, keep_ratio=ratio, criterion=criterion, selection_seed=seed, calibration=batches
            )
            model = get_peft_model(model, config)
            start = time.perf_counter()
            train(model, kind.train(base, processor, options, seed), kind)
            seconds = (time.perf_counter() - start) / kind.steps
            trainable = count_parameters(model).trainable
            model = model.merge_and_unload().eval()
            found.append({**score(model, processor, options), "trainable": trainable, "seconds": seconds})
        everything = everything or int(found[0]["trainable"])
        shown = {"all": "all layers", "cka": "half by CKA", "random": "half at random"}[criterion]
        cells = [shown, f"{mean(f['trainable'] for f in found) / everything:.2f}"]
        for name in before:
            values = [f[name] for f in found]
            cells.append(f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else ""))
        yield "| " + " | ".join([*cells, f"{mean(f['seconds'] for f in found):.2f}"]) + " |"


def train(model: Any, losses: Iterator[Callable[[Any], torch.Tensor]], kind: Kind) -> None:
    """Adam with a linear decay over the steps."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=kind.rate)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, kind.steps)
    for _, loss in zip(range(kind.steps), losses, strict=False):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()


def main() -> None:
    """Prune, adapt and print, model by model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True, help="folder with glue/, lm/, audio/ and models/")
    parser.add_argument("--models", nargs="+", default=list(KINDS), help=f"some of {', '.join(KINDS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of LoRA")
    parser.add_argument("--output", type=Path, help="Markdown file; printed as well")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.serve:
        serve(KINDS[options.serve], options)
        return
    kinds = {name: lookup(KINDS, name, "model") for name in options.models}
    out: list[str] = []

    def say(text: str) -> None:
        print(text, flush=True)
        out.append(text)

    say("# Real models of every kind, end to end\n")
    say(
        "`python benchmarks/real_models.py --assets ASSETS`: what is removed, who chose it, what is left of the "
        "parameters and of the quality, before any training. Rung: `stock` loads with transformers alone, `hf_cka` with "
        "hf_cka or its remote code. Reload: the output of the saved model, loaded by its auto class in a process that "
        "never saw it, is equal to the last bit; the quality is measured there. Seconds: of choosing and removing, "
        f"float32, {torch.get_num_threads()} thread(s) of a shared machine. Random: the mean, and in brackets the range."
    )
    for name, kind in kinds.items():
        say(f"\n## {kind.title}\n\n{kind.note}\n")
        for part in (pruned(name, kind, options), ("",), adapted(kind, options)):
            for text in part:
                say(text)
    if options.output:
        options.output.write_text("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
