"""Damage is seeded, grows with its rate, and touches what is read only; clean scores equal a plain forward pass."""

from __future__ import annotations

import math
import random

import pytest
import torch

from hf_cka.evaluation import multiple_choice
from hf_cka.evaluation.robustness import DAMAGES, choice_robustness, robustness
from tests.tiny import tiny_model

TEXT = "The quick brown fox jumps over the lazy dog, and Then It Sleeps until noon. " * 6
TEXTS = [
    "Once upon a time, there was a little girl named Lily. She liked to play with her red ball in the park.",
    "Tom had a big dog. The dog was happy. They ran to the tree and sat down to eat.",
    "One day, the sun was hot and the bird wanted to find some water to drink.",
]


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_seeded_and_nothing_at_rate_zero(name: str) -> None:
    damage = DAMAGES[name]
    assert damage(TEXT, 0.0, random.Random(0)) == TEXT
    assert damage(TEXT, 0.3, random.Random(1)) == damage(TEXT, 0.3, random.Random(1)) != TEXT
    assert damage(TEXT, 0.3, random.Random(1)) != damage(TEXT, 0.3, random.Random(2))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_as_much_is_damaged_as_was_asked_for(rate: str) -> None:
    text = TEXT * 20
    words = text.split()
    dropped = DAMAGES["dropped words"](text, rate, random.Random(0)).split()
    swapped = DAMAGES["casing"](text, rate, random.Random(0)).split()
    assert 1 - len(dropped) / len(words) == pytest.approx(rate, abs=0.03)
    changed = sum(a != b for a, b in zip(words, swapped, strict=True)) / len(words)
    assert changed == pytest.approx(rate, abs=0.03)


def test_a_higher_rate_damages_what_a_lower_one_does() -> None:
    words = TEXT.split()
    few, many = (DAMAGES["casing"](TEXT, rate, random.Random(0)).split() for rate in (0.1, 0.4))
    hit = [i for i, word in enumerate(few) if word != words[i]]
    assert hit
    assert all(many[i] == few[i] for i in hit)


def test_one_word_stays() -> None:
    for damage in DAMAGES.values():
        assert damage("", 0.5, random.Random(0)) == ""
    assert DAMAGES["dropped words"]("only two", 1.0, random.Random(0)).strip() == "only"


@pytest.mark.assets
def test_damage_costs_quality_and_the_same_tokens_are_scored(stories) -> None:
    model, tokenizer = stories
    rows = robustness(model, tokenizer, TEXTS, rates=(0.05, 0.5))
    assert [(row.damage, row.rate) for row in rows][:3] == [("none", 0.0), ("typos", 0.05), ("typos", 0.5)]
    assert len(rows) == 7
    assert len({row.tokens for row in rows}) == 1
    assert all(row.perplexity > rows[0].perplexity for row in rows if row.rate == 0.5)
    again = robustness(model, tokenizer, TEXTS, rates=(0.05, 0.5), batch_size=1)
    assert [row.accuracy for row in again] == [row.accuracy for row in rows]
    assert [row.perplexity for row in again] == pytest.approx([row.perplexity for row in rows], rel=1e-5)


@pytest.mark.assets
def test_the_clean_row_is_a_plain_forward_pass(stories) -> None:
    model, tokenizer = stories
    row = {"prompt": "Once upon a time,", "completion": " there was a little girl."}
    clean = robustness(model, tokenizer, [row], damages=())[0]
    read = tokenizer(row["prompt"]).input_ids
    scored = tokenizer(row["completion"], add_special_tokens=False).input_ids
    with torch.no_grad():
        loss = model(torch.tensor([read + scored]), labels=torch.tensor([[-100] * len(read) + scored])).loss
    assert math.isclose(clean.perplexity, math.exp(loss), rel_tol=1e-5)
    assert clean.tokens == len(scored)


QUESTIONS = [
    {"question": text[: len(text) // 2], "choices": [text[len(text) // 2 :], "no", "a cat and a dog"], "gold": 0}
    for text in TEXTS
]


@pytest.mark.assets
def test_questions_are_damaged_and_choices_are_not(stories) -> None:
    """The clean row is plain multiple choice; every other one is that of questions damaged by hand."""
    model, tokenizer = stories
    found = choice_robustness(model, tokenizer, QUESTIONS, rates=(0.3, 1.0), seed=7)
    assert [(row.damage, row.rate) for row in found[:3]] == [("none", 0.0), ("typos", 0.3), ("typos", 1.0)]
    assert len(found) == 7
    for row in found:
        damage = DAMAGES.get(row.damage, lambda text, rate, rng: text)
        by_hand = [
            {**one, "question": damage(one["question"], row.rate, random.Random(f"7 {index}"))}
            for index, one in enumerate(QUESTIONS)
        ]
        assert row.damage == "none" or by_hand != QUESTIONS
        expected = multiple_choice(model, tokenizer, by_hand)
        assert (row.accuracy, row.accuracy_norm, row.n) == (expected.accuracy, expected.accuracy_norm, 3)


def test_a_row_without_a_question_is_named() -> None:
    with pytest.raises(ValueError, match=r"Row 1 has no question as text to damage; its columns are \['choices'"):
        choice_robustness(tiny_model("llama"), None, [QUESTIONS[0], {"choices": ["a", "b"], "gold": 0}])


@pytest.mark.parametrize("measure", [robustness, choice_robustness])
@pytest.mark.parametrize(
    ("options", "message"),
    [({"damages": ("typo",)}, "Unknown damage 'typo'. Did you mean: 'typos'"), ({"rates": (0.0,)}, "rate 0.0 must be")],
)
def test_unknown_damage_is_named(measure, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(tiny_model("llama"), None, QUESTIONS, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_context": 63}, "exceed the model's 64 positions"),
        ({"max_context": 8, "max_continuation": 8}, "No text has two words"),
    ],
)
def test_bad_input_is_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        robustness(tiny_model("llama"), None, ["word"], **options)
