"""A teacher's answers on disk: the loss they give is the teacher's own, and the teacher is asked once."""

from __future__ import annotations

import copy
import itertools
import os

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_cka import recover
from hf_cka.training import DistillationConfig
from hf_cka.training.divergence import most_likely, teacher_divergence, top_divergence
from hf_cka.training.teacher_cache import TeacherCache
from tests.tiny import tiny_batch, tiny_model
from tests.training.runs import rows

RUN = {"max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1}


def never() -> torch.Tensor:
    raise AssertionError("The teacher was asked again.")


def padded(batch: dict, left: int, right: int) -> dict:
    return {name: torch.nn.functional.pad(value, (left, right)) for name, value in batch.items()}


@pytest.mark.parametrize("top_k", [None, 5])
def test_answers_are_found_whatever_the_order_and_the_padding(top_k, tmp_path):
    teacher, student = tiny_model("llama", seed=1), tiny_model("llama")
    batch = tiny_batch(batch=3)
    cache = TeacherCache(tmp_path, teacher, top_k=top_k, temperature=2.0)

    @torch.no_grad()
    def divergence(batch, ask=None):
        keep = batch["attention_mask"].bool()[:, 1:] & batch["attention_mask"].bool()[:, :-1]
        logits, theirs = student(**batch).logits[:, :-1], teacher(**batch).logits[:, :-1]
        cached = cache.divergence(logits, batch, keep, ask or (lambda: theirs))
        if top_k is None:
            return cached, teacher_divergence(logits, theirs, keep, 2.0)
        values, indices = most_likely((theirs[keep] / 2.0).log_softmax(-1), top_k)
        return cached, top_divergence(logits[keep], values, indices, 2.0)

    cached, uncached = divergence(batch)
    assert torch.equal(cached, uncached)
    order = torch.tensor([2, 0, 1])
    for again in (batch, {k: v[order] for k, v in batch.items()}, padded(batch, 0, 3), padded(batch, 2, 1)):
        cached, uncached = divergence(again, never)
        torch.testing.assert_close(cached, uncached, rtol=1e-4, atol=1e-5)
    nothing = torch.zeros_like(batch["input_ids"], dtype=torch.bool)  # such as rows whose answer was cut off
    assert float(cache.divergence(torch.randn(*nothing.shape, 96), batch, nothing, lambda: torch.randn(3, 12, 96))) == 0
    one = {k: v[:1, :-1] for k, v in batch.items()}  # the beginning of a row is another row
    with pytest.raises(AssertionError, match="asked again"):
        divergence(one, never)


def test_the_divergence_over_the_most_likely_comes_from_below_and_ends_at_the_whole():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(600, 11, generator=generator) * 3 for _ in range(2))
    whole = teacher_divergence(student, teacher, torch.ones(600, dtype=torch.bool), 2.0)
    parts = [
        float(top_divergence(student, *most_likely((teacher / 2.0).log_softmax(-1), k), 2.0)) for k in range(1, 11)
    ]
    assert all(a <= b + 1e-3 for a, b in itertools.pairwise(parts))
    assert parts[0] < 0.9 * float(whole)
    assert parts[-1] == pytest.approx(float(whole), rel=1e-5)  # the others are one class
    p, q = (teacher[0] / 2).softmax(-1), (student[0] / 2).softmax(-1)
    top = p.topk(2).indices
    rest = [1 - x[top].sum() for x in (p, q)]
    by_hand = (p[top] * (p[top] / q[top]).log()).sum() + rest[0] * (rest[0] / rest[1]).log()
    found = top_divergence(student[:1], *most_likely((teacher[:1] / 2.0).log_softmax(-1), 2), 2.0)
    assert float(found) == pytest.approx(4 * float(by_hand), rel=1e-4)


def bert(seed: int = 0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=96, num_labels=3, **sizes))


