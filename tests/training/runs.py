"""What the tests of pruning during training share: a tiny model, rows, and a Trainer over them."""

from __future__ import annotations

import torch
from accelerate.utils import DistributedType
from transformers import Trainer, TrainingArguments

from tests.tiny import tiny_model

STEPS = 8


def rows(count: int = 32, length: int = 8, seed: int = 0) -> list[dict]:
    ids = torch.randint(3, 96, (count, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


def llama(**changes):
    return tiny_model("llama", num_hidden_layers=6, num_key_value_heads=4, attention_dropout=0.1, **changes)


def trainer_for(model, folder, kind: type[Trainer] = Trainer, **changes) -> Trainer:
    """Save every step, so that a test can go on from any."""
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    return kind(model, TrainingArguments(str(folder), **settings), train_dataset=rows(), eval_dataset=rows(8))


class ShardingTrainer(Trainer):
    """Shards on CPUs as a Trainer does on GPUs.

    accelerate 1.15 takes an FSDP plugin only where it believes in several accelerators (`AcceleratorState.__init__`);
    on CPUs a Trainer with ``fsdp=`` runs under DDP without a word. All that comes after that choice runs on gloo.
    """

    def create_accelerator_and_postprocess(self) -> None:
        self.args.distributed_state.distributed_type = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()


def sharded(state_dict_type: str) -> dict:
    """Arguments of a Trainer that shards every layer."""
    config = {"version": 2, "state_dict_type": state_dict_type, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    return {"fsdp": "full_shard auto_wrap", "fsdp_config": config}


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def moments(trainer) -> list[torch.Tensor]:
    """Every state of the optimizer, in the order of its parameters."""
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return [
        value.detach().clone()
        for group in inner.param_groups
        for parameter in group["params"]
        for _, value in sorted(inner.state[parameter].items())
    ]


def assert_same_run(left, right) -> None:
    """Weights, optimizer and learning rate, to the last bit."""
    a, b = weights(left), weights(right)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    x, y = moments(left), moments(right)
    assert len(x) == len(y) > 0
    assert all(torch.equal(u, v) for u, v in zip(x, y, strict=True))
    assert left.lr_scheduler.get_last_lr() == right.lr_scheduler.get_last_lr()
    assert left.state.global_step == right.state.global_step
