"""A pruned model is the dense model with the same parts zeroed; nothing of the dense one stays behind."""

from __future__ import annotations

import copy
import gc
import types
import weakref

import pytest
import torch

from hf_cka.anatomy import find_anatomy
from hf_cka.modeling.plan import PruningPlan
from hf_cka.modeling.surgery import apply_plan, parameter_map
from tests.tiny import DECODERS, ENCODERS, SETTINGS, output_paths, tiny_batch, tiny_model
from tests.world import world_model

OPERATIONS = {
    "layers": {"removed_layers": (1, 2)},
    "attention": {"removed_attention": (0, 2)},
    "mlp": {"removed_mlp": (1, 3)},
    "units": {"kept_units": {0: range(0, 48, 3), 2: range(7)}},
    "groups": {"kept_groups": {1: (1,), 3: (0,)}},
    "mixed": {
        "removed_layers": (1,),
        "removed_attention": (2,),
        "removed_mlp": (3,),
        "kept_units": {2: range(1, 48, 2)},
        "kept_groups": {0: (1,), 3: (1,)},
    },
    "uniform units": {"kept_units": {i: range(i, 48, 4) for i in range(4)}},
    "uniform groups": {"kept_groups": {i: (i % 2,) for i in range(4)}},
}
# families whose layers all have one width of head, hidden_size / heads
FIXED_HEADS = ("gpt2", "gpt_neox", "opt", "bert", "roberta", "distilbert", "deberta-v2", "modernbert")


def make_plan(model_type, operation, num_layers=4):
    return PruningPlan(num_layers=num_layers, model_type=model_type, **OPERATIONS[operation])


def zero_out(model, plan):
    """The oracle: the dense model, with the weights that the plan names set to zero and its layers bypassed.

    It takes nothing that anatomy claims about widths and branches, but the names and sizes of `tests/tiny.py`.
    """
    name = plan.model_type
    out, down = output_paths(name).values()
    groups = 4 if name in (*ENCODERS, "gpt2", "gpt_neox", "opt") else 2
    per_group = 4 // groups * (12 if name == "qwen3" else 8)
    inputs = 0 if name == "gpt2" else 1
    for index, layer in enumerate(find_anatomy(model).layers):
        output, down_projection = layer.get_submodule(out), layer.get_submodule(down)
        with torch.no_grad():
            if index in plan.removed_attention:
                [p.zero_() for p in output.parameters()]
            if index in plan.removed_mlp:
                [p.zero_() for p in down_projection.parameters()]
            if index in plan.kept_units:
                gone = [u for u in range(48) if u not in plan.kept_units[index]]
                down_projection.weight.index_fill_(inputs, torch.tensor(gone), 0)
            if index in plan.kept_groups:
                kept = {g * per_group + k for g in plan.kept_groups[index] for k in range(per_group)}
                gone = [k for k in range(groups * per_group) if k not in kept]
                output.weight.index_fill_(inputs, torch.tensor(gone), 0)
                if name == "olmo2":
                    norm_over_the_kept(layer, plan.kept_groups[index])
        if index in plan.removed_layers:
            # DeBERTa's layers return a tuple
            several = name == "deberta-v2"
            layer.forward = lambda hidden_states, *a, _t=several, **k: (hidden_states, None) if _t else hidden_states
    return model


def norm_over_the_kept(layer, groups):
    """OLMo2 normalises queries and keys over all heads: the statistics change by definition with the heads."""
    for norm, width in ((layer.self_attn.q_norm, 16), (layer.self_attn.k_norm, 8)):
        index = torch.tensor([g * width + k for g in groups for k in range(width)])

        def forward(self, x, index=index):
            kept = x[..., index].float()
            scale = torch.rsqrt(kept.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
            return (self.weight * (x.float() * scale)).to(x.dtype)

        norm.forward = types.MethodType(forward, norm)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("model_type", sorted(SETTINGS))
def test_equals_the_dense_model_with_the_same_parts_zeroed(model_type, operation):
    plan = make_plan(model_type, operation)
    batch = tiny_batch()
    with torch.no_grad():
        expected = zero_out(tiny_model(model_type).double(), plan)(**batch).logits
        model = apply_plan(tiny_model(model_type).double(), plan)
        found = model(**batch).logits
        untouched = tiny_model(model_type).double()(**batch).logits
    real = batch["attention_mask"].bool()
    scale = untouched[real].abs().max()
    assert (found - expected)[real].abs().max() / scale < 1e-9
    assert (found - untouched)[real].abs().max() / scale > 1e-3, "the operation must matter, or this proves nothing"
    alike = operation in ("layers", "uniform units") or (
        operation == "uniform groups" and model_type not in FIXED_HEADS
    )
    assert type(model).__name__.startswith("Pruned") != alike


@pytest.mark.parametrize("model_type", sorted(SETTINGS))
def test_one_plan_equals_two_in_turn(model_type):
    first = make_plan(model_type, "mixed")
    second = PruningPlan(
        num_layers=3, model_type=model_type, removed_layers=(2,), removed_mlp=(0,), kept_units={1: range(3)}
    )
    twice = apply_plan(apply_plan(tiny_model(model_type), first), second)
    once = apply_plan(tiny_model(model_type), first.then(second))
    for (name, one), (other, two) in zip(once.named_parameters(), twice.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(one, two)
    plan = PruningPlan.from_dict(twice.config.pruning["plan"])
    assert plan == first.then(second)
    assert plan == PruningPlan.from_dict(once.config.pruning["plan"])
    assert once.config.to_dict() == twice.config.to_dict()
    with torch.no_grad():
        assert torch.equal(once(**tiny_batch()).logits, twice(**tiny_batch()).logits)


def test_a_model_that_is_uniform_again_is_stock_again():
    model = apply_plan(tiny_model("llama"), PruningPlan(num_layers=4, model_type="llama", removed_attention=(1,)))
    assert type(model).__name__ == "PrunedLlamaForCausalLM"
    apply_plan(model, PruningPlan(num_layers=4, model_type="llama", removed_layers=(1,)))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert type(model.model).__name__ == "LlamaModel"
    assert type(model.config).__name__ == "LlamaConfig"
    assert "hf_cka" not in str({k: v for k, v in model.config.to_dict().items() if k != "pruning"})


@pytest.mark.parametrize("head", [None, "base"])
@pytest.mark.parametrize("model_type", sorted(SETTINGS))
def test_hidden_states_are_still_recorded(model_type, head):
    model = apply_plan(tiny_model(model_type, head=head), make_plan(model_type, "mixed"))
    with torch.no_grad():
        output = model(**tiny_batch(), output_hidden_states=True)
    assert len(output.hidden_states) == 4
    if head == "base":
        assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "bert"])
