"""Pruning a model that carries adapters, inside TRL's SFTTrainer: base and adapters go together, and runs resume."""

from __future__ import annotations

import shutil

import pytest
import torch

from hf_cka import PruningConfig, PruningSchedule, TrainerPlugin
from hf_cka.pruning.width_budgets import WidthSettings
from tests.training.runs import assert_same_run

pytest.importorskip("trl")

UNITS = WidthSettings(structures="units")
CONFIGS = {
    "depth": PruningConfig(method="depth", criterion="cka", num_layers=2, steps=2),
    "width": PruningConfig(method="width", criterion="amp", ratio=0.2),
    "mop": PruningConfig(method="mop", criterion="block_influence", path="LG", num_layers=2, width=UNITS),
}
STEPS = 6


def run(config, assets, tokenizer, folder, resume=None, mode="inplace"):
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    texts = [f"Once upon a time there was a {c} cat with {n} toys." for c in ("red", "blue", "black") for n in range(8)]
    torch.manual_seed(0)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(assets / "models" / "stories260k_hf", dtype=torch.float32),
        args=SFTConfig(
            str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            save_steps=1,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    schedule = PruningSchedule(start=2, end=4, events=2)
    TrainerPlugin(config, schedule, calibration_samples=8, mode=mode).attach(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.slow
@pytest.mark.assets
@pytest.mark.parametrize("name", CONFIGS)
def test_sft_with_lora_resumes_bit_for_bit(name, assets, stories, tmp_path):
    """Into the dense model with fresh adapters, from before, at, between and after the pruning steps."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from hf_cka import apply_plan

    config, tokenizer = CONFIGS[name], stories[1]
    whole = run(config, assets, tokenizer, tmp_path / "whole")
    assert len(whole.pruning.history.steps) == 2
    for step in (1, 2, 3, 5):
        (tmp_path / str(step)).mkdir()
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / str(step) / f"checkpoint-{step}")
        assert_same_run(run(config, assets, tokenizer, tmp_path / str(step), resume=True), whole)
    assert_same_run(run(config, assets, tokenizer, tmp_path / "boundary", mode="boundary"), whole)

    # the adapter on disk fits the pruned base
    base = AutoModelForCausalLM.from_pretrained(assets / "models" / "stories260k_hf", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(
        apply_plan(base, whole.pruning.plan), tmp_path / "whole" / f"checkpoint-{STEPS}"
    )
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        assert torch.equal(adapted.eval()(input_ids=ids).logits, whole.model.eval()(input_ids=ids).logits)
