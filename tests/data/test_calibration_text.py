import pytest
import torch

from hf_cka.data import calibration, row_pair, row_text
from tests.tiny import tiny_tokenizer


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


def test_pairs_give_labels_and_what_the_decoder_reads():
    tokenizer = tiny_tokenizer("house", "tree")
    rows = [{"source": "w3 w4 w5", "target": "house tree"}, {"source": "w6", "target": "tree"}]
    (batch,) = calibration(rows, tokenizer, decoder_start_token_id=1)
    house, tree = tokenizer("house tree")["input_ids"]
    assert batch["input_ids"].tolist() == [[6, 0, 0], [3, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[tree, -100], [house, tree]]
    assert batch["decoder_input_ids"].tolist() == [[1, 0], [1, house]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 0], [1, 1]]
    (without,) = calibration(rows, tokenizer)
    assert without.keys() == {"input_ids", "attention_mask", "labels"}


def test_without_a_target_the_decoder_reads_its_start_token():
    (batch,) = calibration(["w3 w4", "w5"], tiny_tokenizer(), decoder_start_token_id=7)
    assert batch["decoder_input_ids"].tolist() == [[7], [7]]
    assert "labels" not in batch


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ({"prompt": "p", "completion": "c"}, ("p", "c")),
        ({"document": "d", "summary": "s"}, ("d", "s")),
        ({"instruction": "i", "input": "n", "output": "o"}, ("i\nn", "o")),
        ({"translation": {"de": "Haus", "en": "house"}}, ("Haus", "house")),
        ({"text": "t"}, ("t", None)),
    ],
)
def test_usual_pairs_are_understood(row, pair):
    assert row_pair(row) == pair


def test_pairs_without_some_targets_are_an_error():
    rows = [{"source": "w1", "target": "w2"}, {"source": "w1", "target": ""}]
    with pytest.raises(ValueError, match="1 of 2 rows have no target"):
        calibration(rows, tiny_tokenizer(), decoder_start_token_id=1)


def test_a_tiny_t5_reads_pairs_and_its_loss_does_not_depend_on_padding():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=96, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    rows = [{"source": f"w{i + 3} w{i + 4}" * (i + 1), "target": f"w{i + 5} w9"} for i in range(4)]
    with torch.no_grad():
        together, alone = (
            torch.cat([model(**b).logits.flatten(0, 1)[b["labels"].flatten() != -100] for b in batches])
            for batches in (
                calibration(rows, tiny_tokenizer(), decoder_start_token_id=0, batch_size=size) for size in (4, 1)
            )
        )
    assert torch.allclose(together, alone, atol=1e-5)
