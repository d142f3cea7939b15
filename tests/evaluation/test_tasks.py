"""`evaluate`: tasks by name, the same numbers as the functions and as lm-eval, and errors before anything is loaded."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from typer.testing import CliRunner

import hf_cka
from hf_cka.cli import app
from hf_cka.evaluation import multiple_choice, perplexity
from hf_cka.evaluation.classification import classify, classify_by_words
from hf_cka.evaluation.tasks import EvaluationResult, EvaluationSettings, evaluate
from hf_cka.lookup import lookup
from tests.tiny import tiny_model

TASK = """
task: local_arc
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
  - metric: acc_bytes
metadata:
  version: 1.0
"""


@pytest.fixture
def questions(assets, tmp_path):
    rows = [json.loads(line) for line in (assets / "mc" / "arc_easy_test_a.jsonl").read_text().splitlines()[:60]]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows if len(str(row)) < 500))
    return file


@pytest.fixture
def text(assets, tmp_path):
    lines = (assets / "lm" / "tinystories_a.jsonl").read_text().splitlines()[:5]
    file = tmp_path / "stories.txt"
    file.write_text("\n\n".join(json.loads(line)["text"] for line in lines))
    return file


@pytest.fixture
def pruned_folder(assets, tmp_path):
    """A rung-2 checkpoint: one layer without its MLP, one without its attention."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets / "models" / "stories260k_hf"
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plan = hf_cka.PruningPlan(num_layers=5, model_type="llama", removed_mlp=(1,), removed_attention=(3,))
    target = tmp_path / "pruned"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    hf_cka.save_pruned(hf_cka.apply_plan(dense, plan), target, tokenizer=tokenizer, verify=False)
    return target


@pytest.mark.assets
def test_our_multiple_choice_is_lm_evals(assets, pruned_folder, questions, tmp_path) -> None:
    """On the same items, raw and normalised, for a dense model and for a checkpoint with its own structure; offline."""
    pytest.importorskip("lm_eval")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.format(file=questions))
    settings = EvaluationSettings(include_path=str(tmp_path / "tasks"))
    for model in (assets / "models" / "stories260k_hf", pruned_folder):
        result = evaluate(
            str(model), ["local_arc", f"multiple_choice:{questions}"], settings=settings, device="cpu", progress=False
        )
        theirs, ours = result["local_arc"], result["multiple_choice:questions.jsonl"]
        assert theirs.kind == "lm-eval"
        assert theirs.n == ours.n > 40
        for metric in ("acc", "acc_norm"):
            assert ours.metrics[metric] == theirs.metrics[metric]
            # lm-eval divides by n - 1, this library by n
            assert ours.errors[metric] == pytest.approx(theirs.errors[metric] * math.sqrt(1 - 1 / ours.n))


@pytest.mark.assets
def test_tasks_by_name_are_the_functions(stories, questions, text) -> None:
    model, tokenizer = stories
    settings = EvaluationSettings(limit=None, context=128, stride=64, batch_size=3)
    names = [f"perplexity:{text}", f"multiple_choice:{questions}"]
    result = hf_cka.evaluate(model, names, tokenizer=tokenizer, settings=settings, progress=False)
    direct = perplexity(model, tokenizer, text.read_text(), context=128, stride=64)
    measured = result["perplexity:stories.txt"]
    assert measured.metrics["perplexity"] == pytest.approx(direct.value, rel=1e-6)
    assert measured.n == direct.tokens
    assert measured.details == {"context": 128, "stride": 64}
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    assert result["multiple_choice:questions.jsonl"].metrics["acc"] == multiple_choice(model, tokenizer, rows).accuracy
    assert EvaluationResult.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False))) == result
    assert str(text.parent) not in json.dumps(result.to_dict())