def test_the_dense_weights_are_gone(model_type):
    model = tiny_model(model_type)
    before = [weakref.ref(p) for layer in find_anatomy(model).layers for p in layer.parameters()]
    live = {id(p) for p in model.parameters()}
    apply_plan(model, make_plan(model_type, "mixed"))
    gc.collect()
    alive = [ref() for ref in before if ref() is not None]
    assert {id(p) for p in alive} <= {id(p) for p in model.parameters()}
    assert len(alive) < len(before)
    assert all(p.untyped_storage().nbytes() == p.numel() * p.element_size() for p in model.parameters())
    assert {id(p) for p in model.parameters()} - live, "narrower parameters are new objects"


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "gpt_neox", "opt", "bert"])
def test_indices_of_layers_are_renumbered(model_type):
    model = apply_plan(tiny_model(model_type), make_plan(model_type, "layers"))
    for index, layer in enumerate(find_anatomy(model).layers):
        own = {m.layer_idx for m in layer.modules() if getattr(m, "layer_idx", None) is not None}
        assert own <= {index}


def test_per_layer_lists_and_counts_follow_their_layers():
    plan = {"num_layers": 4, "removed_layers": (0, 3)}
    qwen = apply_plan(tiny_model("qwen2"), PruningPlan(model_type="qwen2", **plan)).config
    assert qwen.layer_types == ["full_attention", "sliding_attention"]
    assert qwen.max_window_layers == 1
    smol = apply_plan(
        tiny_model("smollm3", no_rope_layers=[0, 1, 0, 1]), PruningPlan(model_type="smollm3", **plan)
    ).config
    assert smol.no_rope_layers == [1, 0]


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("modernbert", {}),  # its first layer has no norm before the attention
        ("deberta-v2", {"conv_kernel_size": 3, "conv_act": "gelu"}),  # a convolution follows the first layer
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ],
)
def test_what_cannot_be_renumbered_keeps_its_places(model_type, changes):
    plan = PruningPlan(num_layers=4, model_type=model_type, removed_layers=(0,))
    batch = tiny_batch()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = zero_out(tiny_model(model_type, **changes).double(), plan)(**batch).logits[real]
        model = apply_plan(tiny_model(model_type, **changes).double(), plan)
        found = model(**batch).logits[real]
    assert type(model).__name__.startswith("Pruned")
    assert model.config.num_hidden_layers == 4
    assert (found - expected).abs().max() < 1e-9 * expected.abs().max()


@pytest.mark.parametrize(
    ("settings", "removed"), [({"first_k_dense_replace": 1}, 0), ({"first_k_dense_replace": 2}, 1)]
)
def test_experts_stay_where_leading_layers_have_none(settings, removed):
    """`first_k_dense_replace` counts layers from the front; whichever rung it takes, the function is the same."""
    model = world_model("glm4_moe", **settings).double()
    model.set_experts_implementation("eager")
    other = copy.deepcopy(model)
    other.model.layers[removed].forward = lambda hidden_states, *a, **k: hidden_states
    with torch.no_grad():
        expected = other(**tiny_batch()).logits
        found = apply_plan(model, PruningPlan(4, "glm4_moe", removed_layers=(removed,)))(**tiny_batch()).logits
    assert (found - expected).abs().max() < 1e-9 * expected.abs().max()


