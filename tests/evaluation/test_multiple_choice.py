"""Multiple choice: the likelihoods are those of the plain computation, whatever the batch, and bad rows are named."""

from __future__ import annotations

import json
import math

import pytest
import torch

from hf_cka.evaluation import multiple_choice

ROWS = [
    {"question": "Lily saw a", "choices": ["dog", "big red ball in the park", "cat"], "gold": 1},
    {"question": "Tom was very", "choices": ["happy", "sad"], "gold": 0},
    {"question": "Once upon a time, there was a little girl. She liked to", "choices": ["play", "é"], "gold": 1},
]


def plain(model, tokenizer, row: dict, template: str = "Question: {question}\nAnswer:") -> list[float]:
    """The log-likelihood of each choice, one forward pass each, in float64, without padding."""
    prompt, found = template.format(**row), []
    start = len(tokenizer(prompt).input_ids)
    for choice in row["choices"]:
        ids = torch.tensor(tokenizer(f"{prompt} {choice}").input_ids)
        with torch.no_grad():
            scores = model.eval()(ids[None]).logits[0].double().log_softmax(-1)
        found.append(sum(scores[at - 1, ids[at]].item() for at in range(start, len(ids))))
    return found


@pytest.mark.assets
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_likelihoods_are_those_of_one_choice_at_a_time(stories, batch_size: int) -> None:
    model, tokenizer = stories
    result = multiple_choice(model, tokenizer, ROWS, batch_size=batch_size)
    right, norm = 0, 0
    for row, item in zip(ROWS, result.items, strict=True):
        expected = plain(model, tokenizer, row)
        assert item.log_likelihoods == pytest.approx(expected, abs=1e-4)
        right += max(range(len(expected)), key=expected.__getitem__) == row["gold"]
        each = [score / len(choice) for score, choice in zip(expected, row["choices"], strict=True)]
        norm += max(range(len(each)), key=each.__getitem__) == row["gold"]
    assert (result.accuracy, result.accuracy_norm, result.n) == (right / 3, norm / 3, 3)
    assert result.items[2].characters == (4, 1)
    assert result.items[2].bytes == (4, 2)


@pytest.mark.assets
def test_what_the_model_would_say_wins(stories) -> None:
    """Against noise of the same length, the model's own greedy continuation is the likelier choice."""
    model, tokenizer = stories
    ids = tokenizer("Once upon a time, there was", return_tensors="pt").input_ids
    said = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    own = tokenizer.decode(said, skip_special_tokens=True).strip()
    rows = [{"text": "Once upon a time, there was", "choices": [own[::-1], own], "gold": 1}]
    assert multiple_choice(model, tokenizer, rows, template="{text}").accuracy == 1


@pytest.mark.assets
def test_white_space_at_the_end_of_a_prompt_goes_to_the_choice(stories) -> None:
    scores = [multiple_choice(*stories, ROWS, template=f"{{question}}{end}").items for end in ("", " ")]
    assert scores[0] == scores[1]


@pytest.mark.assets
def test_a_tokenizer_without_pad_token_and_bfloat16_work(stories, assets) -> None:
    model, tokenizer = stories
    lines = (assets / "mc" / "piqa_valid_a.jsonl").read_text().splitlines()[:40]
    rows = [row for row in map(json.loads, lines) if len(str(row)) < 300]
    one = multiple_choice(model, tokenizer, rows)
    tokenizer.pad_token = None
    assert multiple_choice(model, tokenizer, rows).items == one.items
    half = multiple_choice(model.bfloat16(), tokenizer, rows)
    for a, b in zip(one.items, half.items, strict=True):
        assert b.log_likelihoods == pytest.approx(a.log_likelihoods, rel=0.02)
    assert one.standard_error == pytest.approx(math.sqrt(one.accuracy * (1 - one.accuracy) / one.n))


@pytest.mark.assets
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([{"question": "a", "choices": ["b", "c"]}], r"Row 0 has no column 'gold'; its columns are \['choices', 'que"),
        ([{"prompt": "a", "choices": ["b", "c"], "gold": 0}], "Row 0 has no column 'question' of the template"),
        ([{**ROWS[0], "gold": 3}], "gold=3 must be the index of the right choice, 0 to 2"),
        ([{**ROWS[0], "gold": "dog"}], "gold='dog'"),
        ([{**ROWS[0], "choices": ["dog"]}], "at least 2 non-empty texts"),
        ([{**ROWS[0], "choices": ["dog", ""]}], "at least 2 non-empty texts"),
        ([{**ROWS[0], "question": "word " * 600}], r"Row 0 has \d+ tokens with choice 0, more than the model's 512"),
    ],
)
def test_bad_rows_are_named(stories, rows: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        multiple_choice(*stories, rows)


@pytest.mark.assets
def test_a_model_that_computes_no_numbers_is_named(stories) -> None:
    model, tokenizer = stories
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="row 0 is nan: the model's logits are no numbers"):
        multiple_choice(model, tokenizer, ROWS)
