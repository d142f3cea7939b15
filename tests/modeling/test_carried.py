"""A model that carries LoRA adapters is pruned with them: the same function, and an adapter that loads on it."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from hf_cka.anatomy import find_anatomy
from hf_cka.modeling.plan import PruningPlan
from hf_cka.modeling.surgery import apply_plan, parameter_map
from hf_cka.pruning.config import PruningConfig
from hf_cka.pruning.pruners import prune
from tests.modeling.test_surgery import make_plan, zero_out
from tests.tiny import tiny_batch, tiny_model

# one family per layout of the weights: separate, fused (concatenated, interleaved), transposed, post-norm
FAMILIES = ("llama", "olmo2", "phi3", "gpt2", "gpt_neox", "bert", "deberta-v2", "modernbert")


def adapted(model_type, seed=1, double=True, **settings):
    """A tiny model with random (not zero) adapters in every projection, or in what `settings` name."""
    model = tiny_model(model_type)
    anatomy = find_anatomy(model)
    names = {path.rpartition(".")[2] for path in anatomy.linear_names}
    if model_type in ("bert", "deberta-v2", "gpt_neox"):  # "dense" alone would also name the head
        names = {f"{anatomy.layer_name(i)}.{path}" for i in range(4) for path in anatomy.linear_names}
    settings = {"r": 3, "lora_alpha": 5, "target_modules": names, **settings}
    return randomised(get_peft_model(model, LoraConfig(**settings)), seed, double)


def randomised(model, seed=1, double=True):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return (model.double() if double else model).eval()


def logits(model):
    with torch.no_grad():
        return model(**tiny_batch()).logits[tiny_batch()["attention_mask"].bool()]


@pytest.mark.parametrize("operation", ["layers", "attention", "mlp", "units", "groups", "mixed"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_equals_the_adapted_model_with_the_same_parts_zeroed(model_type, operation, tmp_path):
    plan = make_plan(model_type, operation)
    model = adapted(model_type)
    # the oracle has no adapters: they are merged into its weights before parts of it are zeroed
    expected = logits(zero_out(copy.deepcopy(model).merge_and_unload(), plan))
    without = logits(apply_plan(tiny_model(model_type).double(), plan))
    same = apply_plan(model, plan)
    assert same is model
    found = logits(model)
    assert (found - expected).abs().max() < 1e-9 * expected.abs().max()
    assert (found - without).abs().max() > 1e-3 * expected.abs().max(), "the adapters must matter"
    model.save_pretrained(tmp_path)
    base = apply_plan(tiny_model(model_type).double(), plan)
    loaded = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False).double().eval()
    assert torch.equal(logits(loaded), found)
    assert set(loaded.base_model.targeted_module_names) == set(model.base_model.targeted_module_names)
    merged = model.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert (logits(merged) - found).abs().max() < 1e-9 * expected.abs().max()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2, 3]},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 2, "layers_pattern": "layers"},
        {"target_modules": r".*layers\.[23]\..*(q_proj|down_proj)"},
        {"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj"]},
        {"target_modules": ["2.self_attn.v_proj"]},
        {"target_modules": "all-linear", "exclude_modules": ["model.layers.3.mlp.down_proj"]},
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {r"^model\.layers\.2\.self_attn\.q_proj": 5, "down_proj": 2},
            "alpha_pattern": {"layers.3.mlp.down_proj": 7},
        },
        {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
        {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "lora_bias": True},
    ],
)
def test_the_saved_adapter_names_the_new_layers(settings, tmp_path):
    plan = PruningPlan(num_layers=4, model_type="llama", removed_layers=(1,), removed_mlp=(0,))
    model = apply_plan(adapted("llama", **settings), plan)
    model.save_pretrained(tmp_path)
    base = apply_plan(tiny_model("llama").double(), plan)
    loaded = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False).double().eval()
    names = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert names == {name for name, _ in loaded.named_parameters() if "lora_" in name} != set()
    assert torch.equal(logits(loaded), logits(model))


def test_several_adapters_and_without_a_peft_model():
    plan = make_plan("llama", "mixed")
    model = adapted("llama", target_modules=["v_proj", "up_proj"])
    model.add_adapter("second", LoraConfig(target_modules=["o_proj", "up_proj"], r=4))
    randomised(model)
    model.base_model.set_adapter(["default", "second"])
    expected = logits(zero_out(copy.deepcopy(model).merge_and_unload(adapter_names=["default", "second"]), plan))
    inner = copy.deepcopy(model).get_base_model()  # as transformers' `model.add_adapter` leaves it
    for pruned in (apply_plan(model, plan), apply_plan(inner, plan)):
        assert (logits(pruned) - expected).abs().max() < 1e-9 * expected.abs().max()
    assert apply_plan(inner, PruningPlan(num_layers=3, model_type="llama")) is inner
    with model.disable_adapter():
        plain = logits(apply_plan(tiny_model("llama").double(), plan))
        assert torch.equal(logits(model), plain)


def test_cka_lora_forgets_which_layers_it_chose(tmp_path):
    from hf_cka.lora import CKALoraConfig

    config = CKALoraConfig(r=2, calibration=[tiny_batch(batch=8)], keep_ratio=0.5, pooling="mean")
    model = get_peft_model(tiny_model("llama"), config)
    chosen = config.selection.layers
    randomised(model)
    apply_plan(model, PruningPlan(num_layers=4, model_type="llama", removed_layers=(chosen[0],)))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "cka_selection.json").exists()
    assert model.peft_config["default"].layers_to_transform == [chosen[1] - (chosen[0] < chosen[1])]


@pytest.mark.parametrize(
    ("settings", "operation", "message"),
    [
        ({"use_dora": True}, "units", r"mlp\.\w+_proj carries DoraLinearVariant.*merge_and_unload"),
        ({"target_modules": ["layers.1.mlp.down_proj"]}, "layers", "removes all 1 modules that adapter 'default'"),
        ({"target_modules": ["layers.1.mlp.down_proj"]}, "mlp", "removes all 1 modules that adapter 'default'"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["up_proj"]}, "units", "up_proj is in modules_to_save"),
    ],
)
def test_adapters_that_cannot_follow_are_refused_before_anything_changes(settings, operation, message):
    model = adapted("llama", **settings)
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        apply_plan(model, make_plan("llama", operation))
    assert torch.equal(logits(model), before)


def test_other_tuners_are_refused():
    from peft import IA3Config

    model = get_peft_model(tiny_model("llama"), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="is of type IA3; only LoRA"):
        apply_plan(model, make_plan("llama", "layers"))


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2"])
def test_the_parameter_map_names_the_adapters_too(model_type):
    model = adapted(model_type)
    plan = make_plan(model_type, "mixed")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    places = parameter_map(model, plan)
    after = dict(apply_plan(model, plan).named_parameters())
    assert {new for new, _ in places.values()} == set(after)
    assert any("lora_" in old and place is not None for old, (_, place) in places.items())
    for old, (new, place) in places.items():
        assert torch.equal(after[new], before[old] if place is None else before[old].flatten()[place]), old


@pytest.mark.parametrize(
    "config",
    [
        PruningConfig(method="depth", criterion="cka", ratio=0.2),
        PruningConfig(method="depth", criterion="magnitude", ratio=0.2, structures="sublayers"),
        PruningConfig(method="depth", criterion="taylor", ratio=0.2, steps=1),
        PruningConfig(method="width", criterion="wanda", ratio=0.2, repair="least_squares"),
        PruningConfig(method="width", criterion="magnitude", ratio=0.2),
        PruningConfig(method="width", criterion="taylor", ratio=0.2),
        PruningConfig(method="mop", path="cka", ratio=0.2),
    ],
    ids=lambda config: f"{config.method}-{config.criterion}-{config.repair}",
)
def test_prune_decides_by_what_the_model_computes(config):
    """The decision, and the pruned function, are those of the model with its adapters merged; counts leave them out."""
    batches = [tiny_batch(batch=6, length=16)]
    model = adapted("llama")
    merged = copy.deepcopy(model).merge_and_unload()
    result = prune(model, batches, config, progress=False)
    expected = prune(merged, batches, config, progress=False)
    assert isinstance(result.model, PeftModel)
    assert result.plan == expected.plan
    assert [step.parameters for step in result.history.steps] == [step.parameters for step in expected.history.steps]
    assert result.model.config.pruning["parameters_after"] == expected.model.config.pruning["parameters_after"]
    scale = logits(expected.model).abs().max()
    assert (logits(result.model) - logits(expected.model)).abs().max() < 1e-6 * scale
    assert logits(model).shape == logits(merged).shape, "the model given stays as it was"
    inplace = prune(model, batches, config, inplace=True, progress=False)
    assert inplace.model is model
    assert (logits(model) - logits(expected.model)).abs().max() < 1e-6 * scale
