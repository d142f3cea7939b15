"""What holds for every method of prune(): it resumes, shares nothing, and does not depend on how data is cut."""

from __future__ import annotations

import copy
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_cka import PruningConfig
from hf_cka.modeling.plan import PruningPlan
from hf_cka.pruning.config import METHODS, PAPERS
from hf_cka.pruning.criteria import DEPTH
from hf_cka.pruning.history import FILE, PruningHistory
from tests.pruning.runs import BATCHES, MODEL, run
from tests.tiny import tiny_model

EVERY_METHOD = [
    PruningConfig(num_layers=2),
    PruningConfig(ratio=0.3, structures="sublayers"),
    PruningConfig(num_layers=3, steps=2, criterion="consensus"),
    PruningConfig(num_layers=2, criterion="random", seed=3),
    PruningConfig(method="width", ratio=0.3, steps=3),
    PruningConfig(method="mop", ratio=0.35),
    PruningConfig(method="mop", num_layers=3, path="random"),
]


@pytest.mark.parametrize("config", EVERY_METHOD, ids=lambda c: f"{c.method}-{c.criterion}-{c.structures}")
def test_an_interrupted_run_goes_on_to_the_same_end(config, tmp_path):
    whole = run(config)
    assert len(whole.history.steps) >= 2

    def interrupt(step):
        raise KeyboardInterrupt

    before = {name: value.clone() for name, value in MODEL.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        run(config, output=tmp_path, on_step=interrupt)
    assert all(torch.equal(before[name], value) for name, value in MODEL.state_dict().items())
    assert MODEL.config.num_hidden_layers == 8
    done = PruningHistory.load(tmp_path)
    assert len(done.steps) == 1
    seen = []
    resumed = run(config, output=tmp_path, on_step=seen.append)
    assert [step.step for step in seen] == list(range(1, len(whole.history.steps) + 1))
    assert resumed.plan == whole.plan
    assert resumed.history == whole.history
    assert PruningHistory.load(tmp_path) == whole.history
    json.loads((tmp_path / FILE).read_text(), parse_constant=lambda word: pytest.fail(f"not strict JSON: {word}"))
    with torch.no_grad():
        assert torch.equal(resumed.model(**BATCHES[0]).logits, whole.model(**BATCHES[0]).logits)


def test_a_tuned_run_goes_on_with_its_weights(tmp_path):
    def tune(model):
        with torch.no_grad():
            model.lm_head.weight.mul_(1.01)

    config = PruningConfig(method="everything", num_layers=2, criterion="cka", width_criterion="amp")
    whole = run(config, tune=tune)
    count = itertools.count()

    def interrupt(step):
        if next(count) == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, tune=tune, output=tmp_path, on_step=interrupt)
    resumed = run(config, tune=tune, output=tmp_path)
    with torch.no_grad():
        assert torch.equal(resumed.model(**BATCHES[0]).logits, whole.model(**BATCHES[0]).logits)


def test_another_run_is_not_gone_on_with(tmp_path):
    run(num_layers=1, output=tmp_path)
    with pytest.raises(ValueError, match="num_layers was 1, is 2"):
        run(num_layers=2, output=tmp_path)
    with pytest.raises(ValueError, match="another calibration"):
        run(num_layers=1, output=tmp_path, batches=BATCHES[:1])
    with pytest.raises(ValueError, match="another model"):
        run(
            num_layers=1, output=tmp_path, model=tiny_model("llama", seed=1, num_hidden_layers=8, num_key_value_heads=4)
        )


@pytest.mark.parametrize("config", EVERY_METHOD, ids=lambda c: f"{c.method}-{c.criterion}-{c.structures}")
def test_the_result_shares_nothing_with_the_model_given(config):
    result = run(config)
    mine = {p.data_ptr() for p in MODEL.parameters()}
    assert not mine & {p.data_ptr() for p in result.model.parameters()}


def test_in_place_changes_the_model_given():
    model = copy.deepcopy(MODEL)
    result = run(num_layers=2, model=model, inplace=True)
    assert result.model is model
    assert model.config.num_hidden_layers == 6
    with torch.no_grad():
        assert torch.equal(model(**BATCHES[0]).logits, run(num_layers=2).model(**BATCHES[0]).logits)


@pytest.mark.parametrize("rows", [2, 12])
def test_the_batch_size_does_not_matter(rows):
    together = {key: torch.cat([batch[key] for batch in BATCHES]) for key in BATCHES[0]}
    parts = [{key: value[i : i + rows] for key, value in together.items()} for i in range(0, 12, rows)]
    for method in ("depth", "mop"):
        assert run(method=method, ratio=0.35, batches=parts).plan == run(method=method, ratio=0.35).plan


_WORKER = """
import sys, pathlib
import torch.distributed as dist
from hf_cka import PruningConfig, prune
from tests.tiny import tiny_batch, tiny_model
rank, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
batches = [tiny_batch(6, length=8, seed=s) for s in range(2)]
model = tiny_model("llama", num_hidden_layers=8, num_key_value_heads=4)
parts = [("sharded", batches[rank : rank + 1]), ("same", batches)]
for mode, part in parts:
    result = prune(model, part, PruningConfig(method="mop", ratio=0.35), progress=False, output=folder / mode)
    (folder / f"{mode}-{rank}.json").write_text(result.plan.to_json())
dist.destroy_process_group()
"""


def test_two_processes_remove_what_one_removes(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", _WORKER]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    workers = [subprocess.Popen([*command, str(rank), str(tmp_path)], cwd=root, env=environment) for rank in range(2)]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    alone = run(method="mop", ratio=0.35).plan
    for name in ("sharded-0", "sharded-1", "same-0", "same-1"):
        assert PruningPlan.from_json((tmp_path / f"{name}.json").read_text()) == alone


def test_a_generator_of_batches_will_do():
    assert run(num_layers=2, batches=(b for b in BATCHES)).plan == run(num_layers=2).plan


def test_an_offloaded_model_is_pruned():
    from accelerate import cpu_offload

    model = copy.deepcopy(MODEL)
    model.hf_device_map = {"": "cpu"}
    cpu_offload(model, execution_device="cpu")
    result = run(num_layers=2, model=model)
    assert result.plan == run(num_layers=2).plan
    with torch.no_grad():
        assert torch.equal(result.model(**BATCHES[0]).logits, run(num_layers=2).model(**BATCHES[0]).logits)


@pytest.mark.parametrize("name", PAPERS)
def test_every_paper_is_a_config(name):
    config = PruningConfig.paper(name, ratio=0.2)
    assert PruningConfig.from_json(config.to_json()) == config
    assert config.method in METHODS


@pytest.mark.parametrize("name", [n for n in DEPTH if n not in ("consensus_by_class", "cca", "loraprune")])
def test_every_criterion_prunes(name):
    result = run(criterion=name, num_layers=1, model=tiny_model("llama"))
    assert result.model.config.num_hidden_layers == 3
