"""Layers keep the number they had in the model they were pruned from, however often it was pruned."""

from __future__ import annotations

from hf_cka import PruningPlan, apply_plan
from hf_cka.evaluation.structure import layer_strip, original_layers
from tests.tiny import tiny_model


def test_original_numbers_survive_a_second_pruning() -> None:
    model = tiny_model("llama")
    apply_plan(model, PruningPlan(num_layers=4, model_type="llama", removed_layers=(1,)))
    assert original_layers(model) == (0, 2, 3)
    apply_plan(model, PruningPlan(num_layers=3, model_type="llama", removed_layers=(1,)))
    assert original_layers(model) == (0, 3)
    strip = layer_strip("twice", model)
    assert (strip.removed, strip.kept) == ((1, 2), 2)


def test_a_strip_says_what_is_left_of_each_part() -> None:
    plan = PruningPlan(
        num_layers=4,
        model_type="llama",
        removed_layers=(3,),
        removed_attention=(1,),
        kept_groups={0: (1,)},
        kept_units={0: range(12), 2: range(24)},
    )
    strip = layer_strip("small", apply_plan(tiny_model("llama"), plan))
    assert strip.removed_attention == (1,)
    assert strip.attention_share == (0.5, 0.0, 1.0, 0.0)
    assert strip.mlp_share == (0.25, 1.0, 0.5, 0.0)


def test_a_dense_model_is_whole() -> None:
    strip = layer_strip("dense", tiny_model("bert"))
    assert (strip.num_layers, strip.kept, strip.mlp_share) == (4, 4, ())
