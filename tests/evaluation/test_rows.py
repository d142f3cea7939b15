"""Completion loss is the loss TRL trains; exact match counts what greedy generation really says."""

from __future__ import annotations

import math

import pytest
import torch

from hf_cka.evaluation import completion_loss, exact_match

CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

PLAIN = [
    {"prompt": "Once upon a time, there was", "completion": " a little girl named Lily."},
    {"prompt": "Tom had a", "completion": " red ball. He liked to play with it."},
    {"prompt": "The sun was", "completion": " hot."},
]
TALK = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }
    for row in PLAIN
]


@pytest.fixture
def talking(stories):
    model, tokenizer = stories
    tokenizer.chat_template = CHAT
    return model, tokenizer


@pytest.mark.assets
@pytest.mark.parametrize("rows", [PLAIN, TALK], ids=["plain", "chat"])
def test_the_loss_is_the_one_trl_trains(talking, rows, tmp_path) -> None:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    model, tokenizer = talking
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(str(tmp_path), per_device_train_batch_size=3, report_to=[], use_cpu=True, bf16=False),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        expected = model.eval()(**batch).loss.item()
    result = completion_loss(model, tokenizer, rows)
    assert math.isclose(result.value, expected, rel_tol=1e-5)
    assert result.tokens == int((batch["labels"][:, 1:] != -100).sum())
    assert result.rows == 3


@pytest.mark.assets
@pytest.mark.parametrize("rows", [PLAIN, TALK], ids=["plain", "chat"])
def test_the_batch_size_does_not_matter(talking, rows) -> None:
    model, tokenizer = talking
    one, three = (completion_loss(model, tokenizer, rows, batch_size=size) for size in (1, 3))
    assert math.isclose(one.value, three.value, rel_tol=1e-5)
    assert one.tokens == three.tokens
    answers = [exact_match(model, tokenizer, rows, max_new_tokens=8, batch_size=size) for size in (1, 3)]
    assert answers[0] == answers[1]


@pytest.mark.assets
@pytest.mark.parametrize("pad_token", ["as it is", None])
def test_what_the_model_itself_says_is_a_match(stories, pad_token) -> None:
    """Against generation of one row at a time, whatever the padding token."""
    model, tokenizer = stories
    if pad_token is None:
        tokenizer.pad_token = None
    rows = []
    for row in PLAIN:
        ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
        with torch.no_grad():
            output = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        said = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        rows.append({"prompt": row["prompt"], "completion": said})
    rows[1]["completion"] += " and more"
    result = exact_match(model, tokenizer, rows, max_new_tokens=8)
    assert result.value == pytest.approx(2 / 3)
    assert [example.correct for example in result.examples] == [True, False, True]
    assert result.examples[1].expected.endswith("and more")
    assert result.examples[1].produced == result.examples[1].expected.removesuffix(" and more")
    assert result.standard_error == pytest.approx(math.sqrt(2 / 9 / 3))


@pytest.mark.assets
def test_an_answer_ends_at_the_end_token(stories) -> None:
    """What a shorter row is filled with, while longer ones go on, is no part of its answer."""
    model, tokenizer = stories
    full = exact_match(model, tokenizer, PLAIN[:1], max_new_tokens=8).examples[0].produced
    third = tokenizer(full).input_ids[-1]
    model.generation_config.eos_token_id = [third, tokenizer.eos_token_id]  # a list, as chat models have
    ended = exact_match(model, tokenizer, PLAIN, max_new_tokens=8).examples[0].produced
    assert full.startswith(ended)
    assert len(ended) < len(full)


@pytest.mark.assets
def test_nothing_of_the_callers_is_changed(stories) -> None:
    model, tokenizer = stories
    model.train()
    side, pad = tokenizer.padding_side, tokenizer.pad_token
    exact_match(model, tokenizer, PLAIN, max_new_tokens=2)
    completion_loss(model, tokenizer, PLAIN)
    assert model.training
    assert (tokenizer.padding_side, tokenizer.pad_token) == (side, pad)


@pytest.mark.assets
@pytest.mark.parametrize("measure", [completion_loss, exact_match])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([{"prompt": "a", "answer": "b"}], r"Row 0 has no column 'completion'; its columns are \['answer', 'prompt'\]"),
    ],
)
def test_bad_rows_are_named(stories, measure, rows, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(*stories, rows)


@pytest.mark.assets
def test_more_bad_input_is_named(stories) -> None:
    model, tokenizer = stories
    with pytest.raises(ValueError, match=r"Row 0 has \d+ tokens, more than the model's 512 positions"):
        completion_loss(model, tokenizer, [{"prompt": "a", "completion": " word" * 600}])
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        exact_match(model, tokenizer, PLAIN, max_new_tokens=0)
    with pytest.raises(ValueError, match="batch_size=0"):
        exact_match(model, tokenizer, PLAIN, batch_size=0)