def test_caches_that_cannot_leave_layers_out_are_noticed(monkeypatch):
    from hf_cka.modeling import modeling_hf_cka as code

    monkeypatch.setattr(code.transformers, "__version__", "5.22.1")
    model = tiny_model("llama")
    with pytest.raises(ImportError, match=r"need transformers >= 5\.23 \(installed: 5\.22\.1\)"):
        apply_plan(model, make_plan("llama", "attention"))
    assert not hasattr(model.config, "pruning")
    apply_plan(model, make_plan("llama", "mlp"))
    apply_plan(tiny_model("bert"), make_plan("bert", "attention"))


def test_random_numbers_go_on_as_if_nothing_had_been():
    """A run that finds out about its model while it trains equals one that knew."""
    model = tiny_model("llama", intermediate_size=40)  # of a configuration that nothing is known about
    plan = PruningPlan(4, "llama", removed_layers=(1,), kept_units={i: range(20) for i in (0, 2, 3)})
    state = torch.random.get_rng_state()
    find_anatomy(model)
    plan.price(model)
    plan.explain(model)
    apply_plan(model, plan)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_tied_weights_stay_tied_and_gradients_keep_their_switch():
    model = tiny_model("llama", tie_word_embeddings=True)
    model.model.layers[0].mlp.requires_grad_(False)
    apply_plan(model, PruningPlan(num_layers=4, model_type="llama", kept_units={0: range(5), 1: range(5)}))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert model.model.layers[1].mlp.up_proj.weight.requires_grad
    assert model.model.layers[0].mlp.down_proj.in_features == 5


def test_packed_weights_can_lose_layers_but_not_units():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"Layer 0's mlp\.up_proj \(Linear\) has a packed weight"):
        apply_plan(model, PruningPlan(num_layers=4, model_type="llama", kept_units={0: range(5)}))
    apply_plan(model, PruningPlan(num_layers=4, model_type="llama", removed_layers=(1,), removed_mlp=(0,)))


@pytest.mark.parametrize("head", ["base", "classification"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert", "deberta-v2"])
def test_other_heads(model_type, head):
    plan = make_plan(model_type, "mixed")
    with torch.no_grad():
        expected = zero_out(tiny_model(model_type, head=head).double(), plan)(**tiny_batch())[0]
        model = apply_plan(tiny_model(model_type, head=head).double(), plan)
        found = model(**tiny_batch())[0]
    assert type(model).__name__.startswith("Pruned")
    keep = tiny_batch()["attention_mask"].bool() if head == "base" else slice(None)
    assert (found - expected)[keep].abs().max() < 1e-9 * expected[keep].abs().max()


@pytest.mark.parametrize("model_type", DECODERS)
def test_cached_generation_in_memory_without_attention_in_the_first_layer(model_type):
    model = apply_plan(
        tiny_model(model_type), PruningPlan(num_layers=4, model_type=model_type, removed_attention=(0, 2))
    )
    batch = tiny_batch(pad="left")
    common = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
    plain = model.generate(**batch, **common, use_cache=False)
    assert torch.equal(plain, model.generate(**batch, **common))
    assert torch.equal(plain, model.generate(**batch, **common, cache_implementation="static", disable_compile=True))


def test_text_model_inside_a_multimodal_one():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

    from tests.tiny import tiny_config

    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(text_config=tiny_config("gemma3_text"), vision_config=vision, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config).eval()
    parts = PruningPlan(4, "gemma3_text", removed_mlp=(1,), kept_units={0: range(9)}, kept_groups={2: (1,)})
    with torch.no_grad():
        expected = zero_out(copy.deepcopy(model).double(), parts)(**tiny_batch()).logits
        found = apply_plan(copy.deepcopy(model).double(), parts)(**tiny_batch()).logits
    assert (found - expected).abs().max() < 1e-9 * expected.abs().max()
    apply_plan(model, PruningPlan(num_layers=4, model_type="gemma3_text", removed_layers=(1,)))
    assert model.config.text_config.num_hidden_layers == 3
    assert model.config.text_config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]
    batch = tiny_batch(pad="left")
    common = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    assert torch.equal(model.generate(**batch, **common), model.generate(**batch, **common, use_cache=False))


@pytest.mark.parametrize("model_type", SETTINGS)
def test_the_parameter_map_says_where_every_weight_comes_from(model_type):
    model = tiny_model(model_type)
    anatomy = find_anatomy(model)
    groups = anatomy.sizes(1).num_kv_heads
    plan = PruningPlan(
        anatomy.num_layers,
        model_type,
        removed_layers=(2,),
        removed_mlp=(3,),
        kept_groups={1: range(1, groups)},
        kept_units={0: range(0, 48, 3), 1: range(7)},
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    places = parameter_map(model, plan)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    apply_plan(model, plan)
    after = dict(model.named_parameters())
    assert {new for new, _ in places.values()} == set(after)
    for old, (new, place) in places.items():
        expected = before[old] if place is None else before[old].flatten()[place]
        assert torch.equal(after[new], expected), old
