import json
import shutil

import pytest
from huggingface_hub import CommitInfo, ModelCard
from typer.testing import CliRunner

from hf_cka import PruningPlan, apply_plan, save_pruned
from hf_cka.cli import app
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    plan = PruningPlan(num_layers=4, model_type="llama", removed_layers=(2,))
    model = apply_plan(tiny_model("llama"), plan)
    return save_pruned(model, tmp_path_factory.mktemp("cli") / "pruned", verify=False).folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "pruned")


def _run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_card_is_written_and_updated(folder, tmp_path):
    done = _run("card", "--model", folder)
    assert done.exit_code == 0, done.output
    assert "names no license: it could not be found. Give it with --license." in done.output
    assert "names no base model" in done.output
    results = tmp_path / "results.json"
    results.write_text('[{"model": "pruned", "perplexity": 20.25}]')
    options = ["--base-model", "someone/llama", "--license", "mit", "--results", results, "--repo", "user/small"]
    done = _run("card", "--model", folder, *options, "--dataset", "a/b", "--limit", "English only.", "--json")
    metadata = json.loads(done.stdout)["metadata"]
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == metadata
    assert (metadata["base_model"], metadata["license"], metadata["datasets"]) == ("someone/llama", "mit", ["a/b"])
    assert "| pruned | 20.25 |" in card.text
    assert "- English only." in card.text
    assert 'from_pretrained("user/small")' in card.text


def test_push_passes_on_what_it_was_told(folder, monkeypatch):
    told = {}

    def push(path, repo, **options):
        told.update(options, path=path, repo=repo)
        return CommitInfo(
            commit_url="https://huggingface.co/u/n/commit/" + "a" * 40,
            commit_message="",
            commit_description="",
            oid="a" * 40,
        )

    monkeypatch.setattr("hf_cka.hub.push_pruned", push, raising=False)
    done = _run("push", "--model", folder, "--repo", "u/n", "--private", "--revision", "next", "--no-verify")
    assert done.exit_code == 0, done.output
    assert "Pushed https://huggingface.co/u/n/commit/" in done.output
    assert told == {
        "path": folder,
        "repo": "u/n",
        "private": True,
        "revision": "next",
        "commit_message": None,
        "create_pr": False,
        "verify": False,
    }


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["card", "--model", "nowhere"], "There is no folder 'nowhere'"),
        (["push", "--model", "nowhere", "--repo", "u/n"], "There is no folder 'nowhere'"),
        (["push", "--model", "nowhere", "--repo", "n"], "repo_id='n' does not name a repository"),
    ],
)
def test_bad_input_is_said(command, message):
    done = _run(*command)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output
