"""`recover` through the real Trainers: a pruned real model gets better, with labels and with its parent's answers."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from hf_cka import PruningConfig, PruningPlan, apply_plan, prune, recover
from hf_cka.pruning.history import recorded_plan
from hf_cka.training import DistillationConfig, DistillationMixin, RecoveryConfig
from hf_cka.training.distillation import layer_map
from hf_cka.training.divergence import hidden_difference, teacher_divergence
from tests.tiny import tiny_model

pytest.importorskip("trl")
RUN = {"max_steps": 30, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "disable_tqdm": True}


@pytest.fixture(scope="module")
def pruned_stories(request):
    """(dense, pruned, tokenizer, training texts, held-out batch): one layer of five is gone."""
    import os
    from pathlib import Path

    from transformers import AutoModelForCausalLM, AutoTokenizer

    root = Path(os.environ.get("HF_CKA_ASSETS", Path(__file__).parents[3] / "shared" / "assets"))
    if not (root / "models").is_dir():
        pytest.skip("real models and data are not there; set HF_CKA_ASSETS to their folder")
    folder = root / "models" / "stories260k_hf"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lines = (root / "lm" / "tinystories_a.jsonl").read_text().splitlines()[:300]
    texts = [json.loads(line)["text"][:300] for line in lines]
    held_out = tokenizer(texts[260:], return_tensors="pt", padding=True, truncation=True, max_length=96)
    batches = [dict(tokenizer(texts[:16], return_tensors="pt", padding=True, truncation=True, max_length=64))]
    config = PruningConfig(method="depth", criterion="block_influence", num_layers=1)
    return dense, prune(dense, batches, config, progress=False).model, tokenizer, texts[:260], held_out


def loss(model, batch) -> float:
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        return float(model.eval()(**batch, labels=labels).loss)


@pytest.mark.assets
@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("method", ["lora", "norms", "full"])
def test_recovery_heals(method, teacher, pruned_stories):
    dense, pruned, tokenizer, texts, held_out = pruned_stories
    before, parent = loss(pruned, held_out), {n: p.clone() for n, p in dense.named_parameters()}
    result = recover(
        copy.deepcopy(pruned),
        texts,
        method,
        processing_class=tokenizer,
        teacher=dense if teacher else None,
        max_length=64,
        logging_steps=5,
        **{**RUN, "learning_rate": 1e-3 if method == "full" else 5e-3},
    )
    assert loss(result.model, held_out) < before - 0.1
    assert result.losses[-1][1] < result.losses[0][1]
    assert result.trainable < sum(p.numel() for p in pruned.parameters()) or method == "full"
    assert not hasattr(result.model, "peft_config")
    assert result.model.config.pruning == pruned.config.pruning
    assert all(torch.equal(p, parent[n]) for n, p in dense.named_parameters())
    assert copy.deepcopy(result.model)(**held_out).logits.isfinite().all()


@pytest.mark.assets
@pytest.mark.parametrize("base", ["Trainer", "SFTTrainer"])
def test_the_evaluation_loss_of_a_distilled_run_is_that_of_any_other(base, pruned_stories, tmp_path):
    """The training loss is not: a teacher makes it another one."""
    import transformers
    import trl
    from datasets import Dataset

    dense, pruned, tokenizer, texts, _ = pruned_stories
    plain, kinds = {"report_to": "none", "use_cpu": True, "max_steps": 1, "disable_tqdm": True}, {}
    if base == "Trainer":
        kind, args = transformers.Trainer, transformers.TrainingArguments(str(tmp_path), logging_steps=1, **plain)
        ids = torch.randint(3, 500, (16, 12), generator=torch.Generator().manual_seed(0)).tolist()
        rows = Dataset.from_list([{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids])
    else:
        kind = trl.SFTTrainer
        args = trl.SFTConfig(str(tmp_path), bf16=False, max_length=32, logging_steps=1, **plain)
        rows, kinds = Dataset.from_dict({"text": texts[:16]}), {"processing_class": tokenizer}
    found = []
    for bases in ((kind,), (DistillationMixin, kind)):
        trainer = type("Any", bases, {})(
            model=copy.deepcopy(pruned), args=args, train_dataset=rows, eval_dataset=rows, **kinds
        )
        trainer.teacher, trainer.distillation = dense.eval(), DistillationConfig(weight=0.5, hidden_weight=1.0)
        evaluated = trainer.evaluate()
        trainer.train()
        found.append((evaluated["eval_loss"], next(e["loss"] for e in trainer.state.log_history if "loss" in e)))
    assert found[0][0] == found[1][0]
    assert abs(found[0][1] - found[1][1]) > 0.05


@pytest.mark.assets
def test_the_same_seed_gives_the_same_model(pruned_stories):
    _, pruned, tokenizer, texts, _ = pruned_stories
    runs = [
        recover(
            copy.deepcopy(pruned),
            texts,
            RecoveryConfig("lora", rank=2),
            processing_class=tokenizer,
            **{**RUN, "max_steps": 2},
        )
        for _ in range(2)
    ]
    state = runs[1].model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in runs[0].model.state_dict().items())


@pytest.mark.assets
def test_hidden_states_are_compared_by_original_layer(pruned_stories):
    dense, pruned, tokenizer, texts, held_out = pruned_stories
    with torch.no_grad():
        ours = pruned.eval()(**held_out, output_hidden_states=True).hidden_states
        theirs = dense.eval()(**held_out, output_hidden_states=True).hidden_states
    kept = [i for i in range(5) if i not in recorded_plan(pruned).removed_layers]
    mask = held_out["attention_mask"].bool()
    before_the_gap = {i: j for i, j in enumerate(kept) if i == j}
    if before_the_gap:
        assert float(hidden_difference(ours, theirs, before_the_gap, mask)) == 0
    assert float(hidden_difference(ours, theirs, dict(enumerate(kept)), mask)) > 0
    result = recover(
        copy.deepcopy(pruned),
        texts,
        "full",
        processing_class=tokenizer,
        teacher=dense,
        distillation=DistillationConfig(weight=0.5, temperature=2.0, hidden_weight=0.1),
        max_length=64,
        **{**RUN, "max_steps": 10, "learning_rate": 1e-3},
    )
    assert loss(result.model, held_out) < loss(pruned, held_out)


def test_an_encoder_is_recovered_on_tokenized_rows():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=96, num_labels=2, **sizes))
    teacher = copy.deepcopy(model)
    ids = torch.randint(3, 96, (32, 8), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row.tolist(), "labels": int(row[0] > 48)} for row in ids]
    plain = recover(model, rows, "full", **{**RUN, "max_steps": 20, "logging_steps": 1})
    assert plain.losses[-1][1] < plain.losses[0][1]
    with torch.no_grad():
        teacher.classifier.weight += 1
    distilled = recover(model, rows, "lora", teacher=teacher, **{**RUN, "max_steps": 20, "logging_steps": 1})
    assert distilled.losses[-1][1] < distilled.losses[0][1]


def test_divergence_equals_the_formula_and_its_gradient():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 700, 11, generator=generator, requires_grad=True)
    teacher = torch.randn(3, 700, 11, generator=generator)
    keep = torch.rand(3, 700, generator=generator) > 0.3
    value = teacher_divergence(student, teacher, keep, temperature=2.0)
    (gradient,) = torch.autograd.grad(value, student)
    p, q = (teacher / 2).softmax(-1), (student / 2).log_softmax(-1)
    plain = ((p * (p.log() - q)).sum(-1)[keep]).sum() * 4
    (expected,) = torch.autograd.grad(plain, student)
    torch.testing.assert_close(value, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_bad_input_is_refused_before_training():
    model, rows = tiny_model("llama"), [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 4
    before = {n: p.clone() for n, p in model.named_parameters()}
    other = tiny_model("llama", vocab_size=64)
    with pytest.raises(ValueError, match="vocabulary has 64 tokens and the student's 96"):
        recover(model, rows, teacher=other)
    with pytest.raises(ValueError, match="needs a teacher"):
        recover(model, rows, distillation=DistillationConfig())
    with pytest.raises(ValueError, match="Give args or max_steps"):
        recover(model, rows, args=object(), max_steps=3)
    with pytest.raises(ValueError, match="Did you mean: 'lora'"):
        recover(model, rows, "lorra")
    with pytest.raises(ValueError, match="weight=0"):
        DistillationConfig(weight=0)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_teachers_that_would_teach_wrongly_are_refused():
    model, rows = tiny_model("llama"), [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 4
    with pytest.raises(ValueError, match="is the student itself"):
        recover(model, rows, teacher=model)
    sharing = tiny_model("llama")
    sharing.model.norm.weight = model.model.norm.weight
    with pytest.raises(ValueError, match=r"share weights \(first: model.norm.weight\)"):
        recover(model, rows, teacher=sharing)
    packed = tiny_model("llama")
    packed.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match="teacher is quantized"):
        recover(model, rows, teacher=packed)


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"), ({"loss_type": "dft"}, "loss_type='dft'")],
)
def test_losses_that_a_teacher_would_silently_replace_are_refused(setting, message, tmp_path):
    from trl import SFTConfig

    model, teacher, rows = tiny_model("llama"), tiny_model("llama"), [{"text": "Once"}] * 4
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **setting)
    with pytest.raises(ValueError, match=message):
        recover(model, rows, "norms", teacher=teacher, args=args)
    assert all(p.requires_grad for p in model.parameters())


def test_a_distilling_trainer_looks_at_its_settings_before_the_first_step(tmp_path):
    from transformers import Trainer

    from tests.training.runs import trainer_for

    def trainer(model=None, **changes):
        made = trainer_for(model or tiny_model("llama"), tmp_path, **changes)
        made.__class__ = type("Distilling", (DistillationMixin, Trainer), {})
        made.teacher = tiny_model("llama", seed=1).eval()
        return made

    routed, called, orphan = trainer(), trainer(), trainer()
    routed.model.config.output_router_logits = True
    called.compute_loss_func = lambda *args, **kwargs: None
    orphan.teacher = None
    cases = [
        (trainer(label_smoothing_factor=0.1), "label_smoothing_factor=0.1"),
        (routed, "output_router_logits"),
        (called, "compute_loss_func"),
        (orphan, "has no teacher"),
    ]
    for made, message in cases:
        with pytest.raises(ValueError, match=message):
            made.train()
        assert made.state.global_step == 0


def test_a_layer_that_lost_both_sublayers_is_left_out_of_the_layer_map():
    plan = PruningPlan(num_layers=4, model_type="llama", removed_attention=(1,), removed_mlp=(1, 2))
    assert layer_map(apply_plan(tiny_model("llama"), plan)) == {0: 0, 1: 2, 2: 3}


def test_rows_without_a_text_are_refused():
    with pytest.raises(ValueError, match="the columns are: height"):
        recover(tiny_model("llama"), [{"height": 3}] * 4)


@pytest.mark.parametrize("method", ["lora", "norms", "full"])
@pytest.mark.parametrize("given", [None, 7e-4])
def test_the_learning_rate_is_that_of_the_method_unless_given(method, given):
    """A Trainer's own is for all weights at once, and with adapters or norms alone heals next to nothing."""
    model = tiny_model("llama")
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 4
    settings = {} if given is None else {"learning_rate": given}
    result = recover(
        model, rows, method, max_steps=1, logging_steps=1, lr_scheduler_type="constant", disable_tqdm=True, **settings
    )
    assert result.log[0]["learning_rate"] == (given or {"lora": 2e-4, "norms": 2e-3, "full": 5e-5}[method])
