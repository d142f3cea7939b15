import re
from dataclasses import replace

import pytest

from hf_cka import LayerSelection, select_layers
from tests.tiny import SETTINGS, tiny_batch, tiny_model


@pytest.fixture(scope="module")
def selection():
    return select_layers(tiny_model("llama"), [tiny_batch(8)], 0.5, progress=False)


def test_a_selection_survives_the_disk(selection, tmp_path):
    for target in (tmp_path, tmp_path / "cka.json", tmp_path / "new_folder"):
        assert LayerSelection.load(selection.save(target)) == selection
    assert LayerSelection.load(tmp_path) == selection


def test_a_missing_selection_says_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no selection at"):
        LayerSelection.load(tmp_path)


def test_an_unknown_format_is_refused(selection):
    with pytest.raises(ValueError, match="Selection format 2 is not known"):
        LayerSelection.from_dict({**selection.to_dict(), "version": 2})


def test_ties_are_the_layers_near_the_cut(selection):
    made = replace(selection, layers=(0, 1), scores=(0.9, 0.51, 0.49, 0.1), errors=(0.1, 0.05, 0.05, 0.1))
    assert made.ties == (1, 2)
    assert made.table().count("~") == 3  # two layers and the legend
    assert replace(made, errors=(0.001,) * 4).ties == ()


@pytest.mark.parametrize("model_type", SETTINGS)
def test_every_form_of_the_targets_reaches_the_same_modules(model_type):
    """Block numbers, exact names and the regular expression: what PEFT adapts is what was chosen."""
    from peft import LoraConfig, get_peft_model

    chosen = select_layers(tiny_model(model_type), [tiny_batch(8)], 0.5, progress=False)
    forms = [
        chosen.lora_kwargs(),
        chosen.lora_kwargs(exact=True),
        {"target_modules": chosen.target_regex()},
    ]
    for kwargs in forms:
        adapted = get_peft_model(tiny_model(model_type), LoraConfig(r=2, **kwargs))
        assert sorted(adapted.base_model.targeted_module_names) == sorted(chosen.module_names()), kwargs


def test_short_names_are_given_up_where_another_tower_would_be_hit():
    from torch import nn

    model = tiny_model("llama")
    tower = nn.Module()
    tower.layers = nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict({"up_proj": nn.Linear(2, 2)})})])
    model.vision_tower = tower
    chosen = select_layers(model, [tiny_batch(8)], 0.5, progress=False)
    assert chosen.ambiguous
    assert set(chosen.lora_kwargs()) == {"target_modules"}
    assert all(name.startswith("model.layers.") for name in chosen.lora_kwargs()["target_modules"])


def test_target_modules_narrow_the_projections(selection):
    some = selection.module_names(["q_proj", "v_proj"])
    assert len(some) == 4
    assert all(name.endswith(("q_proj", "v_proj")) for name in some)
    assert selection.module_names(r".*\.(q|v)_proj") == some
    assert selection.lora_kwargs(["q_proj", "v_proj"])["target_modules"] == ["self_attn.q_proj", "self_attn.v_proj"]
    assert selection.module_names("all-linear") == selection.module_names()
    rule = re.compile(selection.target_regex(["q_proj", "v_proj"]))
    assert [name for name in selection.module_names() if rule.fullmatch(name)] == some


def test_targets_that_match_nothing_list_what_is_there(selection):
    with pytest.raises(ValueError, match=r"target_modules=\['query'\] matches no projection.*self_attn.q_proj"):
        selection.lora_kwargs(["query"])


def test_every_stack_of_a_table_has_its_name(selection):
    first = replace(selection, others=(replace(selection, layers_path="encoder.layers"),))
    assert "of model.layers chosen" in first.table()
    assert "of encoder.layers chosen" in first.table()
