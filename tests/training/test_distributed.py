"""Two processes prune and train as one does: the same plan, the same losses, ranks in step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# `accelerate launch`, where --cpu starts one process whatever --num_processes says (accelerate 1.15), and --multi_gpu
# as many as asked, of which the Trainer's use_cpu makes gloo processes. Port 0 is a free one.
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=1", "--main_process_port=0"]
LAUNCH += ["--mixed_precision=no", "--dynamo_backend=no"]
# Dropout is off: it is drawn per process. Gradient checkpointing makes DDP expect every parameter, as under TRL.
SCRIPT = """
import json, sys, time, torch
from hf_cka import PruningConfig, PruningSchedule, TrainerPlugin
from tests.tiny import tiny_model
from tests.training.runs import trainer_for

folder, method, mode, size = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
config = {
    "depth": PruningConfig(method="depth", criterion="cka", num_layers=2, steps=2, pooling="last"),
    "width": PruningConfig(method="width", criterion="amp", ratio=0.2, repair="least_squares"),
}[method]
model = tiny_model("llama", num_hidden_layers=6, num_key_value_heads=4)
settings = dict(
    per_device_train_batch_size=size, max_steps=6, save_steps=100, gradient_checkpointing=True, learning_rate=1e-3
)
if torch.distributed.is_torchelastic_launched():
    settings["ddp_backend"] = "gloo"
plugin = TrainerPlugin(config, PruningSchedule(start=2, end=4, events=2), calibration_samples=8, mode=mode)
trainer = plugin.attach(trainer_for(model, folder + "/out", **settings))
if trainer.args.process_index == 1:  # the others must wait for a slow one
    save = trainer._save_rng_state
    trainer._save_rng_state = lambda folder: (time.sleep(1), save(folder))
trainer.train()
print("wrapped in", type(trainer.model_wrapped).__name__)
result = {
    "losses": [e["loss"] for e in trainer.state.log_history if "loss" in e],
    "plan": trainer.pruning.plan.to_dict(),
    "sum": sum(float(p.detach().double().abs().sum()) for p in trainer.model.parameters()),
    "wrapped": type(trainer.model_wrapped).__name__,
}
with open(f"{folder}/rank{trainer.args.process_index}.json", "w") as file:
    json.dump(result, file)
"""


def launched(folder: Path, text: str, processes: int, *arguments: str) -> list[dict]:
    """What each process of a script leaves in ``rank0.json`` and so on of the folder, its first argument."""
    folder.mkdir()
    script = folder / "train.py"
    script.write_text(text)
    run = [sys.executable]
    if processes > 1:
        run += [*LAUNCH, f"--num_processes={processes}"]
    done = subprocess.run(
        [*run, str(script), str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]


REBUILT = """
import os, sys, warnings
import torch
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from hf_cka.training.distributed import rebuild_ddp

seen = []

def hook(state, bucket):
    seen.append(state)
    return default_hooks.allreduce_hook(None, bucket)

torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
ddp = DistributedDataParallel(module, find_unused_parameters=False)
ddp.register_comm_hook("compression", hook)
real = torch.distributed.Reducer

def out_of_memory(*args, **kwargs):
    raise MemoryError

torch.distributed.Reducer = out_of_memory
try:
    rebuild_ddp(ddp)
except MemoryError:
    torch.distributed.Reducer = real
for _ in range(2):  # as before the failure
    ddp(torch.ones(1, 4)).sum().backward()
assert set(seen) == {"compression"}
seen.clear()
module[0] = torch.nn.Identity()
module[1] = torch.nn.Linear(4, 2)
with warnings.catch_warnings():
    warnings.simplefilter("error")
    rebuild_ddp(ddp)
for _ in range(2):  # a reducer that waits for what is gone fails in the second
    ddp(torch.ones(1, 4)).sum().backward()
assert torch.equal(module[1].weight.grad, torch.full((2, 4), 2.0))
assert set(seen) == {"compression"}
assert ddp.broadcast_buffers
assert not ddp.find_unused_parameters
print("as before", flush=True)
os._exit(0)  # a reducer that goes after its process group waits for gloo's threads for ever
"""


def test_a_rebuilt_ddp_keeps_its_settings_and_hooks_and_a_failed_one_everything(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", REBUILT, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "as before" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("method", "mode"), [("depth", "inplace"), ("width", "inplace"), ("depth", "boundary")])
def test_two_processes_equal_one(method, mode, tmp_path):
    (one,) = launched(tmp_path / "one", SCRIPT, 1, method, mode, "8")
    two = launched(tmp_path / "two", SCRIPT, 2, method, mode, "4")
    assert two[0]["wrapped"] == "DistributedDataParallel"
    assert two[0]["plan"] == two[1]["plan"] == one["plan"]
    assert two[0]["sum"] == two[1]["sum"]
    if mode == "boundary":
        for step in (2, 4):
            saved = {file.name for file in (tmp_path / "two" / "out" / f"checkpoint-{step}").glob("rng_state*")}
            assert saved == {"rng_state_0.pth", "rng_state_1.pth"}
    assert two[0]["losses"] == pytest.approx(one["losses"], rel=1e-3)
    assert two[0]["sum"] == pytest.approx(one["sum"], rel=1e-3)
