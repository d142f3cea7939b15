"""Pruning inside the Trainer: survivors train on undisturbed, and interrupted runs equal uninterrupted ones."""

from __future__ import annotations

import gc
import json
import os
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainerCallback

from hf_cka import PruningCallback, PruningConfig, PruningSchedule, TrainerPlugin
from hf_cka.pruning.width_budgets import WidthSettings
from hf_cka.training import RecoveryConfig, finish_recovery
from hf_cka.training.checks import check_run
from tests.training.runs import STEPS, assert_same_run, llama, rows, trainer_for, weights

DEPTH = PruningConfig(method="depth", criterion="cka", num_layers=2, steps=2, pooling="last")
WIDTH = PruningConfig(method="width", criterion="amp", ratio=0.2, repair="least_squares")
MIXED = PruningConfig(
    method="mop", criterion="block_influence", path="LG", num_layers=2, width=WidthSettings(structures="units")
)
TWICE = PruningSchedule(start=2, end=5, events=2)
CONFIGS = {"depth": DEPTH, "width": WIDTH, "mop": MIXED}


def run(config, folder, mode="inplace", resume=None, **changes):
    trainer = TrainerPlugin(config, TWICE, calibration_samples=8, mode=mode).attach(
        trainer_for(llama(), folder, **changes)
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module", params=CONFIGS)
def whole(request, tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp(request.param)
    return CONFIGS[request.param], folder, run(CONFIGS[request.param], folder)


def test_the_model_shrinks_at_the_steps_of_the_schedule(whole):
    config, folder, trainer = whole
    sizes = [
        sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder / f"checkpoint-{step}").parameters())
        for step in range(1, STEPS + 1)
    ]
    assert sizes[0] > sizes[1] == sizes[2] == sizes[3] > sizes[4] == sizes[7]
    assert len(trainer.pruning.history.steps) == 2
    assert trainer.state.global_step == STEPS
    pruned = [entry["step"] for entry in trainer.state.log_history if "pruned_ratio" in entry]
    assert pruned == [2, 5]
    if config.ratio:
        assert trainer.pruning.history.steps[-1].ratio == pytest.approx(config.ratio, abs=0.01)


@pytest.mark.parametrize("step", [1, 2, 4, 5, 7])
def test_resuming_into_the_dense_model_equals_the_uninterrupted_run(whole, step, tmp_path):
    """Before, at, between and after the pruning steps; dropout makes the random numbers matter."""
    config, folder, trainer = whole
    shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    resumed = run(config, tmp_path, resume=True)
    assert_same_run(resumed, trainer)
    assert resumed.pruning.history == trainer.pruning.history


def test_the_boundary_mode_does_the_same(whole, tmp_path):
    config, _, trainer = whole
    assert_same_run(run(config, tmp_path, mode="boundary"), trainer)
    for step in (5, 1):
        for later in range(step + 1, STEPS + 1):
            shutil.rmtree(tmp_path / f"checkpoint-{later}")
        assert_same_run(run(config, tmp_path, mode="boundary", resume=True), trainer)


def test_a_boundary_that_was_not_pruned_before_the_kill_is_pruned_on_resume(tmp_path, monkeypatch):
    trainer = run(DEPTH, tmp_path / "whole")
    broken = TrainerPlugin(DEPTH, TWICE, calibration_samples=8, mode="boundary").attach(
        trainer_for(llama(), tmp_path / "killed")
    )
    monkeypatch.setattr(broken, "_prune_at_boundary", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "killed" / "checkpoint-2").config.num_hidden_layers == 6
    assert_same_run(run(DEPTH, tmp_path / "killed", mode="boundary", resume=True), trainer)


