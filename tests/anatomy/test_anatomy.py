"""Every path of the table exists in a real model of the family, and sizes match the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, EncoderDecoderModel, ResNetConfig, T5Config

from hf_cka.anatomy import FAMILIES, LayerSizes, find_anatomy
from hf_cka.anatomy.model import _get
from tests.tiny import SETTINGS, tiny_batch, tiny_config, tiny_model

# norms that exist only with a setting of the config
OPTIONAL = {"phi": ("self_attn.q_layernorm", "self_attn.k_layernorm")}


def test_every_family_has_a_tiny_model():
    assert set(SETTINGS) == set(FAMILIES)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_path_exists_and_sizes_match_the_weights(model_type):
    model = tiny_model(model_type)
    anatomy = find_anatomy(model)
    family = anatomy.family
    assert anatomy.model is model
    assert anatomy.num_layers == 4
    assert anatomy.kind == ("encoder" if "masked" in type(model).__name__.lower() else "decoder")
    assert model.get_submodule(anatomy.layers_path) is anatomy.layers
    assert model.get_submodule(anatomy.layer_name(2)) is anatomy.layer(2)
    assert anatomy.embedding is model.get_input_embeddings()
    assert (anatomy.final_norm is None) == (family.final_norm is None)

    layer = anatomy.layer(1)
    norms = family.attention_norms + family.mlp_norms + family.stream_norms + family.query_key_norms
    for path in (*anatomy.linear_names, *norms, *family.position_projections, family.attention_core):
        assert path in OPTIONAL.get(model_type, ()) or _get(layer, path) is not None, path
    named = {name for name, _ in layer.named_modules() if "norm" in name.lower() or name.startswith("ln_")}
    assert named <= set(norms), "a norm of the layer is in no list of the table"
    for attribute in family.attention_sizes:
        assert hasattr(_get(layer, family.attention_core), attribute)

    sizes = anatomy.sizes(1)
    width = 0 if family.transposed else 1  # the axis of a weight that counts inputs
    assert _get(layer, family.projections["o"]).weight.shape[width] == sizes.num_heads * sizes.head_dim
    assert _get(layer, family.projections["down"]).weight.shape[width] == sizes.intermediate_size
    rows = sizes.num_kv_heads * sizes.head_dim
    if "qkv" in family.projections:
        rows = 2 * rows + sizes.num_heads * sizes.head_dim
    assert _get(layer, family.projections.get("k", family.projections.get("qkv"))).weight.shape[1 - width] == rows


def test_the_seven_projections_of_llama():
    assert find_anatomy(tiny_model("llama")).linear_names == (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "bert", "modernbert"])
@pytest.mark.parametrize("head", ["base", "classification"])
def test_any_head_and_the_bare_backbone(model_type, head):
    model = tiny_model(model_type, head=head)
    anatomy = find_anatomy(model)
    assert anatomy.num_layers == 4
    assert (anatomy.backbone_path == "") == (head == "base")
    output = anatomy.backbone(**tiny_batch())
    assert output.last_hidden_state.shape == (2, 12, 32)


def test_inside_peft_and_compile():
    from peft import LoraConfig, get_peft_model

    base = tiny_model("llama")
    wrapped = get_peft_model(base, LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
    anatomy = find_anatomy(torch.compile(wrapped))
    assert anatomy.model is base
    assert anatomy.layers_path == "model.layers"
    assert type(_get(anatomy.layer(0), anatomy.projections(0)["q"])).__module__.startswith("peft.")


def test_projections_need_not_be_linear():
    class Packed(nn.Module):
        """As a quantized projection: no weight of the true shape."""

    model = tiny_model("llama")
    model.model.layers[0].self_attn.q_proj = Packed()
    assert find_anatomy(model).sizes(0) == LayerSizes(4, 2, 8, 48)


def test_text_model_of_a_multimodal_model():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(text_config=tiny_config("gemma3_text"), vision_config=vision, mm_tokens_per_image=4)
    anatomy = find_anatomy(Gemma3ForConditionalGeneration(config))
    assert anatomy.layers_path == "model.language_model.layers"
    assert anatomy.family.name == "gemma3_text"
    assert anatomy.sizes(0) == LayerSizes(4, 2, 8, 48)


@pytest.mark.parametrize(
    ("model_type", "norms"),
    [("olmo", ("input_layernorm",)), ("arcee", None), ("seed_oss", ("input_layernorm",)), ("exaone4", None)],
)
def test_fallback_to_structure(model_type, norms):
    try:
        config = tiny_config(model_type)
    except KeyError:
        pytest.skip(f"this transformers has no {model_type}")
    model = AutoModelForCausalLM.from_config(config)
    if norms is None:
        if model_type == "arcee":  # no gate: not Llama-shaped
            with pytest.raises(ValueError, match=r"mlp\.gate_proj"):
                find_anatomy(model)
            return
        norms = ("post_attention_layernorm",)
    anatomy = find_anatomy(model)
    assert anatomy.family.name == model_type
    assert anatomy.layers_path == "model.layers"
    assert anatomy.family.attention_norms == norms
    assert anatomy.sizes(0).intermediate_size == 48


def test_opt_with_norms_after_the_sum():
    family = find_anatomy(tiny_model("opt", do_layer_norm_before=False)).family
    assert family.attention_norms == ()
    assert family.stream_norms == ("self_attn_layer_norm", "final_layer_norm")


@pytest.mark.parametrize(
    "config",
    [
        ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]),
        T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2),
    ],
    ids=["resnet", "t5"],
)
def test_an_unsupported_model_says_what_was_looked_for(config):
    with pytest.raises(ValueError, match=r"Looked for the families bert, .*self_attn\.q_proj") as error:
        find_anatomy(AutoModel.from_config(config))
    assert config.model_type in str(error.value)


def test_two_towers_are_refused_by_name():
    small = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=16)
    decoder = BertConfig(**{**small.to_diff_dict(), "is_decoder": True, "add_cross_attention": True})
    from transformers import EncoderDecoderConfig

    model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(small, decoder))
    with pytest.raises(ValueError, match=r"2 towers: 'encoder' \(bert\), 'decoder\.bert' \(bert\)"):
        find_anatomy(model)
