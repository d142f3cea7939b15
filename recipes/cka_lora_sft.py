"""Fine-tune with TRL and LoRA in the layers that CKA chooses: two lines more than the same script with LoRA everywhere.

    python recipes/cka_lora_sft.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset trl-lib/Capybara \\
        --keep_ratio 0.5 --max_steps 400 --output_dir cka-lora-sft

The adapter that is written is plain LoRA and loads with `PeftModel.from_pretrained`, without hf_cka.
Source: layer-wise LoRA by CKA, arXiv 2602.05988 (`--paper` scores as the paper does, with the biased estimator).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hf_cka import CKALoraConfig, calibration
from hf_cka.data import load_rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Choose the layers, train, and save the adapter with the record of the choice beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a Hub id or a folder")
    parser.add_argument("--dataset", default="trl-lib/Capybara", help="a Hub id, or a jsonl, csv, txt or parquet file")
    parser.add_argument("--keep_ratio", type=float, default=0.5, help="share of the layers to adapt")
    parser.add_argument("--criterion", default="cka", help="cka, block_influence, random, first, last or all")
    parser.add_argument("--paper", action="store_true", help="score as arXiv 2602.05988 does")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--samples", type=int, default=128, help="rows of the dataset that the choice is made on")
    parser.add_argument("--max_steps", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--output_dir", default="cka-lora-sft")
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = load_rows(options.dataset)
    config = CKALoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        task_type="CAUSAL_LM",
        keep_ratio=options.keep_ratio,
        criterion=options.criterion,
        paper=options.paper,
        calibration=calibration(rows, tokenizer, options.samples, options.max_length),
        selection_file=f"{options.output_dir}/selection.json",  # started again, the script adapts the same layers
    )
    trainer = SFTTrainer(
        model=options.model,
        args=SFTConfig(
            options.output_dir,
            max_steps=options.max_steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            max_length=options.max_length,
            use_cpu=not torch.accelerator.is_available(),
            bf16=torch.accelerator.is_available(),
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=config,
    )
    print(config.selection)
    trainer.train()
    trainer.save_model(f"{options.output_dir}/final")


if __name__ == "__main__":
    main()