def test_a_kill_while_the_pruned_checkpoint_takes_its_place_loses_nothing(tmp_path, monkeypatch):
    trainer = run(DEPTH, tmp_path / "whole")
    move = os.replace

    def killed(source, target):
        if Path(source).parent.name == ".pruning":
            raise KeyboardInterrupt
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run(DEPTH, tmp_path / "killed", mode="boundary", save_strategy="no")
    assert not (tmp_path / "killed" / "checkpoint-2").exists()
    assert_same_run(run(DEPTH, tmp_path / "killed", mode="boundary", resume=True), trainer)


@pytest.mark.parametrize(("metric", "worse"), [("eval_loss", 1), ("eval_perplexity", 1), ("eval_accuracy", -1)])
def test_which_way_a_metric_gets_worse(metric, worse):
    callback = PruningCallback(DEPTH, TWICE, metric=metric, max_change=0.5)
    for change, stopped in ((0.0, False), (-worse, False), (0.4 * worse, False), (0.6 * worse, True)):
        callback.on_evaluate(None, None, None, metrics={metric: 5.0 + change})
        assert callback.stopped == stopped, change


def test_survivors_keep_their_moments_and_the_dead_leave_memory(tmp_path):
    trainer = TrainerPlugin(DEPTH, PruningSchedule(start=3), calibration_samples=8).attach(
        trainer_for(llama(), tmp_path, save_strategy="no", max_steps=3)
    )
    dead = [weakref.ref(layer.mlp.up_proj.weight) for layer in trainer.model.model.layers]
    before: dict = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            if state.global_step == 3:
                inner = optimizer.optimizer
                before.update({id(p): s["exp_avg"].clone() for p, s in inner.state.items()})

    trainer.callback_handler.callbacks.insert(0, Look())
    trainer.train()
    inner = trainer.optimizer.optimizer
    live = {id(p) for p in trainer.model.parameters()}
    assert {id(p) for group in inner.param_groups for p in group["params"]} == live == {id(p) for p in inner.state}
    assert all(torch.equal(inner.state[p]["exp_avg"], before[id(p)]) for p in inner.state)
    gc.collect()
    assert sum(ref() is not None for ref in dead) == 4


def test_narrowed_parameters_keep_their_slice_of_the_moments(tmp_path):
    config = PruningConfig(method="width", criterion="amp", ratio=0.2, width=WidthSettings(structures="units"))
    trainer = TrainerPlugin(config, PruningSchedule(start=3), calibration_samples=8).attach(
        trainer_for(llama(), tmp_path, save_strategy="no", max_steps=3)
    )
    before: dict = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            if state.global_step == 3:
                inner = optimizer.optimizer
                before.update({n: inner.state[p]["exp_avg_sq"].clone() for n, p in model.named_parameters()})

    trainer.callback_handler.callbacks.insert(0, Look())
    trainer.train()
    plan, inner = trainer.pruning.plan, trainer.optimizer.optimizer
    after = {n: inner.state[p]["exp_avg_sq"] for n, p in trainer.model.named_parameters()}
    for layer, kept in plan.kept_units.items():
        name = f"model.layers.{layer}.mlp"
        assert torch.equal(after[f"{name}.up_proj.weight"], before[f"{name}.up_proj.weight"][list(kept)])
        assert torch.equal(after[f"{name}.down_proj.weight"], before[f"{name}.down_proj.weight"][:, list(kept)])


def test_pruning_does_not_change_which_rows_are_trained_on(tmp_path):
    """The same batches, and the same dropout, as a run that prunes nothing; until the first event the same losses."""
    plain = trainer_for(llama(), tmp_path / "a", save_strategy="no")
    plain.train()
    late = TrainerPlugin(DEPTH, PruningSchedule(start=STEPS), calibration_samples=8).attach(
        trainer_for(llama(), tmp_path / "b", save_strategy="no")
    )
    late.train()
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (plain, late)]
    assert losses[0] == losses[1]


