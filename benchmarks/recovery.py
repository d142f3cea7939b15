"""Recovery of pruned models: before, after LoRA on labels, and after LoRA on the parent's answers, same steps.

    python benchmarks/recovery.py --assets FOLDER --bf16 [--best "obs, global + least squares"] [--ratios 0.2 0.3]

The best method of `benchmarks/pruning.py` stands beside random units without repair. Quality is measured as there:
perplexity on the start of WikiText-2's validation part and on TinyStories, accuracy on ARC-Easy and PIQA. Training
text is none of it: later WikiText-2 validation text, stories after the first 200, and instructions. Every finished row
is kept in a JSON file, so that an interrupted run goes on. Without --model the demo's SmolLM2-135M-Instruct is used.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from pruning import METHODS, QUESTIONS, TEXTS, calibration_batches, load_data, write_rows

from hf_cka import load_pruned, save_pruned
from hf_cka.cli.demo_assets import load_demo_model
from hf_cka.data import public_name, row_text
from hf_cka.evaluation import count_parameters, multiple_choice, perplexity
from hf_cka.lookup import lookup
from hf_cka.pruning.pruners import prune
from hf_cka.training import RecoveryConfig, recover

STAGES = ("before recovery", "LoRA", "LoRA, distilled")


def training_rows(tokenizer: Any, data: dict[str, Any], options: argparse.Namespace) -> list[dict[str, list[int]]]:
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
    random.Random(options.seed).shuffle(rows)
    return [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in rows]


def quality(model: Any, tokenizer: Any, data: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    """Measure perplexities, and accuracies where items are asked for."""
    found = {name: perplexity(model, None, data[name], context=512, progress=False).value for name in TEXTS}
    for name in QUESTIONS if options.items else ():
        found[name] = multiple_choice(model, tokenizer, data[name], progress=False).accuracy_bytes
    return found


def pruned_model(dense: Any, data: dict[str, Any], method: str, ratio: float, options: argparse.Namespace) -> Any:
    """Prune, or load what an interrupted run had pruned."""
    folder = options.models / f"{slug(method)}-{ratio:g}-seed{options.seed}"
    if not (folder / "config.json").is_file():
        make, number, tokens = METHODS[method]
        batches = calibration_batches(data, number, tokens)
        save_pruned(prune(dense, batches, make(ratio, options.seed), progress=False).model, folder, verify=False)
    return load_pruned(folder).eval()


def slug(text: str) -> str:
    """Return a name for a folder."""
    return "-".join("".join(c if c.isalnum() else " " for c in text).split())


def healed(pruned: Any, dense: Any, stage: str, rows: list[Any], options: argparse.Namespace) -> Any:
    """Return a copy of the pruned model after a stage."""
    model = copy.deepcopy(pruned)
    if stage == STAGES[0]:
        return model
    return recover(
        model,
        rows,
        RecoveryConfig("lora", rank=options.rank),
        teacher=dense if stage == STAGES[2] else None,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup_steps=options.steps // 20,
        bf16=options.bf16,
        seed=options.seed,
        disable_tqdm=True,
    ).model.eval()


def table(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Return the rows as Markdown."""
    names = [*TEXTS, *(QUESTIONS if options.items else ())]
    head = ["asked", "method", "stage", "removed", *(f"{n} ppl" if n in TEXTS else n for n in names), "seconds"]
    lines = [
        "# Recovery",
        "",
        f"`python benchmarks/recovery.py --assets ASSETS --items {options.items}{' --bf16' if options.bf16 else ''}`; "
        "rows are kept in `recovery.json`.",
        "",
        f"{public_name(options.model) or 'SmolLM2-135M-Instruct'}; LoRA of rank {options.rank} in all projections, "
        f"{options.steps} steps of {options.batch_size} x {options.length} tokens, learning rate "
        f"{options.learning_rate:g} (cosine), {'bfloat16 autocast' if options.bf16 else 'float32'}, "
        f"seed {options.seed}.",
        f"Perplexity: {options.tokens} and {options.tokens // 2} tokens, context 512; {options.items} questions each.",
        "Trained on equal parts of later WikiText-2 text of the same file, other stories, and instructions; the "
        "teacher is the dense model. Seconds on a shared machine.",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    for row in rows:
        values = [f"{row[name]:.2f}" for name in names]
        cells = [f"{row['ratio']:.0%}", row["method"], row["stage"], f"{row['removed']:.1%}", *values]
        lines.append("| " + " | ".join([*cells, f"{row['seconds']:.0f}" if row["stage"] in STAGES[1:] else ""]) + " |")
    return "\n".join(lines) + "\n"


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
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=4096, help="of the first test text")
    parser.add_argument("--items", type=int, default=100, help="questions of each kind; 0 for none")
    parser.add_argument("--models", type=Path, default=Path("runs/recovery"), help="folder of the pruned models")
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
    rows = training_rows(tokenizer, data, options)
    settings = {k: v for k, v in vars(options).items() if k not in ("assets", "best", "ratios", "models", "output")}
    options.output.mkdir(parents=True, exist_ok=True)
    cache = options.output / "recovery.json"
    kept = [row for row in (json.loads(cache.read_text()) if cache.exists() else []) if row["settings"] == settings]

    def keep(row: dict[str, Any]) -> None:
        kept.append(row | {"settings": settings})
        write_rows(cache, kept)
        print(row, flush=True)

    done = {(row["ratio"], row["method"], row["stage"]) for row in kept}
    if (0.0, "dense", "") not in done:
        base = {"ratio": 0.0, "method": "dense", "stage": "", "removed": 0.0, "seconds": 0.0}
        keep(base | quality(dense, tokenizer, data, options))
    for ratio in options.ratios:
        for method in (options.best, "random units"):
            missing = [stage for stage in STAGES if (ratio, method, stage) not in done]
            if not missing:
                continue
            pruned = pruned_model(dense, data, method, ratio, options)
            removed = 1 - count_parameters(pruned).total / count_parameters(dense).total
            for stage in missing:
                start = time.perf_counter()
                model = healed(pruned, dense, stage, rows, options)
                row = {"ratio": ratio, "method": method, "stage": stage, "removed": removed}
                row |= {"seconds": time.perf_counter() - start}
                keep(row | quality(model, tokenizer, data, options))
    text = table(kept, options)
    (options.output / "recovery.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
