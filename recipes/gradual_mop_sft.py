"""Prune by MoP while fine-tuning with TRL: a layer or as much width goes at a time, and training goes on in between.

    python recipes/gradual_mop_sft.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset trl-lib/Capybara \\
        --ratio 0.2 --events 4 --max_steps 400 --output_dir pruned-sft

Interrupted? The same command with `--resume` goes on from the last checkpoint, whatever was pruned by then.
Source of the method: MoP, arXiv 2602.06127; the path is decided by CKA to the parent here.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hf_cka import PruningConfig, PruningSchedule, TrainerPlugin, save_pruned
from hf_cka.data import load_rows
from hf_cka.pruning.width_budgets import WidthSettings


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, prune on the way, and save the result so that `from_pretrained` loads it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a Hub id or a folder")
    parser.add_argument("--dataset", default="trl-lib/Capybara", help="a Hub id, or a jsonl, csv, txt or parquet file")
    parser.add_argument("--ratio", type=float, default=0.2, help="parameters to remove, of all")
    parser.add_argument("--path", default="cka", help="cka, cosine, kl, perplexity, random, or a string of L and G")
    parser.add_argument("--events", type=int, default=4, help="pruning steps in the first half of the training")
    parser.add_argument("--max_steps", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--output_dir", default="pruned-sft")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)

    config = PruningConfig(
        method="mop",
        criterion="block_influence",
        path=options.path,
        ratio=options.ratio,
        width=WidthSettings(structures="units"),  # loads in stock classes, whatever the head count
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model),
        args=SFTConfig(
            options.output_dir,
            max_steps=options.max_steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            max_length=options.max_length,
            save_steps=max(1, options.max_steps // 10),
            use_cpu=not torch.accelerator.is_available(),
            bf16=torch.accelerator.is_available(),
        ),
        train_dataset=load_rows(options.dataset),
        processing_class=AutoTokenizer.from_pretrained(options.model),
    )
    plugin = TrainerPlugin(config, PruningSchedule(events=options.events))
    plugin.attach(trainer).train(resume_from_checkpoint=options.resume)
    print(trainer.pruning.history.table())
    record = {"method": config.method, "settings": config.to_dict()}
    print(save_pruned(trainer.model, f"{options.output_dir}/final", tokenizer=trainer.processing_class, record=record))


if __name__ == "__main__":
    main()
