"""Fine-tune an encoder on a GLUE classification task, with LoRA in the layers that CKA chooses.

    python recipes/glue_encoder.py --model FacebookAI/roberta-base --task sst2 --output_dir roberta-sst2
    python recipes/glue_encoder.py --train train.jsonl --validation dev.jsonl --output_dir mine

Local files hold `sentence` (or `sentence1` and `sentence2`) and `label`. Rank, alpha, and the choice of layers (CLS,
biased CKA, never the first layer) are those of arXiv 2602.05988 for RoBERTa-base.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from hf_cka import CKALoraConfig, calibration
from hf_cka.data import load_rows

# the columns that hold text, in the tasks of GLUE
COLUMNS = (("sentence", None), ("sentence1", "sentence2"), ("question1", "question2"), ("question", "sentence"))
COLUMNS += (("premise", "hypothesis"),)


def main(arguments: Sequence[str] | None = None) -> None:
    """Choose the layers, train, and report the accuracy on the validation part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="FacebookAI/roberta-base", help="a Hub id or a folder")
    parser.add_argument("--task", default="sst2", help="of nyu-mll/glue: sst2, mrpc, qqp, qnli, rte, cola, wnli")
    parser.add_argument("--train", help="a local file instead of the task's training part")
    parser.add_argument("--validation", help="likewise, for its validation part")
    parser.add_argument("--keep_ratio", type=float, default=0.5, help="share of the layers to adapt")
    parser.add_argument("--max_steps", type=int, default=-1, help="by default three epochs")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=4e-4)
    parser.add_argument("--output_dir", default="glue-encoder")
    options = parser.parse_args(arguments)

    train = load_rows(options.train or f"nyu-mll/glue:{options.task}")
    validation = load_rows(options.validation or f"nyu-mll/glue:{options.task}", "validation")
    first, second = next(pair for pair in reversed(COLUMNS) if {*filter(None, pair)} <= set(train.column_names))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = [
        " ".join(filter(None, (row[first], row.get(second)))) for row in train.select(range(min(2000, len(train))))
    ]
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=max(train["label"]) + 1)
    config = CKALoraConfig(
        r=8, lora_alpha=16, task_type="SEQ_CLS", paper=True, keep_ratio=options.keep_ratio,
        calibration=calibration(texts, tokenizer, num_samples=512, max_length=128),
    )  # fmt: skip
    model = get_peft_model(model, config)
    print(config.selection)

    def encode(rows: dict) -> dict:
        return tokenizer(rows[first], rows[second] if second else None, truncation=True, max_length=128)

    settings = TrainingArguments(
        options.output_dir,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        use_cpu=not torch.accelerator.is_available(),
    )
    data = {"train_dataset": train.map(encode, batched=True), "eval_dataset": validation.map(encode, batched=True)}
    trainer = Trainer(model, settings, **data, processing_class=tokenizer, compute_metrics=accuracy)
    trainer.train()
    print(f"accuracy {trainer.evaluate()['eval_accuracy']:.4f}")
    trainer.save_model(f"{options.output_dir}/final")


def accuracy(answers: tuple) -> dict[str, float]:
    """Share of rows that are classified as labelled."""
    return {"accuracy": float((answers[0].argmax(-1) == answers[1]).mean())}


if __name__ == "__main__":
    main()