@pytest.mark.parametrize("kind", ["decoder", "classifier"])
@pytest.mark.parametrize("top_k", [None, 1])
def test_a_run_with_a_cache_is_the_run_without_and_the_next_needs_no_teacher(kind, top_k, tmp_path):
    student, teacher = (tiny_model("llama"), tiny_model("llama", seed=1)) if kind == "decoder" else (bert(), bert(1))
    data = [{"input_ids": row["input_ids"].tolist()} for row in rows(16)]
    data = [row | {"labels": row["input_ids"] if kind == "decoder" else i % 3} for i, row in enumerate(data)]

    def losses(teacher, **cache):
        distillation = DistillationConfig(weight=0.7, temperature=2.0, **cache)
        result = recover(copy.deepcopy(student), data, "norms", teacher=teacher, distillation=distillation, **RUN)
        return [loss for _, loss in result.losses]

    cache = {"cache_dir": str(tmp_path / "answers"), "cache_top_k": top_k}
    first = losses(teacher, **cache)
    assert len(list((tmp_path / "answers").glob("*/*.safetensors"))) == 16
    if top_k is None:
        assert first == pytest.approx(losses(teacher), rel=1e-5)
    else:
        assert first[0] < losses(teacher)[0]
    teacher.forward = lambda **inputs: never()
    assert losses(teacher, **cache) == first


def test_a_kill_while_an_answer_is_written_leaves_none(tmp_path, monkeypatch):
    teacher, batch = tiny_model("llama"), tiny_batch()
    cache = TeacherCache(tmp_path, teacher)
    keep, logits = batch["attention_mask"].bool(), torch.randn(*batch["input_ids"].shape, 96)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            cache.divergence(logits, batch, keep, lambda: logits)
    with pytest.raises(AssertionError, match="asked again"):
        cache.divergence(logits, batch, keep, never)
    assert float(cache.divergence(logits, batch, keep, lambda: logits)) == 0
    assert float(cache.divergence(logits, batch, keep, never)) == 0


def test_what_a_cache_cannot_do_is_refused(tmp_path):
    from trl import SFTConfig

    model, teacher = tiny_model("llama"), tiny_model("llama", seed=1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    TeacherCache(tmp_path / "all", teacher)
    TeacherCache(tmp_path / "top", teacher, top_k=4, temperature=2.0)
    TeacherCache(tmp_path / "all", teacher, temperature=3.0)  # all logits take any
    for folder, other, settings, message in (
        ("all", tiny_model("llama", seed=2), {}, "teacher is '.*' there"),
        ("all", teacher, {"top_k": 4}, "top_k is None there, 4 here"),
        ("top", teacher, {"top_k": 4}, "temperature is 2.0 there, 1.0 here"),
    ):
        with pytest.raises(ValueError, match=message):
            TeacherCache(tmp_path / folder, other, **settings)
    for settings, message in (
        ({"cache_dir": "x", "hidden_weight": 0.1}, "hidden_weight=0.1 needs the teacher's hidden states"),
        ({"cache_top_k": 4}, "needs a cache_dir"),
        ({"cache_dir": "x", "cache_top_k": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            DistillationConfig(**settings)
    batch = tiny_batch()
    joined = batch | {"position_ids": torch.arange(batch["input_ids"].shape[1])[None]}
    keep, logits = batch["attention_mask"].bool(), torch.randn(*batch["input_ids"].shape, 96)
    with pytest.raises(ValueError, match="holds position_ids"):
        TeacherCache(tmp_path / "all", teacher).divergence(logits, joined, keep, never)
    with pytest.raises(ValueError, match="cache_top_k=96 must be below"):
        TeacherCache(tmp_path / "96", teacher, top_k=96).divergence(logits, batch, keep, lambda: logits)
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", packing=True)
    for more, message in (({"args": args}, "packing=True joins rows"), ({"max_steps": 1}, "teacher is '.*' there")):
        with pytest.raises(ValueError, match=message):
            recover(
                model,
                [{"text": "Once"}],
                "norms",
                teacher=tiny_model("llama", seed=3),
                distillation=DistillationConfig(cache_dir=str(tmp_path / "all")),
                **more,
            )
    assert all(p.requires_grad and torch.equal(p, before[name]) for name, p in model.named_parameters())
