"""Push with the real client to a Hub on the loopback interface, then load from it as a stranger would."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from hf_cka import PruningPlan
from hf_cka.hub import push_pruned
from hf_cka.modeling import CheckpointError
from tests.hub.server import TOKEN, LoopbackHub
from tests.tiny import tiny_batch

PUSH = """
import json, sys
from pathlib import Path
from transformers import AutoModelForCausalLM
import hf_cka
from hf_cka.hub import push_pruned

stock, uneven, relabel = sys.argv[1:]
push_pruned(stock, "user/stock", verify=False)
push_pruned(relabel, "user/relabel", verify=False)
commit = push_pruned(uneven, "user/uneven", private=True)
for folder in (stock, uneven):
    Path(folder, "NOTES.md").write_text("more to say")  # the client makes no commit without a change
branch = push_pruned(stock, "user/stock", revision="smaller", commit_message="on a branch", verify=False)
request = push_pruned(uneven, "user/uneven", create_pr=True, commit_message="as a request", verify=False)
for folder, name in ((stock, "stock"), (uneven, "uneven")):
    # as a user does right after pruning, without save_pruned
    AutoModelForCausalLM.from_pretrained(folder).push_to_hub(f"user/{name}-direct")
try:
    push_pruned(stock, "user/forbidden", token="hf_wrong", verify=False)
except OSError as error:
    answer = str(error)
print(json.dumps({"answer": answer, "url": commit.commit_url, "pr": request.pr_url, "branch": branch.oid}))
"""

LOAD = """
import json, sys
sys.modules["hf_cka"] = None  # not installed
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ids = torch.tensor(json.loads(sys.argv[1])["input_ids"])
mask = torch.tensor(json.loads(sys.argv[1])["attention_mask"])
answers = {}

def load(key, name, **kwargs):
    model, report = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **kwargs)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()  # aligned memory, so that only the values decide the last bit
    with torch.no_grad():
        answers[key] = model.eval()(input_ids=ids, attention_mask=mask, use_cache=False).logits
    print(key, type(model).__module__.partition(".")[0], type(model).__name__)

load("stock", "user/stock")
load("stock, branch", "user/stock", revision="smaller")
load("stock, direct", "user/stock-direct")
load("relabel", "user/relabel")
try:
    AutoModelForCausalLM.from_pretrained("user/uneven", trust_remote_code=False)
except ValueError as error:
    print("refused", "trust_remote_code" in str(error))
load("uneven, remote code", "user/uneven", trust_remote_code=True)
load("uneven, direct, remote code", "user/uneven-direct", trust_remote_code=True)
print("tokens", AutoTokenizer.from_pretrained("user/stock")("w5 w7")["input_ids"])

