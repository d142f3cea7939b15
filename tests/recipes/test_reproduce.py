"""Every script that reproduces a paper runs to its verdicts, in its small size, on a tiny real model."""

from __future__ import annotations

import importlib
import json

import pytest

pytest.importorskip("trl")

DECODERS = ("amp", "mop", "cka_depth", "consensus", "pruning_everything")


def run(name: str, assets, tmp_path, *more: str) -> tuple[str, dict]:
    file = tmp_path / f"{name}.md"
    small = ["--small", "--assets", str(assets), "--steps", "1", "--items", "2", "--tokens", "100", "--seeds", "0"]
    importlib.import_module(f"recipes.reproduce.{name}").main([*small, *more, "--output", str(file)])
    return file.read_text(), json.loads(file.with_suffix(".json").read_text())["rows"]


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_script_judges_its_claims(name, assets, tmp_path, capsys):
    model = str(assets / "models" / "stories260k_hf")
    text, rows = run(name, assets, tmp_path, "--model", model)
    judged = [line.rsplit("|", 2)[1].strip() for line in text.splitlines() if line.startswith("| ")][-2:]
    assert set(judged) <= {"yes", "no", "undecided"}
    assert str(assets) not in text
    assert "| dense | 0.0% |" in text
    pruned = [row for key, row in rows.items() if "removed" in row and not key.startswith("dense")]
    assert len(pruned) >= 3
    assert all(0.05 < row["removed"] < 0.9 for row in pruned)
    # what is kept is not measured again
    capsys.readouterr()
    again, _ = run(name, assets, tmp_path, "--model", model)
    assert again == text
    assert "{'removed'" not in capsys.readouterr().out


@pytest.mark.assets
@pytest.mark.slow
def test_the_encoder_script_judges_its_claims(assets, tmp_path):
    from transformers import AutoTokenizer

    from tests.tiny import tiny_model

    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / "stories260k_hf")
    tokenizer.add_special_tokens({"pad_token": "<pad>", "cls_token": "<cls>"})
    for part in (tiny_model("bert", head="base", vocab_size=len(tokenizer), max_position_embeddings=256), tokenizer):
        part.save_pretrained(tmp_path / "model")
    text, rows = run("cka_lora", assets, tmp_path, "--model", str(tmp_path / "model"))
    assert len(rows) == 3
    assert rows["CKA half, seed 0"]["trainable"] < rows["all layers, seed 0"]["trainable"]
    assert "0" not in rows["CKA half, seed 0"]["layers"], "the paper never adapts the first layer of an encoder"
    assert "| half of the adapters, the same quality |" in text


@pytest.mark.assets
@pytest.mark.slow
def test_the_script_for_decoders_adapts_half_and_judges(assets, tmp_path):
    model = str(assets / "models" / "stories260k_hf")
    text, rows = run("cka_lora_decoder", assets, tmp_path, "--model", model, "--steps", "3")
    every, half = rows["all layers, seed 0"], rows["CKA half, seed 0"]
    assert (every["layers"], len(json.loads(half["layers"]))) == ("[0, 1, 2, 3, 4]", 2)
    assert half["trainable"] / every["trainable"] == pytest.approx(2 / 5)
    assert every["held-out loss"] != half["held-out loss"]
    assert "| half of the adapters, the same quality |" in text


@pytest.mark.assets
@pytest.mark.slow
def test_the_script_for_decoders_runs_in_the_size_of_the_paper(assets, tmp_path, monkeypatch):
    from datasets import Dataset

    from hf_cka.evaluation import EvaluationResult, TaskResult
    from recipes.reproduce import cka_lora_decoder as script

    rows = Dataset.from_list(
        [{"query": f"What is {i} + {i}?", "response": str(2 * i), "type": "sum"} for i in range(40)]
    )
    monkeypatch.setattr(script, "load_rows", {"meta-math/MetaMathQA": rows}.__getitem__)
    answers = iter(
        [{"exact_match (strict-match)": 0.0, "exact_match (flexible-extract)": x} for x in (0.5, 0.25, 0.125)]
    )
    monkeypatch.setattr(
        script,
        "evaluate",
        lambda model, tasks, **_: EvaluationResult(None, (TaskResult(*tasks, "lm-eval", next(answers)),)),
    )
    file = tmp_path / "report.md"
    script.main(["--model", str(assets / "models" / "stories260k_hf"), "--seeds", "0", "--output", str(file)])
    text = file.read_text()
    assert "1 epoch of 16 rows, learning rate 2e-05" in text
    assert "| -25.00 ± 0.00 points with 40% of the parameters | no |" in text
    assert "| +12.50 ± 0.00 points against a random half | yes |" in text


@pytest.mark.assets
@pytest.mark.slow
def test_the_size_of_the_paper_runs_on_named_data_sets(assets, tmp_path, monkeypatch):
    """What a machine with the Hub does, with the Hub's data sets and lm-eval's tasks replaced."""
    from datasets import Dataset

    from hf_cka.evaluation import EvaluationResult, TaskResult
    from recipes.reproduce import common, mop

    asked = []
    row = {"instruction": "Tell a story.", "input": "", "output": "Tom is happy.", "text": "Once upon a time."}

    def load_rows(name, split="train"):
        asked.append((name, split))
        return Dataset.from_list([row] * 60)

    def evaluate(model, tasks, **_):
        return EvaluationResult(None, tuple(TaskResult(task, "lm-eval", {"acc": 0.5}) for task in tasks))

    monkeypatch.setattr(common, "load_rows", load_rows)
    monkeypatch.setattr(common, "evaluate", evaluate)
    model = str(assets / "models" / "stories260k_hf")
    file = tmp_path / "mop.md"
    mop.main(["--model", model, "--steps", "1", "--seeds", "0", "--output", str(file)])
    assert asked == [("yahma/alpaca-cleaned", "train"), ("Salesforce/wikitext:wikitext-2-raw-v1", "test")]
    text = file.read_text()
    assert "40% asked" in text
    assert "1 steps of 16 x 512 tokens, learning rate 0.0003" in text
    assert "| width only |" in text


def test_small_asks_for_the_data(capsys):
    with pytest.raises(SystemExit):
        importlib.import_module("recipes.reproduce.amp").main(["--small"])
    assert "--small needs --assets" in capsys.readouterr().err
