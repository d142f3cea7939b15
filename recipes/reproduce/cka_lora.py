"""Layer-wise LoRA by CKA (arXiv 2602.05988): adapters in the half of the layers that change their input most.

    python -m recipes.reproduce.cka_lora [--model FacebookAI/roberta-base] [--task sst2]
    python -m recipes.reproduce.cka_lora --small --assets FOLDER [--model ENCODER]

Scores are 1 - CKA (biased) of CLS before and after each layer on training samples; the first layer, whose CLS is
constant, never ranks. Rank 8, alpha 16, as in the paper for RoBERTa-base; learning rate and epochs are ours.
`--small` trains MiniLM (sentence-transformers/all-MiniLM-L6-v2) for 100 steps on SST-2. All layers and a random half
are trained alike, with every seed. For decoders: recipes/cka_lora_sft.py, and benchmarks/lora_selection.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
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
    rows = open_rows(options)
    steps = options.steps or (100 if options.small else -1)

    def run(name: str, seed: int) -> dict[str, Any]:
        return rows.get(f"{name}, seed {seed}", lambda: trained(options, train, test, name, seed, steps))

    runs = {name: [run(name, seed) for seed in options.seeds] for name in VARIANTS}
    table = {
        name: {
            "trainable": f"{found[0]['trainable']:,}",
            "accuracy": mean(row["accuracy"] for row in found),
            "spread": stdev([row["accuracy"] for row in found]) if len(found) > 1 else 0.0,
            "layers": found[0]["layers"] if name != "random half" else "drawn",
        }
        for name, found in runs.items()
    }
    every, half, chance = table.values()
    share = runs["CKA half"][0]["trainable"] / runs["all layers"][0]["trainable"]
    gained, error = difference(half, every, len(options.seeds))
    over_chance, chance_error = difference(half, chance, len(options.seeds))
    claims = [
        Claim(
            "half of the adapters, the same quality",
            f"{gained:+.2f} ± {error:.2f} points with {share:.0%} of the parameters",
            True if gained >= -error else False if gained < -2 * error else None,
        ),
        Claim(
            "(our control) CKA chooses better than chance",
            f"{over_chance:+.2f} ± {chance_error:.2f} points against a random half",
            None if abs(over_chance) <= 2 * chance_error else over_chance > 0,
        ),
    ]
    how = f"{steps} steps" if steps > 0 else "3 epochs"
    settings = (
        f"SST-2, {len(options.seeds)} seeds, LoRA rank 8, alpha 16; {how} of 16 sentences, learning rate 1e-3 "
        f"(cosine). Spread: standard deviation over the seeds. Differences: with their standard error; undecided "
        "within two of it, and the same quality within one."
    )
    write_report(PAPER, options, settings, table, claims, ("trainable", "layers", "accuracy", "spread"))


def difference(first: dict[str, Any], second: dict[str, Any], count: int) -> tuple[float, float]:
    """Return how much more accurate the first is, and the standard error of that."""
    return first["accuracy"] - second["accuracy"], math.hypot(first["spread"], second["spread"]) / math.sqrt(count)


def trained(options: Any, train: Any, test: Any, name: str, seed: int, steps: int) -> dict[str, Any]:
    """Choose the layers, train, and measure the accuracy."""
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=2, dtype=torch.float32)
    criterion, ratio = VARIANTS[name]
    texts = [train[i]["sentence"] for i in range(min(1000, len(train)))]
    selection = select_layers(
        model,
        calibration(texts, tokenizer, 512, 128) if criterion == "cka" else None,
        ratio,
        criterion=criterion,
        seed=seed,
        progress=False,
        paper=criterion == "cka",
    )
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, task_type="SEQ_CLS", **selection.lora_kwargs()))

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
    trainable = sum(p.numel() for key, p in adapted.named_parameters() if "lora_" in key)
    return {"accuracy": accuracy, "trainable": trainable, "layers": str(list(selection.layers))}


if __name__ == "__main__":
    main()
