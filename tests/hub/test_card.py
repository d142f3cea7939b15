"""The card says what the folder says: nothing invented, nothing lost, and it parses."""

import ast
import json
import re
import shutil

import pytest
import torch
import transformers
from huggingface_hub import ModelCard

from hf_cka import PruningPlan, apply_plan
from hf_cka.hub import model_card
from hf_cka.hub.card import BEGIN, END
from hf_cka.hub.facts import read_facts
from hf_cka.hub.tables import layer_stack
from tests.tiny import tiny_batch, tiny_model


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of a checkpoint to write into."""
    return shutil.copytree(saved["stock"].folder, tmp_path / "out")


def test_metadata_survives_a_round_trip(saved, tmp_path):
    card = model_card(saved["stock"].folder, license="apache-2.0")
    card.save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "someone/tiny-llama",
        "base_model_relation": "finetune",
        "license": "apache-2.0",
        "datasets": ["someone/texts"],
        "tags": ["hf_cka", "pruned", "cka"],
    }


@pytest.mark.parametrize("name", ["stock", "relabel", "uneven"])
def test_the_examples_are_code_and_name_the_repository(saved, name):
    text = model_card(saved[name].folder, repo_id="user/small").text
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == (4 if name == "uneven" else 3)
    for block in blocks:
        ast.parse(block)
    assert 'AutoModelForCausalLM.from_pretrained("user/small")' in blocks[0]
    assert 'from_pretrained("someone/tiny-llama", revision="0123abc")' in text
    assert "{{" not in text
    assert "{%" not in text


@pytest.mark.parametrize("name", ["stock", "uneven"])
def test_the_recipe_of_the_card_gives_the_same_model(saved, name, monkeypatch):
    """The last two examples run as they stand: from the base model to this one, and to the settings of the search."""
    import hf_cka

    blocks = re.findall(r"```python\n(.*?)```", model_card(saved[name].folder, repo_id="user/small").text, re.DOTALL)
    again, search = blocks[-2:]
    asked = []

    def base_model(name, revision):
        asked.append((name, revision))
        return tiny_model("llama", num_key_value_heads=4)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", base_model)
    read = transformers.AutoConfig.from_pretrained
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda repo: read(saved[name].folder))
    monkeypatch.setattr("hf_cka.prune", lambda model, batches, config: config, raising=False)
    names: dict = {"batches": [], "base": None}
    exec(again + search, names)
    assert asked == [("someone/tiny-llama", "0123abc")]
    with torch.no_grad():
        assert torch.equal(names["model"](**tiny_batch(pad="left"), use_cache=False).logits, saved[name].logits)
    assert names["result"] == hf_cka.PruningConfig(method="depth", criterion="cka", num_layers=1, seed=3)


def test_who_can_load_it_depends_on_the_rung(saved):
    stock, relabel, uneven = (model_card(saved[name].folder).text for name in ("stock", "relabel", "uneven"))
    assert "trust_remote_code" not in stock
    assert "hf_cka is not needed" in stock
    assert "stored as `MistralForCausalLM`" in relabel
    assert "trust_remote_code=True" in uneven
    assert "Do not load it with `LlamaForCausalLM.from_pretrained`" in uneven
    assert "**random weights**" in uneven


def test_what_was_removed_is_told_by_original_index(saved):
    stock, uneven = (model_card(saved[name].folder).text for name in ("stock", "uneven"))
    assert "| whole layers | 1 of 4 | 1 |" in stock
    assert "| attention sub-layers | 1 of 4 | 1 |" in uneven
    assert "| MLP sub-layers | 1 of 4 | 2 |" in uneven
    assert "| MLP units | 60 of 96 | in layers 0, 3 |" in uneven
    assert "| 0 | 4 | 48 → 24 |" in uneven
    assert "| 3 | 4 | 48 → 12 |" in uneven
    parameters = [f"{count:,}" for count in read_facts(saved["stock"].folder).parameters]
    assert all(count in stock for count in parameters)


def test_the_picture_shows_every_layer(saved):
    assert layer_stack(read_facts(saved["stock"].folder)).splitlines()[:3] == [
        "layer      0",
        "attention  █·██",
        "MLP        █·██",
    ]
    uneven = layer_stack(read_facts(saved["uneven"].folder)).splitlines()
    assert uneven[1:3] == ["attention  █·██", "MLP        ▄█·▂"]


def test_a_deep_model_s_picture_wraps(tmp_path):
    model = tiny_model("llama", num_hidden_layers=64)
    apply_plan(model, PruningPlan(num_layers=64, model_type="llama", removed_layers=(10, 63)))
    model.save_pretrained(tmp_path)
    first, second, legend = layer_stack(read_facts(tmp_path)).split("\n\n")
    assert first.splitlines() == [
        "layer      0         10        20        30        40        50",
        "attention  " + "█" * 10 + "·" + "█" * 49,
        "MLP        " + "█" * 10 + "·" + "█" * 49,
    ]
    assert second.splitlines() == ["layer      60", "attention  ███·", "MLP        ███·"]
    assert legend == "█ kept   · removed"


def test_calibration_scores_and_settings_are_shown(saved):
    text = model_card(saved["stock"].folder).text
    assert "| calibration data | someone/texts:plain, 128 samples, 9,000 tokens, seed 7, hash ab12 |" in text
    assert '"criterion": "cka"' in text
    scores = re.search(r"\| structure \| score \|\n\|---\|---\|\n((?:\|.*\n)+)", text)[1]
    assert scores.splitlines()[0] == "| layer 0 | 0 |"


def test_the_history_of_a_run_is_a_table(folder):
    from hf_cka import PruningConfig, prune

    result = prune(tiny_model("llama"), [], PruningConfig(criterion="random", num_layers=2))
    scores = {"format_version": 1, "scores": json.loads(result.history.to_json())}
    (folder / "pruning_scores.json").write_text(json.dumps(scores))
    text = model_card(folder).text
    assert "<summary>The steps, and the score of what went</summary>" in text
    assert result.history.table() in text
    scores["scores"]["version"] = 99
    (folder / "pruning_scores.json").write_text(json.dumps(scores))
    assert "`pruning_scores.json` holds what the criterion measured." in model_card(folder).text


def test_a_model_saved_without_save_pruned_has_a_card_too(tmp_path):
    """`save_pretrained` of a pruned model keeps the plan, but not how it was found."""
    model = apply_plan(tiny_model("bert"), PruningPlan(num_layers=4, model_type="bert", removed_mlp=(0,)))
    model.save_pretrained(tmp_path)
    card = model_card(tmp_path)
    assert card.data.pipeline_tag == "fill-mask"
    assert card.data.base_model is None
    assert "base_model_relation" not in card.data
    assert card.data.tags == ["hf_cka", "pruned"]
    assert "| method | not recorded |" in card.text
    assert "| calibration data | not recorded |" in card.text


def test_an_unknown_licence_is_left_out_and_said(saved, monkeypatch):
    def refused(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refused)
    card = model_card(saved["stock"].folder)
    assert card.data.license is None
    assert "**No licence is stated**: the card of someone/tiny-llama could not be read" in card.text


def test_the_licence_is_carried_over_from_the_base_s_card(saved, monkeypatch, tmp_path):
    asked = []

    def download(repo, file, revision=None, **_):
        asked.append((repo, file, revision))
        (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\nx")
        return str(tmp_path / "README.md")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    data = model_card(saved["stock"].folder).data
    assert (data.license, data.license_name, data.license_link) == ("other", "llama3", "LICENSE")
    assert asked == [("someone/tiny-llama", "README.md", "0123abc")]


def test_results_become_a_table_and_their_absence_is_said(saved, tmp_path):
    assert "None were measured for this card." in model_card(saved["stock"].folder).text
    rows = [{"model": "dense", "perplexity": 19.4961}, {"model": "pruned", "perplexity": 31.0, "layers": 3}]
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"rows": rows, "command": "python measure.py", "notes": "One seed."}))
    text = model_card(saved["stock"].folder, results=file, limits="English only.").text
    assert "| model | perplexity | layers |\n|---|---|---|\n| dense | 19.5 |  |\n| pruned | 31 | 3 |" in text
    assert "```console\npython measure.py\n```" in text
    assert "One seed." in text
    assert "- English only." in text
    assert "None were measured" not in text


def test_an_update_keeps_what_the_author_wrote(folder):
    readme = folder / "README.md"
    model_card(folder, license="mit").save(readme)
    card = ModelCard.load(readme)
    card.data.language = "en"
    card.data.tags.append("mine")
    card.text = f"\n# My own title\n\nMy words.\n\n{card.text[card.text.index(BEGIN) :]}\n## Thanks\n\nTo all.\n"
    card.save(readme)
    model_card(folder, results=[{"model": "pruned", "perplexity": 31.5}]).save(readme)
    again = ModelCard.load(readme)
    assert again.data.license == "mit"
    assert again.data.language == "en"
    assert again.data.tags == ["hf_cka", "pruned", "cka", "mine"]
    assert again.text.startswith("\n# My own title\n\nMy words.\n\n" + BEGIN)
    assert again.text.endswith(END + "\n\n## Thanks\n\nTo all.\n")
    assert "| pruned | 31.5 |" in again.text
    assert "No licence is stated" not in again.text
    before = readme.read_text()
    model_card(folder, results=[{"model": "pruned", "perplexity": 31.5}]).save(readme)
    assert readme.read_text() == before


def test_a_card_of_another_tool_is_kept_and_extended(folder):
    (folder / "README.md").write_text("---\nlibrary_name: transformers\ntags: [trl]\n---\n# Model Card\n\nTrained.\n")
    card = model_card(folder, license="mit")
    assert card.text.startswith("# Model Card\n\nTrained.\n\n" + BEGIN)
    assert card.data.tags == ["trl", "hf_cka", "pruned", "cka"]
    assert card.data.base_model == "someone/tiny-llama"


def test_folders_of_this_machine_do_not_enter_the_card(folder):
    config = json.loads((folder / "config.json").read_text())
    config["pruning"] |= {"base_model": "/home/someone/models/llama", "calibration": {"source": "/data/x/train.jsonl"}}
    (folder / "config.json").write_text(json.dumps(config))
    card = model_card(folder)
    assert "/home/someone" not in str(card)
    assert "/data/x" not in str(card)
    assert card.data.base_model is None
    assert card.data.datasets is None
    assert "`llama` after structured pruning" in card.text


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (None, {"base_model": "/home/someone/llama"}, "base_model='/home/someone/llama' is not a Hub id"),
        (None, {"repo_id": "small"}, "repo_id='small' is not a Hub id"),
        (None, {"results": {"perplexity": 3}}, "results must be a list of rows"),
        (None, {"results": []}, "results must be a list of rows"),
        ("# t\n" + BEGIN, {}, "needs one of each"),
        ("---\ntags: [unclosed\n---\nx", {}, "metadata of .* cannot be read"),
    ],
)
def test_bad_input_is_said(folder, change, arguments, message):
    if change:
        (folder / "README.md").write_text(change)
    with pytest.raises(ValueError, match=message):
        model_card(folder, **arguments)


def test_without_jinja2_the_fix_is_named(saved, monkeypatch):
    monkeypatch.setattr("huggingface_hub.repocard.is_jinja_available", lambda: False)
    with pytest.raises(ImportError, match=r"pip install 'hf_cka\[report\]'"):
        model_card(saved["stock"].folder, license="mit")


def test_a_local_folder_of_the_same_name_does_not_matter(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user" / "small").mkdir(parents=True)
    assert 'from_pretrained("user/small")' in model_card(saved["stock"].folder, repo_id="user/small").text


def test_a_folder_that_is_no_pruned_checkpoint_is_said(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        model_card(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing.json"):
        model_card(folder, results=tmp_path / "nothing.json")
    config = json.loads((folder / "config.json").read_text())
    del config["pruning"]["parameters_before"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks parameters_before"):
        model_card(folder)
    config["pruning"]["format_version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="format_version 99; this hf_cka reads 1 and 2. Update hf_cka"):
        model_card(folder)
