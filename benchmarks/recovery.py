"""Recovery of pruned models: before, after LoRA on labels, and after LoRA on the parent's answers, same steps.

    python benchmarks/recovery.py --assets FOLDER --bf16 [--best "obs, global + least squares"] [--ratios 0.2 0.3]

The best method of `benchmarks/pruning.py` stands beside random units without repair. A seed draws those units, the
order of the training rows and the adapters; the dense model is trained alike, to tell what training alone gives.
Quality is measured as there: perplexity on the start of WikiText-2's validation part and on TinyStories, accuracy on
ARC-Easy and PIQA. Training text is none of it: later WikiText-2 validation text, stories after the first 200, and
instructions. Pruned and recovered models are kept in a folder and finished rows in a JSON file: an interrupted run goes
on, and more questions need no new training. Without --model the demo's SmolLM2-135M-Instruct is used.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, variance
from typing import Any

import torch
from pruning import METHODS, QUESTIONS, SEEDED, TEXTS, calibration_batches, cell, load_data, write_rows

from hf_cka import load_pruned, save_pruned
from hf_cka.cli.demo_assets import load_demo_model
from hf_cka.data import public_name, row_text
from hf_cka.evaluation import count_parameters, multiple_choice, perplexity
from hf_cka.lookup import lookup
from hf_cka.pruning.pruners import prune
from hf_cka.training import DistillationConfig, RecoveryConfig, recover

BEFORE, LORA, DISTILLED = "before recovery", "LoRA", "LoRA, distilled"
STAGES = (BEFORE, LORA, DISTILLED)
# what a trained model depends on, besides the model that was pruned, the stage and the seed
TRAINING = ("steps", "batch_size", "length", "rank", "learning_rate", "top_k", "bf16")


def training_rows(
    tokenizer: Any, data: dict[str, Any], seed: int, options: argparse.Namespace
) -> list[dict[str, list[int]]]:
    """Cut the training text into rows of equal length, shuffled by the seed; equal parts of each source."""
    stories = (options.assets / "lm" / "tinystories_a.jsonl").read_text().splitlines()[200:]
    instructions = json.loads((options.assets / "instruct" / "instruction_1100.json").read_text())[:1000]
    sources = [
        data["calibration"][56 * 256 :],  # after what pruning is calibrated on
        tokenizer("\n".join(json.loads(line)["text"] for line in stories), verbose=False)["input_ids"],
        tokenizer("\n\n".join(row_text(row) for row in instructions), verbose=False)["input_ids"],
    ]
    count = min(len(ids) for ids in sources) // options.length
    rows = [ids[i * options.length : (i + 1) * options.length] for ids in sources for i in range(count)]
    random.Random(seed).shuffle(rows)
    return [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in rows]


def quality(model: Any, tokenizer: Any, data: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Measure perplexities, and which questions are answered rightly."""
    found: dict[str, Any] = {
        name: perplexity(model, None, data[name], context=512, progress=False).value for name in TEXTS
    }
    if options.items:
        answering = copy.deepcopy(model).bfloat16() if options.bf16 else model
        for name in QUESTIONS:
            items = multiple_choice(answering, tokenizer, data[name], progress=False).items
            found[name] = "".join(str(int(item.choice(item.bytes) == item.gold)) for item in items)
    return found


def kept_model(folder: Path, make: Any) -> tuple[Any, float]:
    """Return what a folder holds, made and saved first if there is nothing, and the seconds that making took."""
    seconds = folder / "seconds.txt"
    if not seconds.is_file():
        start = time.perf_counter()
        model = make()
        taken = time.perf_counter() - start
        save_pruned(model, folder, verify=False, overwrite=folder.exists())
        seconds.write_text(f"{taken}\n")
    return load_pruned(folder).eval(), float(seconds.read_text())


def pruned_model(dense: Any, data: dict[str, Any], method: str, ratio: float, seed: int, options: Any) -> Any:
    """Prune, or load what an earlier run had pruned."""
    make, number, tokens = METHODS[method]
    folder = options.models / f"{slug(method)}-{ratio:g}-seed{seed}"
    batches = calibration_batches(data, number, tokens)
    return kept_model(folder, lambda: prune(dense, batches, make(ratio, seed), progress=False).model)[0]


