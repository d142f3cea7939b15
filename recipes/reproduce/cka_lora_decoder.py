"""Layer-wise LoRA by CKA (arXiv 2602.05988) on decoders: instruction tuning with adapters in half of the layers.

    python -m recipes.reproduce.cka_lora_decoder [--model meta-llama/Llama-2-7b-hf]
    python -m recipes.reproduce.cka_lora_decoder --small --assets FOLDER [--bf16]

Scores are 1 - CKA (biased) of the last token before and after each layer on 128 training samples. Rank and alpha 128,
no dropout, all projections, learning rate 2e-5 (cosine, warm-up 0.03), 1 epoch of batches of 16, 512 tokens, as in the
paper. It learns from 100,000 rows of MetaMathQA and is judged by GSM8K. `--small` trains 30 steps of 8 instructions
and is judged by the loss of 100 held-out responses. All layers and a random half are trained alike, with every seed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from hf_cka import calibration
from hf_cka.data import load_rows
from hf_cka.evaluation import completion_loss, evaluate
from recipes.reproduce.cka_lora import MEANING, judge, run_all, with_adapters
from recipes.reproduce.common import Paper, open_model, parse

PAPER = Paper(
    "cka_lora_decoder",
    "Layer-wise LoRA fine-tuning: a similarity metric approach (decoders)",
    "2602.05988",
    "model, data and task, which are our choice of the paper's kinds.",
)


@dataclass(frozen=True)
class Task:
    """What is learnt, and how long. Rows have ``prompt`` and ``completion``; with -1 step it is one epoch."""

    train: Dataset
    held_out: Sequence[dict[str, str]]
    batch_size: int
    learning_rate: float
    steps: int

    def __str__(self) -> str:
        long = f"{self.steps} steps" if self.steps > 0 else "1 epoch"
        return f"{long} of {self.batch_size} rows, learning rate {self.learning_rate:g} (cosine, warm-up 0.03)"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train each variant with every seed, and judge."""
    options = parse(PAPER, __doc__, "meta-llama/Llama-2-7b-hf", arguments)
    task = instructions(options) if options.small else mathematics(options)
    runs = run_all(options, lambda name, seed: trained(options, task, name, seed))
    what = "1,000 instructions" if options.small else "MetaMathQA"
    settings = f"{what}, {len(options.seeds)} seeds, LoRA rank 128, alpha 128; {task}. {MEANING}"
    paper = PAPER
    if options.small:
        paper = replace(paper, differs=paper.differs + " The learning rate is ten times higher, as training is short.")
        judge(paper, options, settings, runs, "held-out loss", "nats a token", lower=True)
    else:
        judge(paper, options, settings, runs, "GSM8K", "points")


def instructions(options: Any) -> Task:
    """Return the local instructions: 1,000 to learn from, 100 held out."""
    rows = json.loads((options.assets / "instruct" / "instruction_1100.json").read_text())
    rows = [
        {"prompt": f"{row['instruction']}\n{row['input']}".strip() + "\n\n", "completion": row["output"]}
        for row in rows
    ]
    return Task(Dataset.from_list(rows[:1000]), rows[1000:], 8, 2e-4, options.steps or 30)


def mathematics(options: Any) -> Task:
    """Return questions of school mathematics, asked as lm-eval's GSM8K asks them."""
    data = load_rows("meta-math/MetaMathQA")
    data = data.select(range(min(100_000, len(data))))
    train = data.map(
        lambda row: {"prompt": f"Question: {row['query']}\nAnswer: ", "completion": row["response"]},
        remove_columns=data.column_names,
    )
    return Task(train, (), 16, 2e-5, options.steps or -1)


def trained(options: Any, task: Task, name: str, seed: int) -> dict[str, Any]:
    """Choose the layers, train, and measure."""
    set_seed(seed)
    model, tokenizer = open_model(options)
    adapted, row = with_adapters(
        model,
        name,
        seed,
        lambda: calibration(task.train, tokenizer, 128, 512, options.seed),
        r=128,
        lora_alpha=128,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    with TemporaryDirectory() as folder:
        settings = SFTConfig(
            folder,
            max_steps=task.steps,
            num_train_epochs=1,
            per_device_train_batch_size=task.batch_size,
            learning_rate=task.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            max_length=512,
            gradient_checkpointing=not options.small,
            seed=seed,
            bf16=options.bf16 or not options.small,
            use_cpu=not torch.accelerator.is_available(),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(adapted, settings, train_dataset=task.train, processing_class=tokenizer)
        trainer.train()
    merged = trainer.model.merge_and_unload().eval()
    if options.small:
        return {**row, "held-out loss": completion_loss(merged, tokenizer, task.held_out, progress=False).value}
    metrics = evaluate(merged, ("gsm8k",), tokenizer=tokenizer).tasks[0].metrics
    return {**row, "GSM8K": 100 * metrics["exact_match (flexible-extract)"]}


if __name__ == "__main__":
    main()
