"""One call measures every model on the same data; report, table, JSON and model card say the same numbers."""

from __future__ import annotations

import copy
import json
import math

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from hf_cka import PruningPlan, apply_plan, save_pruned
from hf_cka.cli import app
from hf_cka.evaluation import ReportData, compare, evaluate, multiple_choice, perplexity, training_curves, write_report
from hf_cka.evaluation.comparison import ComparisonSettings
from tests.tiny import tiny_model

TEXTS = [
    f"Once upon a time, there was a {animal} who lived near the {place}. It liked to play with its friends all day."
    for animal in ("cat", "dog", "bird")
    for place in ("park", "sea")
]
SMALL = ComparisonSettings(context=64, max_tokens=128, rows=4, num_samples=6, max_length=32, top=2, repeats=1)


def _prune(model, **plan):
    return apply_plan(copy.deepcopy(model), PruningPlan(num_layers=5, model_type="llama", **plan))


@pytest.fixture
def folders(stories, tmp_path):
    model, tokenizer = stories
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    save_pruned(_prune(model, removed_layers=(2,)), tmp_path / "depth", tokenizer=tokenizer, verify=False)
    log = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}, {"step": 2, "eval_loss": 2.6}]
    (tmp_path / "depth" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    plan = {"removed_attention": (1,), "kept_units": {3: range(40)}}
    save_pruned(_prune(model, **plan), tmp_path / "uneven", tokenizer=tokenizer, verify=False)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return tmp_path


@pytest.mark.assets
def test_every_part_is_measured_and_says_the_same_everywhere(stories, tmp_path) -> None:
    model, tokenizer = stories
    others = {"depth": _prune(model, removed_layers=(2,)), "same": copy.deepcopy(model)}
    log = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}]
    found = compare(model, others, TEXTS, tokenizer=tokenizer, settings=SMALL, logs={"depth": log}, source="stories")
    assert [curve.points[-1] for curve in found.others[0].curves] == [(2.0, 2.5)]
    depth, same = found.others
    assert found.base.name == "dense"
    assert same.perplexity == found.base.perplexity
    assert same.disagreement.same_top == 1.0
    assert all(abs(change) < 1e-6 for change, _ in same.similarity.changes.values())
    assert depth.strip.removed == (2,)
    assert depth.cache_bytes_per_token == pytest.approx(found.base.cache_bytes_per_token * 4 / 5)
    assert depth.decode_flops < found.base.decode_flops
    assert depth.disagreement.kl > 0
    assert depth.memory is None  # a loaded model has no process of its own
    assert "peak memory MB" not in found.results()[0]
    text = "\n\n".join(TEXTS)
    alone = perplexity(others["depth"], tokenizer, text, context=64, max_tokens=128)
    assert math.isclose(depth.perplexity.value, alone.value, rel_tol=1e-6)
    data = found.report()
    written = json.loads(write_report(data, tmp_path / "report.html").with_suffix(".json").read_text())
    assert ReportData.from_dict(written) == data
    row = written["results"][1]
    assert (row["model"], row["perplexity"]) == ("depth", depth.perplexity.value)
    assert row["removed"] == pytest.approx(1 - depth.parameters / found.base.parameters)


@pytest.mark.assets
def test_the_command_writes_a_page_and_the_card_takes_its_numbers(folders, monkeypatch) -> None:
    monkeypatch.chdir(folders)
    run = CliRunner()
    options = ["--dataset", "data.jsonl", "--output", "out", "--max-tokens", "128", "--context", "64", "--rows", "3"]
    done = run.invoke(app, ["compare", "dense", "depth", "uneven", *options, "--num-samples", "6", "--json"])
    assert done.exit_code == 0, done.output
    page = (folders / "out" / "report.html").read_text()
    for shown in ("Training of depth", "Quality over size", "Where dense and uneven disagree most", "Robustness"):
        assert shown in page
    report = json.loads((folders / "out" / "report.json").read_text())
    strips = next(b for s in report["sections"] for b in s["blocks"] if b["kind"] == "layer_stack")["strips"]
    assert strips[2]["removed_attention"] == [1]
    assert 0 < strips[2]["mlp_share"][3] < 1
    peaks = [row["peak memory MB"] for row in report["results"]]
    assert all(peak > 50 for peak in peaks)  # three fresh processes, each with Python and torch in it
    assert f"{peaks[1]:.1f}" in page
    done = run.invoke(app, ["card", "--model", "depth", "--license", "mit", "--report", "out/report.json"])
    assert done.exit_code == 0, done.output
    card = (folders / "depth" / "README.md").read_text()
    value = report["results"][1]["perplexity"]
    row = next(line for line in card.splitlines() if line.startswith("| depth |"))
    assert f"{value:.4g}" in row
    assert f"{report['results'][1]['removed']:.1%}" in row
    assert "Perplexity of " in card