def test_an_error_in_a_pruning_step_restores_model_and_optimizer(tmp_path, monkeypatch):
    from hf_cka.training import structure

    trainer = TrainerPlugin(WIDTH, PruningSchedule(start=2), calibration_samples=8).attach(
        trainer_for(llama(), tmp_path, save_strategy="no", max_steps=2)
    )
    seen: dict = {}
    real = structure.apply_plan

    def out_of_memory(model, plan):
        seen.update(weights=dict(seen), config=dict(model.config.__dict__))
        real(model, plan)
        raise torch.OutOfMemoryError("no memory left")

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                seen["before"] = {n: (id(p), p.detach().clone()) for n, p in model.named_parameters()}

    trainer.callback_handler.callbacks.insert(0, Look())
    monkeypatch.setattr(structure, "apply_plan", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    now = dict(trainer.model.named_parameters())
    assert now.keys() == seen["before"].keys()
    for name, (identity, value) in seen["before"].items():
        assert id(now[name]) == identity
        assert torch.equal(now[name], value), name
    assert trainer.model.config.__dict__ == seen["config"]
    assert {id(p) for p in trainer.model.parameters()} == {id(p) for p in trainer.optimizer.optimizer.state}
    assert trainer.model(**{k: v[None] for k, v in rows(1)[0].items()}).loss.isfinite()


def test_the_callback_alone(tmp_path, whole):
    """As callbacks=[...]: the same training; resuming needs the checkpoint's own model."""
    config, _, trainer = whole
    callback = PruningCallback(config, TWICE, calibration_samples=8)
    plain = trainer_for(llama(), tmp_path)
    alone = Trainer(
        llama(), plain.args, train_dataset=plain.train_dataset, eval_dataset=plain.eval_dataset, callbacks=[callback]
    )
    alone.train()
    assert_same_run(alone, trainer)
    checkpoint = tmp_path / "checkpoint-6"
    again = PruningCallback(config, TWICE, calibration_samples=8)
    dense = Trainer(llama(), plain.args, train_dataset=plain.train_dataset, callbacks=[again])
    with pytest.raises((ValueError, RuntimeError), match="Attach the plugin|size mismatch|parameter group"):
        dense.train(resume_from_checkpoint=str(checkpoint))
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    again = PruningCallback(config, TWICE, calibration_samples=8)
    resumed = Trainer(model, plain.args, train_dataset=plain.train_dataset, callbacks=[again])
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_run(resumed, trainer)


def test_a_metric_stops_pruning(tmp_path):
    changes = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "save_strategy": "no"}
    trainer = TrainerPlugin(DEPTH, TWICE, calibration_samples=8, metric="eval_loss", max_change=0.0).attach(
        trainer_for(llama(), tmp_path, learning_rate=5.0, **changes)  # so that the loss rises
    )
    trainer.train()
    assert trainer.pruning.stopped
    assert trainer.pruning.events_done < 2