del sys.modules["hf_cka"]
import hf_cka
load("uneven, package", "user/uneven")
load("uneven, pull request", "user/uneven", revision="refs/pr/1")
save_file(answers, sys.argv[2])
"""


def _client(code: str, environment: dict[str, str], *args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *args], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def hub(saved, tmp_path_factory):
    """The Hub after both rungs were pushed, and what the pushing process printed."""
    root = tmp_path_factory.mktemp("pushed")
    folders = [shutil.copytree(saved[name].folder, root / name) for name in ("stock", "uneven", "relabel")]
    (folders[0] / "training_args.bin").write_bytes(b"/home/someone/out")  # stays behind, and does not stop the push
    with LoopbackHub() as running:
        output = _client(PUSH, running.environment(root / "home"), *map(str, folders))
        yield running, json.loads(output.splitlines()[-1]), root


def test_what_was_pushed_loads_by_name_and_computes_the_same(hub, saved, tmp_path):
    running, _, _ = hub
    arguments = json.dumps({name: value.tolist() for name, value in tiny_batch(pad="left").items()})
    output = _client(LOAD, running.environment(tmp_path / "home"), arguments, str(tmp_path / "answers"))
    logits = load_file(tmp_path / "answers")
    assert len(logits) == 8
    for key, found in logits.items():
        assert torch.equal(found, saved[key.partition(",")[0]].logits), key
    lines = output.splitlines()
    assert "stock transformers LlamaForCausalLM" in lines
    assert "relabel transformers MistralForCausalLM" in lines
    assert "uneven, remote code transformers_modules PrunedLlamaForCausalLM" in lines
    assert "uneven, package hf_cka PrunedLlamaForCausalLM" in lines
    assert "refused True" in lines
    assert "tokens [5, 7]" in lines


def test_nothing_pushed_holds_a_path_of_this_machine_or_a_token(hub, saved):
    running, _, root = hub
    secrets = [TOKEN, str(root), str(Path.home()) + "/", str(saved["stock"].folder.parent), str(Path.cwd())]
    names = set(running.repos)
    assert names == {"user/stock", "user/uneven", "user/relabel", "user/stock-direct", "user/uneven-direct"}
    for name in names:
        files = running.files(name)
        assert {"config.json", "model.safetensors", "README.md"} <= set(files)
        assert "training_args.bin" not in files
        for path, content in files.items():
            for secret in secrets:
                assert secret.encode() not in content, f"{name}: {path} holds {secret}"


def test_the_card_is_pushed_and_read_back(hub):
    running, printed, root = hub
    card = ModelCard(running.files("user/uneven")["README.md"].decode())
    assert card.data.base_model == "someone/tiny-llama"
    assert card.data.base_model_relation == "finetune"
    assert 'from_pretrained("user/uneven", trust_remote_code=True)' in card.text
    assert "USER/NAME" not in card.text
    assert (root / "uneven" / "README.md").read_bytes() == running.files("user/uneven")["README.md"]
    assert printed["url"].startswith(f"{running.endpoint}/user/uneven/commit/")
    assert running.repos["user/uneven"].private
    assert not running.repos["user/stock"].private


def test_branches_and_pull_requests(hub):
    running, printed, _ = hub
    stock, uneven = running.repos["user/stock"], running.repos["user/uneven"]
    assert set(stock.refs) == {"main", "smaller"}
    assert set(uneven.refs) == {"main", "refs/pr/1"}
    assert printed["pr"] == f"{running.endpoint}/user/uneven/discussions/1"
    assert stock.messages[1:] == ["Upload llama pruned with hf_cka: 21.3% of it removed", "on a branch"]
    assert "NOTES.md" in running.files("user/stock", "smaller")
    assert "NOTES.md" not in running.files("user/stock")


def test_what_the_hub_refuses_is_passed_on(hub):
    running, printed, _ = hub
    assert "401" in printed["answer"]
    assert "user/forbidden" not in running.repos


def test_the_model_s_own_push_to_hub_sends_the_remote_code(hub):
    running, _, _ = hub
    files = running.files("user/uneven-direct")
    assert "modeling_hf_cka.py" in files
    config = json.loads(files["config.json"])
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_hf_cka.PrunedLlamaForCausalLM"
    assert PruningPlan.from_dict(config["pruning"]["plan"]).removed_mlp == (2,)


@pytest.mark.parametrize(
    ("repo_id", "message"),
    [
        ("name", "repo_id='name' does not name a repository. Give 'user/name'"),
        ("user/", "does not name a repository"),
        ("user/two words", "does not name a repository"),
        ("a/b/c", "does not name a repository"),
    ],
)
def test_a_bad_repository_name_is_said(saved, repo_id, message):
    with pytest.raises(ValueError, match=message):
        push_pruned(saved["stock"].folder, repo_id, token=TOKEN)


def test_a_folder_that_is_no_pruned_checkpoint_is_said(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder .*nowhere"):
        push_pruned(tmp_path / "nowhere", "user/name", token=TOKEN)
    with pytest.raises(FileNotFoundError, match="no config.json. Give the folder that save_pruned wrote"):
        push_pruned(tmp_path, "user/name", token=TOKEN)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="without a 'pruning' record"):
        push_pruned(tmp_path, "user/name", token=TOKEN)
    shutil.copy(saved["stock"].folder / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="no weights"):
        push_pruned(tmp_path, "user/name", token=TOKEN)


def test_a_branch_and_a_pull_request_exclude_each_other(saved):
    with pytest.raises(ValueError, match="revision='x'. Give one of them"):
        push_pruned(saved["stock"].folder, "user/name", token=TOKEN, revision="x", create_pr=True)


def test_without_a_token_nothing_is_checked_or_sent(saved, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(PermissionError, match="hf auth login"):
        push_pruned(saved["stock"].folder, "user/name")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("notes.txt", "data in /home/someone/data", "notes.txt, line 1: path /home/someone/data"),
        ("run.yaml", f"token: {TOKEN}", "run.yaml, line 1: token hf_Loo..."),
        ("README.md", "---\nlicense: mit\n---\n# Mine\nsee C:\\Users\\me", "README.md, line 5: path C:"),
    ],
)
def test_a_path_or_a_token_stops_the_push(saved, tmp_path, file, text, message):
    folder = shutil.copytree(saved["stock"].folder, tmp_path / "out")
    (folder / file).write_text(text)
    before = {path.name for path in folder.iterdir()}
    with pytest.raises(ValueError, match="Nothing was pushed") as error:
        push_pruned(folder, "user/name", token=TOKEN, verify=False)
    assert message in str(error.value)
    assert TOKEN not in str(error.value)
    assert {path.name for path in folder.iterdir()} == before


def test_a_checkpoint_that_fails_its_checks_is_not_pushed(saved, tmp_path, monkeypatch):
    class Failed:
        passed = False

        def __str__(self):
            return "FAILED  loads with transformers alone"

    monkeypatch.setattr("hf_cka.modeling.verify", lambda folder: Failed(), raising=False)
    folder = shutil.copytree(saved["stock"].folder, tmp_path / "out")
    with pytest.raises(CheckpointError, match="nothing was pushed(.|\n)*FAILED  loads"):
        push_pruned(folder, "user/name", token=TOKEN)
    assert not (folder / "README.md").exists()
