"""Layer-wise LoRA by CKA (arXiv 2602.05988): adapters in the half of the layers that change their input most.

    python -m recipes.reproduce.cka_lora [--model FacebookAI/roberta-base]
    python -m recipes.reproduce.cka_lora --small --assets FOLDER [--model ENCODER]

Scores are 1 - CKA (biased) of CLS before and after each layer on training samples; the first layer, whose CLS is
constant, never ranks. Rank 8, alpha 16, as in the paper for RoBERTa-base; learning rate and epochs are ours.
`--small` trains MiniLM (sentence-transformers/all-MiniLM-L6-v2) for 100 steps on SST-2. All layers and a random half
are trained alike, with every seed. For decoders: cka_lora_decoder.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

from hf_cka import calibration, select_layers
from hf_cka.data import load_rows
from recipes.reproduce.common import Claim, Paper, open_rows, parse, write_report

PAPER = Paper(
    "cka_lora",
    "Layer-wise LoRA fine-tuning: a similarity metric approach",
    "2602.05988",
    "learning rate and length of training, which are ours for encoders.",
)
MEANING = (
    "Spread: standard deviation over the seeds. Differences: with their standard error; undecided within two of it, "
    "and the same quality within one."
)
VARIANTS = {"all layers": ("all", 1.0), "CKA half": ("cka", 0.5), "random half": ("random", 0.5)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train each variant with every seed, and judge."""
    options = parse(PAPER, __doc__, "FacebookAI/roberta-base", arguments)
    if options.small:
        options.model = options.model or "sentence-transformers/all-MiniLM-L6-v2"
        train, test = (
            [json.loads(line) for line in (options.assets / "glue" / f"sst2_{part}.jsonl").read_text().splitlines()]
            for part in ("train", "dev")
        )
    else:
        train, test = (load_rows("nyu-mll/glue:sst2", part) for part in ("train", "validation"))
    steps = options.steps or (100 if options.small else -1)

    runs = run_all(options, lambda name, seed: trained(options, train, test, name, seed, steps))
    how = f"{steps} steps" if steps > 0 else "3 epochs"
    settings = (
        f"SST-2, {len(options.seeds)} seeds, LoRA rank 8, alpha 16; {how} of 16 sentences, learning rate 1e-3 "
        f"(cosine). {MEANING}"
    )
    judge(PAPER, options, settings, runs, "accuracy", "points")


def run_all(options: Any, measure: Callable[[str, int], dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the runs of each variant with every seed; those that are kept are not run again."""
    rows = open_rows(options)

    def run(name: str, seed: int) -> dict[str, Any]:
        return rows.get(f"{name}, seed {seed}", lambda: measure(name, seed))

    return {name: [run(name, seed) for seed in options.seeds] for name in VARIANTS}


def judge(
    paper: Paper,
    options: Any,
    settings: str,
    runs: dict[str, list[dict[str, Any]]],
    quality: str,
    unit: str,
    *,
    lower: bool = False,
) -> None:
    """Write the report: every variant over its seeds, and what that says of the paper's claims.

    Args:
        paper: what is reproduced.
        options: the command line.
        settings: in words.
        runs: of each variant, one a seed, with ``trainable``, ``layers`` and the quality.
        quality: what the runs are judged by.
        unit: of the quality.
        lower: whether less of it is better.
    """
    table = {
        name: {
            "trainable": f"{found[0]['trainable']:,}",
            quality: mean(row[quality] for row in found),
            "spread": stdev([row[quality] for row in found]) if len(found) > 1 else 0.0,
            "layers": found[0]["layers"] if name != "random half" else "drawn",
        }
        for name, found in runs.items()
    }

    def gain(over: str) -> tuple[float, float]:
        """How much better the half by CKA is, and the standard error of that."""
        half, other = table["CKA half"], table[over]
        error = math.hypot(half["spread"], other["spread"]) / math.sqrt(len(options.seeds))
        return (half[quality] - other[quality]) * (-1 if lower else 1), error

    share = runs["CKA half"][0]["trainable"] / runs["all layers"][0]["trainable"]
    (over_all, error), (over_chance, chance_error) = gain("all layers"), gain("random half")
    digits = 3 if lower else 2
    claims = [
        Claim(
            "half of the adapters, the same quality",
            f"{over_all:+.{digits}f} ± {error:.{digits}f} {unit} with {share:.0%} of the parameters",
            True if over_all >= -error else False if over_all < -2 * error else None,
        ),
        Claim(
            "(our control) CKA chooses better than chance",
            f"{over_chance:+.{digits}f} ± {chance_error:.{digits}f} {unit} against a random half",
            None if abs(over_chance) <= 2 * chance_error else over_chance > 0,
        ),
    ]
    write_report(paper, options, settings, table, claims, ("trainable", "layers", quality, "spread"))


def with_adapters(
    model: Any, name: str, seed: int, batches: Callable[[], Any], **lora: Any
) -> tuple[PeftModel, dict[str, Any]]:
    """Return the model with adapters in the layers of a variant, and their parameters and the layers for its row."""
    criterion, ratio = VARIANTS[name]
    cka = criterion == "cka"
    selection = select_layers(
        model, batches() if cka else None, ratio, criterion=criterion, seed=seed, progress=False, paper=cka
    )
    adapted = get_peft_model(model, LoraConfig(**lora, **selection.lora_kwargs()))
    # of the adapters alone: a classifier's head is trained in every variant
    trainable = sum(p.numel() for key, p in adapted.named_parameters() if "lora_" in key)
    return adapted, {"trainable": trainable, "layers": str(list(selection.layers))}


def trained(options: Any, train: Any, test: Any, name: str, seed: int, steps: int) -> dict[str, Any]:
    """Choose the layers, train, and measure the accuracy."""
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=2, dtype=torch.float32)
    texts = [train[i]["sentence"] for i in range(min(1000, len(train)))]
    adapted, row = with_adapters(
        model, name, seed, lambda: calibration(texts, tokenizer, 512, 128), r=8, lora_alpha=16, task_type="SEQ_CLS"
    )

    def encoded(rows: Any) -> list[dict[str, Any]]:
        return [{**tokenizer(row["sentence"], truncation=True, max_length=128), "label": row["label"]} for row in rows]

    with TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=32,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            seed=seed,
            bf16=options.bf16,
            use_cpu=not torch.accelerator.is_available(),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(adapted, settings, train_dataset=encoded(train), processing_class=tokenizer)
        trainer.train()
        answers = trainer.predict(encoded(test))
    accuracy = 100 * float((answers.predictions.argmax(-1) == answers.label_ids).mean())
    return {**row, "accuracy": accuracy}


if __name__ == "__main__":
    main()