def test_refusals_come_before_the_first_step(tmp_path):
    def attached(plugin=None, **changes):
        settings = {"save_strategy": "no", **changes}
        return (plugin or TrainerPlugin(DEPTH, TWICE)).attach(trainer_for(llama(), tmp_path, **settings))

    fresh = attached()
    fresh.model_init = lambda trial: llama()
    static, mixed = (DistributedDataParallel.__new__(DistributedDataParallel) for _ in range(2))
    for wrapper in (static, mixed):  # only what the check looks at; a real one needs a process group
        torch.nn.Module.__init__(wrapper)
        wrapper.static_graph, wrapper.mixed_precision = wrapper is static, object() if wrapper is mixed else None
    averaged, alone = attached(), trainer_for(llama(), tmp_path, save_strategy="no")
    alone.add_callback(PruningCallback(DEPTH, TWICE))
    alone.add_callback(type("AnyEMACallback", (TrainerCallback,), {})())
    averaged.add_callback(type("AnyEMACallback", (TrainerCallback,), {})())
    cases = [
        (
            attached(load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, save_strategy="steps"),
            "load_best",
        ),
        (attached(optim="galore_adamw"), "galore"),
        (attached(auto_find_batch_size=True), "auto_find_batch_size"),
        (attached(TrainerPlugin(DEPTH, TWICE, mode="boundary"), save_only_model=True), "save_only_model"),
        (attached(TrainerPlugin(DEPTH, TWICE, mode="boundary"), ignore_data_skip=True), "ignore_data_skip"),
        (averaged, "AnyEMACallback averages"),
        (alone, "AnyEMACallback averages"),
        (fresh, "model_init makes a new"),
        (attached(TrainerPlugin(DEPTH, PruningSchedule(start=2, end=99, events=2))), "ends at step 99"),
        (attached(TrainerPlugin(PruningConfig(method="depth", ratio=0.97), TWICE)), "cannot be reached"),
        (attached(TrainerPlugin(DEPTH, TWICE, metric="eval_loss", max_change=1.0)), "eval_on_start"),
    ]
    for trainer, message in cases:
        before = weights(trainer)
        with pytest.raises((ValueError, ImportError), match=message):
            trainer.train()
        assert trainer.state.global_step == 0
        assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
    for wrapper, message in ((static, "static_graph=True"), (mixed, "mixed_precision holds copies")):
        wrapped = attached()
        wrapped.model_wrapped = wrapper
        with pytest.raises(ValueError, match=message):
            check_run(wrapped.pruning, wrapped.args, wrapped.model, None)
    with pytest.raises(ValueError, match="prunes already"):
        TrainerPlugin(DEPTH).attach(attached())
    with pytest.raises(ValueError, match="Did you mean: 'boundary'"):
        TrainerPlugin(DEPTH, mode="boundry")
    missing = attached(
        TrainerPlugin(DEPTH, TWICE, metric="eval_los", max_change=1.0), eval_strategy="steps", eval_on_start=True
    )
    with pytest.raises(ValueError, match="'eval_los' is not among the evaluation metrics: eval_loss"):
        missing.train()


@pytest.mark.parametrize(
    ("holder", "setting", "message"),
    [
        ("args", "fsdp", "FSDP"),
        ("args", "deepspeed", "DeepSpeed"),
        (None, "is_fsdp_enabled", "FSDP"),  # as accelerate launch sets it
        (None, "is_deepspeed_enabled", "DeepSpeed"),
    ],
)
@pytest.mark.parametrize("mode", ["inplace", "boundary"])
def test_sharded_parameters_are_refused_however_they_were_asked_for(holder, setting, message, mode, tmp_path):
    trainer = TrainerPlugin(DEPTH, TWICE, mode=mode).attach(trainer_for(llama(), tmp_path))
    check_run(trainer.pruning, trainer.args, trainer.model, None)
    setattr(trainer.args if holder else trainer, setting, True)
    with pytest.raises(ValueError, match=f"{message}.*hf-cka prune"):
        check_run(trainer.pruning, trainer.args, trainer.model, None)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"fsdp_version": 1}, "fsdp_version=2 with TrainerPlugin"),
        ({"cpu_offload": CPUOffloadPolicy()}, "cpu_offload is not supported"),
        ({"cpu_ram_efficient_loading": True}, "cpu_ram_efficient_loading is not"),
        ({"activation_checkpointing": True}, "activation_checkpointing of fsdp_config is not"),
        ({"state_dict_type": "StateDictType.SHARDED_STATE_DICT"}, "state_dict_type='FULL_STATE_DICT'"),
    ],
)
def test_what_no_test_has_seen_under_fsdp2_is_refused(setting, message, tmp_path):
    known = {
        "fsdp_version": 2,
        "cpu_offload": OffloadPolicy(),
        "cpu_ram_efficient_loading": False,
        "activation_checkpointing": False,
        "state_dict_type": "StateDictType.FULL_STATE_DICT",
    }
    trainer = TrainerPlugin(DEPTH, TWICE, recovery="norms").attach(trainer_for(llama(), tmp_path))
    trainer.is_fsdp_enabled, args = True, trainer.args
    for plugin in (known, known | setting):
        state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**plugin))
        trainer.accelerator = SimpleNamespace(state=state, parallelism_config=None)
        if plugin is known:
            check_run(trainer.pruning, args, trainer.model, None)
    with pytest.raises(ValueError, match=message):
        check_run(trainer.pruning, args, trainer.model, None)


