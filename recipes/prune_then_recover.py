"""Prune a model to a ratio, heal it with LoRA, and save it with its record.

    python recipes/prune_then_recover.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset trl-lib/Capybara \\
        --ratio 0.2 --max_steps 400 --output_dir pruned-recovered

MLP units go by structured Wanda, and least squares refits what is left, so the result loads in stock classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_cka import PruningConfig, calibration, prune, recover, save_pruned
from hf_cka.data import load_rows
from hf_cka.pruning.width_budgets import WidthSettings
from hf_cka.training import RecoveryConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Prune, recover, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a Hub id or a folder")
    parser.add_argument("--dataset", default="trl-lib/Capybara", help="a Hub id, or a jsonl, csv, txt or parquet file")
    parser.add_argument("--ratio", type=float, default=0.2, help="parameters to remove, of all")
    parser.add_argument("--criterion", default="wanda", help="of width pruning")
    parser.add_argument("--samples", type=int, default=128, help="rows of the dataset that the choice is made on")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA")
    parser.add_argument("--max_steps", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--output_dir", default="pruned-recovered")
    options = parser.parse_args(arguments)

    model = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = load_rows(options.dataset)
    config = PruningConfig(
        method="width",
        criterion=options.criterion,
        ratio=options.ratio,
        repair="least_squares",
        width=WidthSettings(structures="units"),
    )
    pruned = prune(model, calibration(rows, tokenizer, options.samples, options.max_length), config)
    recovery = RecoveryConfig("lora", rank=options.rank)
    result = recover(
        pruned.model,
        rows,
        recovery,
        processing_class=tokenizer,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        max_length=options.max_length,
    )
    print(result.losses)
    record = {"method": config.method, "settings": config.to_dict(), "recovery": recovery.to_dict()}
    print(save_pruned(result.model, options.output_dir, tokenizer=tokenizer, record=record))


if __name__ == "__main__":
    main()
