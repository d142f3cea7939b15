"""Sentence similarity: what the definition says, whatever the batch size."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr

from hf_cka.evaluation import EvaluationSettings, evaluate, sentence_similarity
from tests.tiny import tiny_model, tiny_tokenizer

ROWS = [
    {"sentence1": f"w{i + 3} w{i + 9}", "sentence2": f"w{2 * i + 3} w{i + 20} " * (i % 3 + 1), "score": (i * 7) % 5}
    for i in range(8)
]


def test_it_is_the_rank_correlation_of_mean_pooled_cosines() -> None:
    model, tokenizer = tiny_model("bert", "base"), tiny_tokenizer()
    result = sentence_similarity(model, tokenizer, ROWS, batch_size=3)

    def embedded(text: str) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([tokenizer(text).input_ids])).last_hidden_state[0].mean(0)

    cosines = [torch.cosine_similarity(embedded(r["sentence1"]), embedded(r["sentence2"]), dim=0).item() for r in ROWS]
    assert result.cosines == pytest.approx(cosines, abs=1e-5)
    assert result.spearman == pytest.approx(spearmanr([r["score"] for r in ROWS], cosines).statistic)
    headed = tiny_model("bert", "masked-lm")
    headed.bert.load_state_dict(model.state_dict(), strict=False)
    assert sentence_similarity(headed, tokenizer, ROWS).cosines == pytest.approx(cosines, abs=1e-5)


def test_it_is_a_task(tmp_path) -> None:
    import json

    (tmp_path / "sts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = f"sts:{tmp_path / 'sts.jsonl'}"
    measured = evaluate(tiny_model("bert", "base"), task, tokenizer=tiny_tokenizer(), progress=False).tasks[0]
    assert measured.n == 8
    assert measured.errors["spearman"] > 0
    assert measured.details == {"pooling": "mean"}
    some = evaluate(
        tiny_model("bert", "base"),
        task,
        tokenizer=tiny_tokenizer(),
        settings=EvaluationSettings(limit=5, seed=3),
        progress=False,
    ).tasks[0]
    assert (some.n, some.details["drawn_with_seed"]) == (5, 3)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[:3], "There are 3 rows"),
        ([{"sentence1": "a", "score": 1}] * 4, "Row 0 has no 'sentence2'; its columns are: sentence1, score"),
        ([{**row, "score": None} for row in ROWS], "Row 0 has no 'score'"),
        ([{**row, "score": 1} for row in ROWS], "The scores are all equal"),
    ],
)
def test_bad_rows_are_named(rows: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sentence_similarity(tiny_model("bert", "base"), tiny_tokenizer(), rows)