def slug(text: str) -> str:
    """Return a name for a folder."""
    return "-".join("".join(c if c.isalnum() else " " for c in text).split())


def healed(model: Any, dense: Any, stage: str, rows: list[Any], seed: int, options: argparse.Namespace) -> Any:
    """Return a copy of the model after LoRA, with the dense model as teacher in the distilled stage."""
    teacher = {}
    if stage == DISTILLED:
        cache = DistillationConfig(cache_dir=str(options.models / "teacher"), cache_top_k=options.top_k)
        teacher = {"teacher": dense, "distillation": cache}
    return recover(
        copy.deepcopy(model),
        rows,
        RecoveryConfig("lora", rank=options.rank),
        **teacher,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup_steps=options.steps // 20,
        bf16=options.bf16,
        seed=seed,
        disable_tqdm=True,
    ).model


def table(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Return the rows as Markdown: means and ranges over the seeds, then what recovery did to the answers."""
    questions = [*QUESTIONS] if options.items else []
    head = ["asked", "method", "stage", "removed", *(f"{name} ppl" for name in TEXTS), *questions, "seconds"]
    precision = "bfloat16 autocast" if options.bf16 else "float32"
    lines = [
        "# Recovery",
        "",
        f"`python benchmarks/recovery.py --assets ASSETS --items {options.items} --steps {options.steps} --seeds "
        f"{' '.join(map(str, options.seeds))}{' --bf16' if options.bf16 else ''}`; rows are kept in `recovery.json`.",
        "",
        f"{public_name(options.model) or 'SmolLM2-135M-Instruct'}; LoRA of rank {options.rank} in all projections, "
        f"{options.steps} steps of {options.batch_size} x {options.length} tokens, learning rate "
        f"{options.learning_rate:g} (cosine), {precision}. Several seeds: mean (range).",
        f"Perplexity: {options.tokens} and {options.tokens // 2} tokens, context 512, float32"
        + (f"; accuracy: {options.items} questions each{', bfloat16' if options.bf16 else ''}." if questions else "."),
        "Trained on equal parts of later WikiText-2 text of the same file, other stories, and instructions. The "
        f"teacher is the dense model: its {options.top_k} most likely tokens and all others as one, kept on disk, so "
        "that a row is asked once. Seconds on a shared machine.",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    for group in grouped(rows):
        first = group[0]
        cells = [*named(first), f"{first['removed']:.1%}"]
        cells += [cell([row[name] for row in group], "{:.1f}") for name in TEXTS]
        cells += [cell([100 * accuracy(row[name]) for row in group], "{:.1f}") for name in questions]
        cells += [f"{mean(row['seconds'] for row in group):.0f}" if first["stage"] != BEFORE else ""]
        lines.append("| " + " | ".join(cells) + " |")
    if questions:
        lines += gains(rows, questions)
    return "\n".join(lines) + "\n"


def gains(rows: list[dict[str, Any]], questions: Sequence[str]) -> list[str]:
    """Return, as Markdown, how many points of accuracy each recovery gained on the same questions."""
    lines = [
        "",
        "Accuracy gained, in points, on the same questions, mean over the seeds ± standard error over the questions:",
        "",
        "| " + " | ".join(["asked", "method", "stage", *questions, "both"]) + " |",
        "|---" * (len(questions) + 4) + "|",
    ]
    before = {(row["method"], row["ratio"], row["seed"]): row for row in rows if row["stage"] == BEFORE}
    for group in grouped(rows):
        first = group[0]
        if first["stage"] == BEFORE:
            continue
        gained = {
            name: [mean(seeds) for seeds in zip(*(changes(before, row, name) for row in group), strict=True)]
            for name in questions
        }
        gained["both"] = [value for values in gained.values() for value in values]
        cells = named(first)
        for values in gained.values():
            cells.append(f"{100 * mean(values):+.1f} ± {100 * math.sqrt(variance(values) / len(values)):.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def changes(before: dict[Any, dict[str, Any]], row: dict[str, Any], name: str) -> list[int]:
    """Return of each question 1 if training put its answer right, -1 if it spoilt it, and 0 otherwise."""
    start = before[row["method"], row["ratio"], pruning_seed(row["method"], row["seed"])]
    return [int(new) - int(old) for new, old in zip(row[name], start[name], strict=True)]


def pruning_seed(method: str, seed: int) -> int:
    """Return the seed of the pruned model that a seed's training starts from: one for all where nothing is drawn."""
    return seed if method in SEEDED else 0


def grouped(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the rows of all seeds together, the dense ones first, then by ratio, in the order of the stages."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["ratio"], row["method"], STAGES.index(row["stage"]), row["seed"])):
        groups.setdefault((row["ratio"], row["method"], row["stage"]), []).append(row)
    return list(groups.values())


def named(row: dict[str, Any]) -> list[str]:
    """Return the cells that say which model a row is about."""
    return ["" if row["method"] == "dense" else f"{row['ratio']:.0%}", row["method"], row["stage"]]


def accuracy(answers: str) -> float:
    """Return the share of right answers."""
    return mean(map(int, answers))


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True, help="folder with lm/, mc/ and instruct/")
    parser.add_argument("--model", help="a folder or Hub id instead of the demo's model")
    parser.add_argument("--best", default="obs, global + least squares", help="a method of benchmarks/pruning.py")
    parser.add_argument("--ratios", nargs="*", type=float, default=[0.2, 0.3])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens a row")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="as in the papers of AMP and MoP")
    parser.add_argument("--top-k", type=int, default=64, help="tokens of the teacher that are learnt from")
    parser.add_argument("--bf16", action="store_true", help="train and answer questions in bfloat16")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=4096, help="of the first test text")
    parser.add_argument("--items", type=int, default=400, help="questions of each kind; 0 for none")
    parser.add_argument("--models", type=Path, default=Path("runs/recovery"), help="pruned and recovered models")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    lookup(METHODS, options.best, "method of benchmarks/pruning.py")

    if options.model:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        dense = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    else:
        dense, tokenizer, _ = load_demo_model()
    data = load_data(tokenizer, options)
    settings = {name: getattr(options, name) for name in ("model", "tokens", "items", *TRAINING)}
    trained = "-".join(f"{name}{getattr(options, name)}" for name in TRAINING)
    options.output.mkdir(parents=True, exist_ok=True)
    cache = options.output / "recovery.json"
    kept = [row for row in (json.loads(cache.read_text()) if cache.exists() else []) if row["settings"] == settings]
    done = {(row["ratio"], row["method"], row["stage"], row["seed"]) for row in kept}

    def measure(ratio: float, method: str, stage: str, seed: int) -> None:
        pruned = pruning_seed(method, seed)
        seed = pruned if stage == BEFORE else seed
        if (ratio, method, stage, seed) in done:
            return
        done.add((ratio, method, stage, seed))
        model = dense if method == "dense" else pruned_model(dense, data, method, ratio, pruned, options)
        removed, seconds = 1 - count_parameters(model).total / count_parameters(dense).total, 0.0
        if stage != BEFORE:
            rows = training_rows(tokenizer, data, seed, options)
            folder = options.models / f"{slug(method)}-{ratio:g}-seed{pruned}-{slug(stage)}-{trained}-seed{seed}"
            model, seconds = kept_model(folder, lambda: healed(model, dense, stage, rows, seed, options))
        row = {"ratio": ratio, "method": method, "stage": stage, "seed": seed, "removed": removed, "seconds": seconds}
        kept.append(row | quality(model, tokenizer, data, options) | {"settings": settings})
        write_rows(cache, kept)
        print({key: value for key, value in row.items() if key not in QUESTIONS}, flush=True)

    cases = [(ratio, method) for ratio in options.ratios for method in (options.best, "random units")]
    measure(0.0, "dense", BEFORE, 0)
    for seed in options.seeds:
        for ratio, method in cases:
            for stage in STAGES:
                measure(ratio, method, stage, seed)
        measure(0.0, "dense", LORA, seed)
    text = table(kept, options)
    (options.output / "recovery.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
