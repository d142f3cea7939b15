"""Align a pruned model with DPO, against the dense model as reference.

    hf-cka prune --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset trl-lib/Capybara --ratio 0.2 --output pruned
    python recipes/dpo_pruned.py --policy pruned --reference HuggingFaceTB/SmolLM2-135M-Instruct --output_dir dpo

Without a reference of its own TRL takes the policy before training, and a pruned policy would be held to what pruning
broke. Any checkpoint of `save_pruned` will do, layers that differ included; the result is saved like it.
Source of the loss: Rafailov et al. 2023, arXiv 2305.18290.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from hf_cka import load_pruned, save_pruned
from hf_cka.data import load_rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the pruned policy and save it so that `from_pretrained` loads it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, help="a pruned checkpoint: a folder or a Hub id")
    parser.add_argument("--reference", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="the dense model")
    parser.add_argument("--dataset", default="trl-lib/ultrafeedback_binarized", help="prompt, chosen, rejected")
    parser.add_argument("--beta", type=float, default=0.1, help="how strongly the policy is held to the reference")
    parser.add_argument("--max_steps", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--output_dir", default="dpo-pruned")
    options = parser.parse_args(arguments)

    policy = load_pruned(options.policy, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(options.reference)
    if reference.config.vocab_size != policy.config.vocab_size:
        sizes = f"{reference.config.vocab_size} and {policy.config.vocab_size} tokens"
        raise SystemExit(f"Reference and policy know {sizes}; the reference must be the model that was pruned.")
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(
            options.output_dir,
            beta=options.beta,
            max_steps=options.max_steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            max_length=options.max_length,
            use_cpu=not torch.accelerator.is_available(),
            bf16=torch.accelerator.is_available(),
        ),
        train_dataset=load_rows(options.dataset),
        processing_class=AutoTokenizer.from_pretrained(options.reference),
    )
    trainer.train()
    print(save_pruned(trainer.model, f"{options.output_dir}/final", tokenizer=trainer.processing_class))


if __name__ == "__main__":
    main()
