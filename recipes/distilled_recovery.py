"""Heal a pruned model on what its dense parent says instead of on labels: logit distillation.

    hf-cka prune --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset data.jsonl --ratio 0.2 --output pruned
    python recipes/distilled_recovery.py --model pruned --teacher HuggingFaceTB/SmolLM2-135M-Instruct \\
        --dataset data.jsonl --max_steps 400 --output_dir pruned-distilled

Source: Minitron, arXiv 2407.14679, section 3 (the divergence from the parent alone, no labels).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_cka import load_pruned, recover, save_pruned
from hf_cka.data import load_rows, public_name
from hf_cka.training import DistillationConfig, RecoveryConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the pruned model to answer as its parent does, and save it with its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the pruned model: a folder or a Hub id")
    parser.add_argument("--teacher", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="the model it was pruned from")
    parser.add_argument("--dataset", default="trl-lib/Capybara", help="a Hub id, or a jsonl, csv, txt or parquet file")
    parser.add_argument("--method", default="lora", help="lora, norms or full")
    parser.add_argument("--weight", type=float, default=1.0, help="of the teacher in the loss; the rest is the labels'")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--hidden_weight", type=float, default=0.0, help="of the hidden states of the layers kept")
    parser.add_argument("--max_steps", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--output_dir", default="pruned-distilled")
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    recovery = RecoveryConfig(options.method)
    distillation = DistillationConfig(options.weight, options.temperature, options.hidden_weight)
    result = recover(
        load_pruned(options.model),
        load_rows(options.dataset),
        recovery,
        processing_class=tokenizer,
        teacher=AutoModelForCausalLM.from_pretrained(options.teacher),
        distillation=distillation,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        max_length=options.max_length,
    )
    print(result.losses)
    record = recovery.to_dict() | {"distillation": distillation.to_dict(), "teacher": public_name(options.teacher)}
    print(save_pruned(result.model, options.output_dir, tokenizer=tokenizer, record={"recovery": record}))


if __name__ == "__main__":
    main()
