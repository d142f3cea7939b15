import json

import pytest
import torch

from hf_cka.data import calibration, load_rows, row_text, sample_digests


@pytest.fixture
def tokenizer(assets):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / "stories260k_hf")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _rows(batches):
    return sorted(
        row[mask.bool()].tolist()
        for batch in batches
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    )


@pytest.mark.assets
def test_the_draw_depends_on_the_seed_and_not_on_the_batch_size(tokenizer):
    texts = [f"Once there was a cat number {i} who liked {'milk ' * (i % 5 + 1)}" for i in range(40)]
    one = calibration(texts, tokenizer, num_samples=10, batch_size=1)
    assert _rows(one) == _rows(calibration(texts, tokenizer, num_samples=10, batch_size=4))
    assert _rows(one) != _rows(calibration(texts, tokenizer, num_samples=10, seed=1))
    assert sum(len(batch["input_ids"]) for batch in one) == 10
    assert max(len(row) for row in _rows(calibration(texts, tokenizer, max_length=5))) == 5


@pytest.mark.assets
def test_an_iterator_is_read_from_its_start(tokenizer):
    texts = (f"Story {i}" for i in range(1000))
    assert len(_rows(calibration(texts, tokenizer, num_samples=3))) == 3
    assert next(texts) == "Story 3"


@pytest.mark.assets
def test_a_chat_is_cut_after_the_last_message(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<end>\n{% endfor %}"
    rows = [
        {"messages": [{"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": f"Answer {i}"}]}
        for i in range(3)
    ]
    assert row_text(rows[1], tokenizer) == "[user] Q1<end>\n[assistant] Answer 1"
    assert len(_rows(calibration(rows, tokenizer))) == 3


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": " a \n"}, "a"),
        ({"prompt": "p ", "completion": "c"}, "p c"),
        ({"prompt": [{"role": "user", "content": "p"}], "completion": [{"role": "assistant", "content": "c"}]}, "p\nc"),
        ({"instruction": "i", "input": "", "output": "o"}, "i\no"),
        ({"sentence1": "a", "sentence2": "b", "label": 1}, "a\nb"),
    ],
)
def test_usual_rows_are_understood(row, text):
    assert row_text(row) == text


def test_unknown_columns_are_listed():
    with pytest.raises(ValueError, match=r"columns are: body, title.*text_column"):
        row_text({"body": "x", "title": "y"})


@pytest.mark.assets
@pytest.mark.parametrize(
    ("texts", "message"), [([], "no text"), (["", "  "], "no text"), ("one string", "list of texts")]
)
def test_no_text_is_an_error(tokenizer, texts, message):
    with pytest.raises(ValueError, match=message):
        calibration(texts, tokenizer)


@pytest.mark.parametrize("name", ["num_samples", "max_length", "batch_size"])
def test_numbers_out_of_range_are_named(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        calibration(["a"], None, **{name: 0})


def test_local_files_load_alike(tmp_path):
    rows = [{"text": "one"}, {"text": "two"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text("text\none\ntwo\n")
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    for name in ("a.jsonl", "a.json", "a.csv", "a.txt"):
        assert [row["text"].strip() for row in load_rows(str(tmp_path / name))] == ["one", "two"]


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file 'missing.jsonl'"):
        load_rows("missing.jsonl")
    (tmp_path / "a.docx").write_text("")
    with pytest.raises(ValueError, match=r"its suffix is none of \.txt"):
        load_rows(str(tmp_path / "a.docx"))


def test_digests_ignore_padding():
    left = sample_digests(torch.tensor([[0, 0, 5, 6]]), torch.tensor([[0, 0, 1, 1]]))
    right = sample_digests(torch.tensor([[5, 6, 0]]), torch.tensor([[1, 1, 0]]))
    assert left == right != sample_digests(torch.tensor([[6, 5, 0]]), torch.tensor([[1, 1, 0]]))
