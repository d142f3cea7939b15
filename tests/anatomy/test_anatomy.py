"""What is found out about a model holds: removed equals bypassed, narrowed equals zeroed, at every size."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    LlamaConfig,
    LlamaForCausalLM,
    WhisperConfig,
    WhisperModel,
)

from hf_cka.anatomy import LayerSizes, Slice, find_anatomy
from hf_cka.anatomy.experts import in_double, never_picked
from hf_cka.anatomy.model import findings_of
from hf_cka.anatomy.stacks import bypassed
from hf_cka.anatomy.twin import distance, make_twin, outputs, shrunk
from hf_cka.anatomy.widths import left_out
from hf_cka.modeling import modeling_hf_cka as code
from hf_cka.modeling.plan import PruningPlan
from hf_cka.modeling.surgery import apply_plan
from tests.tiny import ENCODERS, SETTINGS, tiny_batch, tiny_config, tiny_model
from tests.world import CAUSAL, TYPES, world_model

PICTURES_OR_SOUND = [key for key in TYPES if key[1] not in (CAUSAL,)]


@pytest.mark.parametrize("model_type", sorted(SETTINGS))
def test_the_text_families(model_type):
    model = tiny_model(model_type)
    before = copy.deepcopy(model.state_dict())
    anatomy = find_anatomy(model)
    assert anatomy.num_layers == 4
    assert anatomy.kind == ("encoder" if model_type in ENCODERS else "decoder")
    groups = 4 if model_type in (*ENCODERS, "gpt2", "gpt_neox", "opt") else 2
    head_dim = 12 if model_type == "qwen3" else 8
    assert anatomy.sizes(1) == LayerSizes(4, groups, head_dim, 48)
    assert [b.name for b in anatomy.stack.layers[1].branches] == ["attention", "mlp"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


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


@pytest.mark.parametrize(("model_type", "auto"), sorted(TYPES), ids=lambda value: value.removeprefix("AutoModelFor"))
def test_what_is_claimed_is_so(model_type, auto):
    """On a model with other weights than the twin's: layers, branches and members that go leave what zeroing leaves."""
    model = world_model(model_type, auto)
    twin = make_twin(model)  # for inputs that the model takes
    anatomy = find_anatomy(model)
    if "experts" in str(dict(model.named_modules()).keys()):
        model.set_experts_implementation("eager")  # the grouped kernels know no float64
    model = model.double() if twin.dense[0].dtype == torch.float64 else model
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for p in model.parameters():
            p.data += 0.05 * torch.randn_like(p)
    tried = 0
    layers = [i for i, layer in enumerate(anatomy.stack.layers) if not layer.reason]
    if layers and anatomy.num_layers > 1:
        chosen = layers[min(1, len(layers) - 1)]
        name = anatomy.layer_name(chosen)
        plan = PruningPlan(anatomy.num_layers, anatomy.model_type, removed_layers=(chosen,))
        with bypassed(model, [name]):
            expected = outputs(model, twin.batch)
        assert distance(expected, outputs(apply_plan(copy.deepcopy(model), plan), twin.batch)) < 1e3 * twin.tolerance
        tried += 1
    for index, layer in enumerate(anatomy.stack.layers[:2]):
        for width in layer.widths:
            if width.reason or not width.exact:
                continue
            kept = {width.name: {index: range(1, width.members)}}
            plan = PruningPlan(anatomy.num_layers, anatomy.model_type, kept=kept)
            pruned, module = apply_plan(copy.deepcopy(model), plan), anatomy.layer(index)
            if width.kind == "experts":
                gone = never_picked(module, width, [0])
            else:
                gone = left_out(dict(module.named_parameters()), width, [0])
            with in_double():
                made = outputs(pruned, twin.batch)
                with gone:
                    expected = outputs(model, twin.batch)
            assert distance(expected, made) < 1e3 * twin.tolerance, width.name
            assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())
            tried += 1
    assert tried


@pytest.mark.parametrize("divisor", [8, 16])
@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "bert", "gemma2"])
def test_the_twin_of_a_larger_model_says_the_same(model_type, divisor):
    """Found at one size and scaled to another, members lie where the larger model has them."""
    width = 32 * divisor
    changes = {"hidden_size": width, "num_hidden_layers": 3}
    changes |= {"n_inner": 3 * width} if model_type == "gpt2" else {"intermediate_size": 3 * width}
    if model_type in ("qwen2", "gemma2"):
        changes["layer_types"] = ["full_attention"] * 3
    if model_type == "gemma2":
        changes["head_dim"] = width // 4
    config = tiny_config(model_type, **changes)
    cls = type(tiny_model(model_type))
    with torch.device("meta"):
        large = cls(config)
    small = cls(shrunk(config, divisor))
    scaled_up = findings_of(cls, config, large).stacks[0].layers[1].widths
    for width_there, width_here in zip(
        scaled_up, findings_of(cls, small.config, small).stacks[0].layers[1].widths, strict=True
    ):
        assert width_there.name == width_here.name
        for s in width_there.slices:
            shape = dict(large.named_parameters())[f"{find_anatomy(large).layer_name(1)}.{s.parameter}"].shape
            assert sorted(s.indices(range(width_there.members))) == list(range(shape[s.axis]))