@pytest.mark.assets
def test_the_command_measures_a_pruned_folder(pruned_folder, questions, tmp_path) -> None:
    output = tmp_path / "result.json"
    arguments = ["evaluate", str(pruned_folder), "-t", "multiple_choice", "-d", str(questions), "--limit", "10"]
    done = CliRunner().invoke(app, [*arguments, "-o", str(output), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "acc_norm" in done.output
    saved = EvaluationResult.from_dict(json.loads(output.read_text()))
    assert saved.tasks[0].n == 10
    printed = CliRunner().invoke(app, [*arguments, "--json", "--device", "cpu"])
    assert json.loads(printed.stdout)["tasks"] == json.loads(output.read_text())["tasks"]


@pytest.mark.assets
def test_efficiency_needs_no_data_and_counts_the_files(pruned_folder) -> None:
    measured = evaluate(str(pruned_folder), "efficiency", device="cpu", progress=False)["efficiency"]
    assert measured.metrics["file_bytes"] == (pruned_folder / "model.safetensors").stat().st_size
    assert measured.metrics["tokens_per_second (batch 8)"] > 0
    assert measured.details == {"prompt_tokens": 12, "new_tokens": 128, "repeats": 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "efficiency:x.jsonl"], "takes no data"),
        (["--tasks", "multiple_choise:x.jsonl"], "Did you mean: 'multiple_choice'"),
        (["--tasks", "perplexity"], "needs data: write perplexity:FILE"),
        (["--tasks", "perplexity:missing.txt"], "There is no file 'missing.txt'"),
        (["--tasks", ","], "no task to measure"),
        (["--tasks", "perplexity", "--limit", "0"], "limit=0 must be at least 1"),
    ],
)
def test_bad_tasks_are_named_before_a_model_is_loaded(tmp_path, arguments: list, message: str) -> None:
    done = CliRunner().invoke(app, ["evaluate", str(tmp_path / "no model"), *arguments])
    assert done.exit_code == 2
    assert message in done.output


def test_an_unknown_task_of_lm_eval_lists_near_names() -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(ValueError, match="Unknown task 'arc_eazy'. Did you mean: 'arc_easy'"):
        evaluate("nowhere", "arc_eazy")


def test_a_message_lists_no_thousands_of_names() -> None:
    with pytest.raises(ValueError, match="Unknown task '#'. Known: .* and 4940 more") as error:
        lookup(dict.fromkeys(map(str, range(5000))), "#", "task")
    assert len(str(error.value)) < 1000


@pytest.mark.assets
def test_a_regression_head_is_no_classifier(stories) -> None:
    with pytest.raises(ValueError, match="a regression"):
        classify(tiny_model("bert", "classification", num_labels=1), stories[1], _reviews(2))


def test_without_lm_eval_the_error_gives_the_command(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_cka\[eval\]'"):
        evaluate("nowhere", "piqa")


def test_a_folder_that_is_no_model_is_named(tmp_path) -> None:
    (tmp_path / "text.txt").write_text("some text")
    with pytest.raises(FileNotFoundError, match="is no model: it has no config.json"):
        evaluate(str(tmp_path), f"perplexity:{tmp_path / 'text.txt'}")


def _reviews(count: int) -> list[dict]:
    words = ["good", "bad film", "a very long and dull story", "fine"]
    return [{"sentence": words[i % 4] + " indeed" * (i % 3), "label": i % 2} for i in range(count)]


@pytest.mark.assets
@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("pad_token", [0, None])
def test_classification_with_a_head_is_that_of_one_row_at_a_time(stories, family: str, pad_token) -> None:
    _, tokenizer = stories
    model = tiny_model(family, "classification", vocab_size=512, num_labels=3)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    model.config.pad_token_id = pad_token
    rows = _reviews(9)
    result = classify(model, tokenizer, rows, batch_size=4)
    for row, predicted in zip(rows, result.predictions, strict=True):
        inputs = torch.tensor(tokenizer(row["sentence"]).input_ids)[None]
        with torch.no_grad():
            assert int(model(input_ids=inputs).logits.argmax()) == predicted
    assert result.labels == tuple(row["label"] for row in rows)
    assert result.accuracy == sum(a == b for a, b in zip(result.labels, result.predictions, strict=True)) / 9
    assert result.majority == 5 / 9


@pytest.mark.assets
def test_classification_by_words_is_multiple_choice(stories) -> None:
    model, tokenizer = stories
    rows = _reviews(6)
    result = classify_by_words(model, tokenizer, rows, ["happy", "sad"], template="{text} It was")
    questions = [{**row, "choices": ["happy", "sad"], "gold": row["label"]} for row in rows]
    same = multiple_choice(model, tokenizer, questions, template="{sentence} It was")
    assert result.accuracy == same.accuracy
    assert result.predictions == tuple(item.choice() for item in same.items)


@pytest.mark.assets
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([{"sentence": "a"}], "Row 0 has no column 'label'"),
        ([{"sentence": "a", "label": 2}], "label=2 must be an index from 0 to 1"),
        ([{"sentence": "a", "label": "hapy"}], "Did you mean: 'happy'"),
    ],
)
def test_bad_rows_of_a_classification_are_named(stories, rows: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classify_by_words(*stories, rows, ["happy", "sad"])
    with pytest.raises(ValueError, match="AutoModelForSequenceClassification, but LlamaForCausalLM is none"):
        classify(*stories, rows)
