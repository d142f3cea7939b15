"""FSDP2 by the boundary mode: sharded while training, whole while pruned, and the same run as in one process."""

from __future__ import annotations

import pytest

from tests.training.test_distributed import launched

SCRIPT = """
import json, shutil, sys, torch
from torch.distributed.fsdp import FSDPModule, fully_shard
from hf_cka import PruningConfig, PruningSchedule, TrainerPlugin
from hf_cka.training.checks import check_run
from hf_cka.training.sharding import is_sharded
from tests.tiny import tiny_model
from tests.training.runs import ShardingTrainer, sharded, trainer_for

folder, method, size, kind, recovery = sys.argv[1:]
config = {
    "depth": PruningConfig(method="depth", criterion="cka", num_layers=2, steps=2, pooling="last"),
    "width": PruningConfig(method="width", criterion="amp", ratio=0.2, repair="least_squares"),
}[method]

def attached(out):
    model = tiny_model("llama", num_hidden_layers=6, num_key_value_heads=4, tie_word_embeddings=method == "depth")
    model.enable_input_require_grads()  # a hook whose handle the model holds
    settings = dict(per_device_train_batch_size=int(size), max_steps=6, gradient_checkpointing=True, learning_rate=1e-3)
    if kind != "none":
        settings |= sharded(kind) | {"ddp_backend": "gloo", "kind": ShardingTrainer}
    plugin = TrainerPlugin(
        config,
        PruningSchedule(start=2, end=4, events=2),
        calibration_samples=8,
        mode="boundary",
        recovery=None if recovery == "none" else recovery,
    )
    return plugin.attach(trainer_for(model, out, **settings))

def run(resume=None, out=folder + "/out"):
    trainer = attached(out)
    trainer.train(resume_from_checkpoint=resume)
    return trainer

def killed():
    raise KeyboardInterrupt

def whole(trainer):
    assert is_sharded(trainer.model) == (kind != "none")
    return [p.full_tensor() if kind != "none" else p.detach() for p in trainer.model.parameters()]

trainer = run()
result = {
    "losses": [e["loss"] for e in trainer.state.log_history if "loss" in e],
    "plan": trainer.pruning.plan.to_dict(),
    "sum": sum(float(p.double().abs().sum()) for p in whole(trainer)),
    "sharded": sum(isinstance(module, FSDPModule) for module in trainer.model.modules()),
}
if kind != "none":
    broken = attached(folder + "/killed")
    broken._prune_at_boundary = killed
    try:
        broken.train()
    except KeyboardInterrupt:
        pass
    # between the pruning steps, after both, and at one that was due when the run was killed
    for out, step in (("out", 3), ("out", 5), ("killed", 2)):
        again = run(f"{folder}/{out}/checkpoint-{step}", f"{folder}/{out}")
        assert all(torch.equal(a, b) for a, b in zip(whole(again), whole(trainer), strict=True))
    model = fully_shard(tiny_model("llama"))  # by hand, which the Trainer does not know
    given = TrainerPlugin(config, mode="boundary").attach(trainer_for(model, folder, ddp_backend="gloo"))
    given.is_fsdp_enabled = False
    try:
        check_run(given.pruning, given.args, model, None)
    except ValueError as error:
        result["refused"] = str(error)
with open(f"{folder}/rank{trainer.args.process_index}.json", "w") as file:
    json.dump(result, file)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "kind", "recovery"),
    [("depth", "FULL_STATE_DICT", "lora"), ("width", "SHARDED_STATE_DICT", "none")],
)
def test_sharded_processes_equal_one_and_resume_bit_for_bit(method, kind, recovery, tmp_path):
    (one,) = launched(tmp_path / "one", SCRIPT, 1, method, "8", "none", recovery)
    two = launched(tmp_path / "two", SCRIPT, 2, method, "4", kind, recovery)
    assert two[0]["sharded"] > one["sharded"] == 0
    assert two[0]["plan"] == two[1]["plan"] == one["plan"]
    assert two[0]["sum"] == two[1]["sum"]
    assert two[0]["losses"] == pytest.approx(one["losses"], rel=1e-3)
    assert two[0]["sum"] == pytest.approx(one["sum"], rel=1e-3)
    assert "sharded (DTensor)" in two[0]["refused"]