@pytest.mark.parametrize(
    ("cls", "config", "sizes"),
    [
        (BertModel, BertConfig(num_hidden_layers=2), LayerSizes(12, 12, 64, 3072)),
        (BertModel, BertConfig(hidden_size=384, intermediate_size=1536), LayerSizes(12, 12, 32, 1536)),
        (
            WhisperModel,
            WhisperConfig(
                d_model=384, encoder_layers=2, decoder_layers=2, encoder_attention_heads=6, decoder_attention_heads=6
            ),
            LayerSizes(6, 6, 64, 1536),
        ),
    ],
)
def test_models_of_ordinary_size(cls, config, sizes):
    """Divided by a power of two their heads would be one wide, and Whisper always hears 30 seconds."""
    with torch.device("meta"):
        model = cls(config)
    twin = make_twin(model)
    assert sum(value.numel() for value in twin.batch.values()) < 50_000
    for stack in find_anatomy(model).stacks:
        assert {find_anatomy(model, stack.path).sizes(i) for i in range(len(stack.layers))} == {sizes}


def test_any_head_and_the_bare_backbone():
    for head in ("base", "classification"):
        model = tiny_model("llama", head=head)
        anatomy = find_anatomy(model)
        assert anatomy.num_layers == 4
        assert (anatomy.backbone_path == "") == (head == "base")
        assert anatomy.backbone(**tiny_batch()).last_hidden_state.shape == (2, 12, 32)


def test_inside_peft_and_compile():
    from peft import LoraConfig, get_peft_model

    base = tiny_model("llama")
    wrapped = get_peft_model(base, LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
    anatomy = find_anatomy(torch.compile(wrapped))
    assert anatomy.model is base
    assert anatomy.layers_path == "model.layers"
    assert "self_attn.q_proj" in anatomy.linear_names


def test_projections_need_not_be_linear():
    class Packed(nn.Module):
        """As a quantized projection: no weight of the true shape."""

    model = tiny_model("llama")
    model.model.layers[0].self_attn.q_proj = Packed()
    assert find_anatomy(model).sizes(0) == LayerSizes(4, 2, 8, 48)


def test_the_towers_of_a_model_that_sees():
    anatomy = find_anatomy(world_model("llava", "AutoModelForImageTextToText"))
    assert anatomy.layers_path == "model.language_model.layers"
    assert [s.path for s in anatomy.stacks] == ["model.language_model.layers", "model.vision_tower.encoder.layers"]
    assert "pixel_values" in anatomy.findings.inputs
    assert anatomy.on("vision").kind == "encoder"
    # the features are taken before the last layer of the tower, which therefore never matters
    assert "does not matter" in anatomy.on("vision").stack.layers[-1].reason or anatomy.on("vision").num_layers


def test_two_towers_and_their_names():
    small = BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=16)
    decoder = BertConfig(**{**small.to_diff_dict(), "is_decoder": True, "add_cross_attention": True})
    model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(small, decoder))
    anatomy = find_anatomy(model)
    assert {s.path for s in anatomy.stacks} == {"encoder.encoder.layer", "decoder.bert.encoder.layer"}
    with pytest.raises(ValueError, match=r"stack='layer' could be '.*'; give more of the name"):
        find_anatomy(model, "layer")
    with pytest.raises(ValueError, match=r"Did you mean"):
        find_anatomy(model, "encoder.encoder.layers")


def test_a_layer_that_others_need_says_so():
    layers = find_anatomy(world_model("t5", "AutoModelForSeq2SeqLM")).stack.layers
    assert "others use what it computes" in layers[0].reason  # its position bias
    assert not any(layer.reason for layer in layers[1:])
    assert "runs 4 times" in find_anatomy(world_model("albert", "AutoModelForMaskedLM")).stack.layers[0].reason


def test_a_norm_that_spans_the_heads_is_told():
    heads = find_anatomy(tiny_model("olmo2")).width(0, "heads")
    assert heads is not None
    assert not heads.exact
    assert find_anatomy(tiny_model("qwen3")).width(0, "heads").exact


def test_a_model_without_layers_says_what_was_looked_for():
    from transformers import ResNetConfig

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    with pytest.raises(ValueError, match=r"No stack of layers was found in ResNetModel \(model_type 'resnet'\)"):
        find_anatomy(AutoModel.from_config(config))


def test_the_table_says_what_can_go():
    text = find_anatomy(world_model("t5", "AutoModelForSeq2SeqLM")).table()
    assert "decoder.block: 4 layers, decoder" in text
    assert "(default)" in text
    assert "cross_attention (T5Attention): removable" in text
    assert "layer 0: stays (others use what it computes" in text


def test_what_is_known_is_found_out_once(monkeypatch):
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=4, vocab_size=48
    )
    first = find_anatomy(LlamaForCausalLM(config))
    monkeypatch.setattr("hf_cka.anatomy.model.discover", lambda model: pytest.fail("it was found out again"))
    assert find_anatomy(LlamaForCausalLM(config)).findings is first.findings


def test_slices_after_members_went():
    slices = Slice("qkv.weight", 0, ((0, 4), (32, 2), (48, 2)))  # 8 groups: queries, keys, values
    assert slices.after(8, 3).segments == ((0, 4), (12, 2), (18, 2))
    index = code.left_of(64, slices.segments, 8, [0, 5, 7])
    assert index.tolist() == [*range(4), *range(20, 24), *range(28, 32), 32, 33, 42, 43, 46, 47, 48, 49, 58, 59, 62, 63]