def test_an_optimizer_that_the_boundary_mode_would_replace_is_refused(tmp_path):
    model = llama()
    made = trainer_for(model, tmp_path)
    given = Trainer(
        model, made.args, train_dataset=rows(), optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None)
    )
    with pytest.raises(ValueError, match="given as optimizers="):
        TrainerPlugin(DEPTH, TWICE, mode="boundary").attach(given)
    assert type(given) is Trainer
    TrainerPlugin(DEPTH, TWICE).attach(given)


def test_a_callback_added_to_a_running_trainer_is_refused(tmp_path):
    trainer = trainer_for(llama(), tmp_path, save_strategy="no")

    class Late(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                trainer.add_callback(PruningCallback(DEPTH, TWICE))

    trainer.add_callback(Late())
    with pytest.raises(RuntimeError, match="already running"):
        trainer.train()


def test_an_optimizer_whose_state_cannot_be_cut_is_refused_before_the_change(tmp_path):
    config = PruningConfig(method="width", criterion="magnitude", ratio=0.2)
    trainer = TrainerPlugin(config, PruningSchedule(start=2), calibration_samples=8).attach(
        trainer_for(llama(), tmp_path, save_strategy="no", optim="adafactor")
    )
    with pytest.raises(ValueError, match="exp_avg_sq_row"):
        trainer.train()
    assert trainer.model.config.intermediate_size == 48
    assert len(trainer.optimizer.optimizer.state) == len(list(trainer.model.parameters()))


@pytest.mark.parametrize("recovery", ["norms", "lora", "cka_lora"])
def test_after_the_last_pruning_step_only_the_recovery_is_trained(recovery, tmp_path):
    """And a run that is resumed before or after the change equals the uninterrupted one."""

    def start(folder, resume=None):
        config = RecoveryConfig(recovery, **({} if recovery == "norms" else {"rank": 2}))
        plugin = TrainerPlugin(WIDTH, PruningSchedule(start=2, end=4, events=2), 8, recovery=config)
        trainer = plugin.attach(trainer_for(llama(), folder))
        trainer.add_callback(Rates())
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    class Rates(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
            assert [group["lr"] for group in optimizer.param_groups] == lr_scheduler.get_last_lr()

    trainer = start(tmp_path)
    names = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert names
    assert all(("norm" if recovery == "norms" else "lora_") in name for name in names)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / ("checkpoint-4" if recovery == "norms" else "pruned_base"))
    frozen = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): p for name, p in weights(trainer).items()
    }
    for name, value in saved.named_parameters():
        assert torch.equal(frozen[name], value) == (recovery != "norms" or "norm" not in name), name
    for step in (6, 4, 3):
        for later in range(step + 1, STEPS + 1):
            shutil.rmtree(tmp_path / f"checkpoint-{later}")
        assert_same_run(start(tmp_path, resume=True), trainer)
    merged = finish_recovery(trainer.model)
    assert isinstance(merged, LlamaForCausalLM)
    with pytest.raises(ValueError, match="mode='boundary'"):
        TrainerPlugin(WIDTH, recovery=recovery, mode="inplace")


def test_the_record_is_in_the_trainer_state(whole):
    _, folder, trainer = whole
    state = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())
    record = state["stateful_callbacks"]["PruningCallback"]["attributes"]["record"]
    assert record["events_done"] == 2
    assert json.loads(record["history"])["steps"][-1]["plan"] == trainer.pruning.plan.to_dict()
