"""Plans as data: what they refuse, how they compose, and what they tell before anything is done."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from hf_cka.anatomy import LayerSizes, find_anatomy
from hf_cka.modeling.plan import PruningPlan, as_ranges, from_ranges, groups_of_heads
from hf_cka.modeling.price import CostTable
from hf_cka.modeling.surgery import apply_plan
from tests.tiny import SETTINGS, tiny_config, tiny_model
from tests.world import world_model


def plan(**changes):
    return PruningPlan(**{"num_layers": 4, "model_type": "llama", **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"removed_layers": (4,)}, r"removed_layers names layers \[4\], but the model has 4 \(0 to 3\)"),
        ({"removed_mlp": (-1,)}, r"removed_mlp names layers \[-1\]"),
        ({"removed_layers": (1, 1)}, r"names an index twice: \[1\]"),
        ({"removed_layers": (0, 1, 2, 3)}, "removes all 4 layers"),
        ({"removed_layers": (1,), "kept_units": {1: (0,)}}, r"Layers \[1\] are in removed_layers and in kept_units"),
        ({"removed_attention": (2,), "kept_groups": {2: (0,)}}, r"Layers \[2\] are in removed_attention and in kept"),
        ({"kept_groups": {0: ()}}, r"keeps nothing in layers \[0\]; put those layers into removed_attention"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**changes)


def test_a_plan_of_another_version_is_refused():
    with pytest.raises(ValueError, match="has version 3; this hf_cka reads versions 1 and 2"):
        PruningPlan.from_dict({**plan().to_dict(), "version": 3})


def test_a_layer_that_changes_the_shape_still_mixes():
    """Of a stage of ResNet only its last block can go, and it may."""
    model = world_model("resnet", "AutoModelForImageClassification")
    anatomy = find_anatomy(model)
    can_go = [i for i, layer in enumerate(anatomy.stack.layers) if not layer.reason]
    made = plan(num_layers=anatomy.num_layers, model_type="resnet", removed_layers=can_go)
    assert can_go
    before = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in apply_plan(model, made).parameters()) < before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "for a 'qwen2' with 4 layers, but the model is a 'llama' with 4"),
        ({"num_layers": 5}, "for a 'llama' with 5 layers"),
        ({"kept_groups": {0: (0, 2)}}, r"kept_groups\[0\] names \[2\], but layer 0 has 2 KV groups"),
        ({"kept_units": {3: (48,)}}, r"kept_units\[3\] names \[48\], but layer 3 has 48 MLP units"),
        ({"removed_attention": range(4)}, "no attention in any layer"),
        ({"removed_attention": (1, 2), "removed_layers": (0, 3)}, "no attention in any layer"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_and_the_model_is_untouched(changes, message):
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        apply_plan(model, plan(**changes))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[name].equal(before[name]) for name in before)
    assert not hasattr(model.config, "pruning")


def test_what_was_removed_cannot_be_pruned_again():
    model = apply_plan(tiny_model("llama"), plan(removed_attention=(1,), removed_mlp=(2,)))
    with pytest.raises(ValueError, match=r"Layers \[1\] have no attention to prune"):
        plan(kept_groups={1: (0,)}).validate(model)
    with pytest.raises(ValueError, match=r"Layers \[2\] have no mlp to prune"):
        plan(removed_mlp=(2,)).validate(model)


def test_heads_that_split_a_group_are_refused():
    sizes = LayerSizes(num_heads=8, num_kv_heads=4, head_dim=8, intermediate_size=16)
    assert groups_of_heads((2, 3, 6, 7), sizes) == (1, 3)
    with pytest.raises(ValueError, match=r"Heads \[0, 1, 2\] split the KV groups \[1\]: 2 query heads"):
        groups_of_heads((0, 1, 2), sizes)


@given(st.sets(st.integers(0, 200)))
@settings(max_examples=50, deadline=None)
def test_ranges_round_trip(indices):
    assert from_ranges(as_ranges(sorted(indices))) == sorted(indices)


@st.composite
def plans(draw, layers=5, groups=4, units=6):
    """A plan for a model whose layers all have the given sizes."""
    fate = draw(st.lists(st.sampled_from(["keep", "layer", "attention", "mlp"]), min_size=layers, max_size=layers))
    fate[draw(st.integers(0, layers - 1))] = "keep"
    subset = lambda n: st.sets(st.integers(0, n - 1), min_size=1).map(sorted)  # noqa: E731
    some = [i for i in range(layers) if fate[i] == "keep" and draw(st.booleans())]
    return PruningPlan(
        num_layers=layers,
        model_type="llama",
        removed_layers=[i for i in range(layers) if fate[i] == "layer"],
        removed_attention=[i for i in range(layers) if fate[i] == "attention"],
        removed_mlp=[i for i in range(layers) if fate[i] == "mlp"],
        kept_groups={i: draw(subset(groups)) for i in some},
        kept_units={i: draw(subset(units)) for i in some},
    )


@given(plans())
@settings(max_examples=50, deadline=None)
def test_json_round_trip(made):
    assert PruningPlan.from_json(made.to_json()) == made


@given(plans(), st.data())
@settings(max_examples=60, deadline=None)
def test_two_plans_in_turn_are_one_plan(first, data):
    """By a model of the model: a table of what each layer has, with original indices."""

    def apply(table, made):
        result = []
        for index, (groups, units) in enumerate(table):
            if index in made.removed_layers:
                continue
            groups = (
                []
                if index in made.removed_attention
                else [groups[k] for k in made.kept_groups.get(index, range(len(groups)))]
            )
            units = (
                [] if index in made.removed_mlp else [units[k] for k in made.kept_units.get(index, range(len(units)))]
            )
            result.append((groups, units))
        return result

    dense = [(list(range(4)), list(range(6))) for _ in range(5)]
    pruned = apply(dense, first)
    second = PruningPlan(
        num_layers=len(pruned),
        model_type="llama",
        removed_layers=(data.draw(st.integers(0, len(pruned) - 1)),) if len(pruned) > 1 else (),
    )
    free = [i for i in range(len(pruned)) if i not in second.removed_layers and pruned[i][1]]
    if free:
        index = data.draw(st.sampled_from(free))
        keep = data.draw(st.sets(st.integers(0, len(pruned[index][1]) - 1), min_size=1))
        second = PruningPlan(**{**vars(second), "kept_units": {index: keep}})
    assert apply(dense, first.then(second)) == apply(pruned, second)


def test_a_second_plan_for_another_model_is_refused():
    with pytest.raises(ValueError, match="for a 'llama' with 4 layers, but this plan leaves a 'llama' with 3"):
        plan(removed_layers=(1,)).then(plan())


OPERATIONS = {
    "layer": {"removed_layers": (1,)},
    "attention": {"removed_attention": (1,)},
    "mlp": {"removed_mlp": (2,)},
    "units": {"kept_units": {0: range(0, 48, 3)}},
    "groups": {"kept_groups": {2: (1,)}},
    "mixed": {"removed_attention": (1,), "removed_mlp": (3,), "kept_units": {2: (5, 7)}, "kept_groups": {2: (0,)}},
}


@pytest.mark.parametrize("model_type", sorted(SETTINGS))
def test_the_price_is_what_the_surgery_leaves(model_type):
    table = CostTable(tiny_model(model_type))
    for operation in OPERATIONS.values():
        made = plan(model_type=model_type, **operation)
        price = table.price(made)
        model = apply_plan(tiny_model(model_type), made)
        assert price.after.parameters == sum(p.numel() for p in model.parameters()), operation
        assert (
            price.after
            == CostTable(model).price(plan(model_type=model_type, num_layers=len(price_layers(model)))).before
        )
        assert 0 < price.ratio < price.non_embedding_ratio < 1
        assert price.after.prefill_flops < price.before.prefill_flops


def price_layers(model):
    return find_anatomy(model).layers


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert"])
def test_a_config_is_enough_to_price(model_type):
    model = tiny_model(model_type, head="base" if model_type in ("bert",) else None)
    made = plan(model_type=model_type, removed_layers=(1,))
    assert made.price(tiny_config(model_type)) == made.price(model)


def test_flops_and_cache_of_a_small_llama_by_hand():
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=8,
        intermediate_size=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=10,
        dtype="float16",
    )
    cost = PruningPlan(num_layers=2, model_type="llama").price(config, length=3).before
    weights = 2 * (8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 16)
    assert cost.kv_cache_bytes_per_token == 2 * 2 * 2 * 2 * 2  # layers, keys and values, heads, head_dim, bytes
    assert cost.prefill_flops == 2 * weights * 3 + 2 * 4 * 8 * (1 + 2 + 3) + 2 * 80
    assert cost.decode_flops == 2 * weights + 2 * 4 * 8 * 3 + 2 * 80
    assert cost.non_embedding_parameters == weights + 5 * 8
    assert cost.parameters == weights + 5 * 8 + 2 * 80


@pytest.mark.parametrize(
    ("model_type", "changes", "rung", "vllm"),
    [
        ("llama", {"removed_layers": (1,)}, "stock", "dense"),
        ("llama", {"kept_units": {i: range(16) for i in range(4)}}, "stock", "dense"),
        ("llama", {"kept_groups": dict.fromkeys(range(4), (0,))}, "stock", "dense"),
        ("llama", {"kept_units": {0: range(16)}}, "hf_cka", "backend, with"),
        ("llama", {"removed_attention": (1,)}, "hf_cka", "no: "),
        ("llama", {"removed_attention": (1,), "removed_mlp": (1,)}, "stock", "dense"),
        ("bert", {"kept_groups": dict.fromkeys(range(4), (0, 2))}, "hf_cka", "backend, with"),
        ("phi", {"kept_groups": dict.fromkeys(range(4), (0,))}, "stock", "dense"),
    ],
)
def test_explain_says_who_can_load_it(model_type, changes, rung, vllm):
    explanation = plan(model_type=model_type, **changes).explain(tiny_config(model_type))
    assert explanation.rung.name == rung
    assert vllm in explanation.loaders["vLLM"]
    assert (explanation.rung.reason == "") == (rung == "stock")
    assert explanation.rung.name in str(explanation)


def test_explain_relabels_a_llama_that_llama_rejects():
    config = tiny_config("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    explanation = plan(kept_groups=dict.fromkeys(range(4), (0, 1, 3))).explain(config)
    assert (explanation.rung.name, explanation.rung.model_type) == ("relabel", "mistral")
    assert "not a multiple" in explanation.rung.reason


def test_every_family_can_be_explained():
    for model_type in SETTINGS:
        plan(model_type=model_type, removed_mlp=(1,)).explain(tiny_config(model_type))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_since_turns_then_round(data):
    first = PruningPlan(
        num_layers=6,
        model_type="llama",
        removed_layers=tuple(data.draw(st.sets(st.integers(0, 5), max_size=2))),
    )
    free = sorted(first.kept_layers)
    first = PruningPlan(
        num_layers=6,
        model_type="llama",
        removed_layers=first.removed_layers,
        removed_mlp=tuple(free[:1]),
        kept_units={free[1]: sorted(data.draw(st.sets(st.integers(0, 9), min_size=3)))},
    )
    have = len(first.kept_units[free[1]])
    keep = sorted(data.draw(st.sets(st.integers(0, have - 1), min_size=1)))
    second = PruningPlan(
        num_layers=len(free),
        model_type="llama",
        removed_layers=(len(free) - 1,),
        removed_attention=(1,),
        kept_units={1: keep} if len(keep) < have else {},
    )
    assert first.then(second).since(first) == second


def test_since_refuses_what_is_no_part():
    whole = PruningPlan(num_layers=4, model_type="llama", removed_layers=(1,), kept_units={0: (1, 2)})
    with pytest.raises(ValueError, match="no part of it"):
        whole.since(PruningPlan(num_layers=4, model_type="llama", removed_layers=(2,)))
    with pytest.raises(ValueError, match=r"kept_units\[0\] keeps \[2\]"):
        whole.since(PruningPlan(num_layers=4, model_type="llama", kept_units={0: (1,)}))