@pytest.mark.assets
def test_what_cannot_be_compared_is_refused_before_it_is_measured(stories, folders) -> None:
    model, tokenizer = stories
    empty = folders / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"is no model: it has no config\.json"):
        compare(model, [str(empty)], TEXTS, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="no text"):
        compare(model, {"same": model}, [], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="nothing to compare"):
        compare(model, [], TEXTS, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="needs its tokenizer"):
        compare(model, {"same": model}, TEXTS)
    with pytest.raises(ValueError, match="causal language model"):
        compare(tiny_model("bert"), {"same": model}, TEXTS, tokenizer=tokenizer, settings=SMALL)
    other = AutoTokenizer.from_pretrained(folders / "dense")
    other.add_tokens(["<new>"])
    other.save_pretrained(folders / "depth")
    with pytest.raises(ValueError, match="'depth' has another tokenizer than the base"):
        compare(model, [str(folders / "depth")], TEXTS, tokenizer=tokenizer, settings=ComparisonSettings(parts=()))


@pytest.mark.assets
def test_further_tasks_are_measured_on_every_model(stories, tmp_path) -> None:
    model, tokenizer = stories
    (tmp_path / "test.txt").write_text("\n\n".join(TEXTS))
    task = f"perplexity:{tmp_path / 'test.txt'}"
    settings = ComparisonSettings(parts=(), tasks=(task,))
    found = compare(model, {"same": model}, TEXTS, tokenizer=tokenizer, settings=settings)
    expected = evaluate(model, [task], tokenizer=tokenizer, progress=False).tasks[0]
    for row in found.results():
        assert row[f"{expected.task} perplexity"] == pytest.approx(expected.metrics["perplexity"])
    unknown = ComparisonSettings(parts=(), tasks=("perplexitty",))
    with pytest.raises(ValueError, match="Did you mean: 'perplexity'"):
        compare(model, {"same": model}, TEXTS, tokenizer=tokenizer, settings=unknown)


@pytest.mark.assets
def test_questions_are_answered_and_their_texts_serve_the_rest(stories) -> None:
    model, tokenizer = stories
    rows = [{"question": text[:40], "choices": [text[40:], "no"], "gold": 0} for text in TEXTS]
    settings = ComparisonSettings(parts=("quality", "robustness"), context=64, max_tokens=128, rates=(0.1, 0.5))
    found = compare(model, {"same": model}, rows, tokenizer=tokenizer, settings=settings)
    assert found.others[0].choices.n == len(rows)
    row = found.results()[0]
    assert row["accuracy"] == multiple_choice(model, tokenizer, rows).accuracy
    for column, cases in (("accuracy, damaged", "choice_robustness"), ("next-token accuracy, damaged", "robustness")):
        damaged = getattr(found.base, cases)[1:]
        assert len(damaged) == 3 * 2
        assert row[column] == pytest.approx(sum(one.accuracy for one in damaged) / 6)
    section = next(section for section in found.report().sections if section.title == "Robustness")
    assert [table.title for table in section.blocks] == ["Under damaged text", "Questions under damaged text"]
    assert [one[0] for one in section.blocks[1].rows] == [one[0] for one in section.blocks[0].rows]
    assert section.blocks[1].columns[1:3] == ("accuracy, dense", "accuracy, same")


@pytest.mark.assets
def test_damage_that_makes_a_question_too_long_is_told(stories) -> None:
    model, tokenizer = stories
    limit = model.config.max_position_embeddings
    question = " ".join(["happy"] * limit)
    while len(tokenizer(f"Question: {question}\nAnswer: yes")["input_ids"]) > limit:
        question = question[:-6]
    settings = ComparisonSettings(parts=("quality", "robustness"), context=64, max_tokens=128, rates=(0.5,))
    rows = [{"question": question, "choices": ["yes", "no"], "gold": 0}]
    found = compare(model, {"same": model}, rows, tokenizer=tokenizer, settings=settings)
    assert found.base.choices.n == 1
    assert found.base.choice_robustness == ()
    assert "dense: no robustness of the questions: Row 0 has" in found.report().sections[0].text


@pytest.mark.parametrize(
    ("options", "message"),
    [({"parts": ("speeed",)}, "Did you mean: 'speed'"), ({"num_samples": 3}, "num_samples=3 must be at least 4")],
)
def test_settings_are_checked_when_made(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ComparisonSettings(**options)


def test_the_newest_checkpoint_gives_the_curves(tmp_path) -> None:
    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": step, "loss": 1.0}]}))
    assert training_curves(tmp_path, "run")[0].points == ((10.0, 1.0),)
    assert training_curves(tmp_path, "run")[0].name == "run, training"
    (tmp_path / "trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        training_curves(tmp_path)
