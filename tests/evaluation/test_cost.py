"""Costs are counted from what really runs: operators, a real cache; energy says what is estimated."""

from __future__ import annotations

import sys

import pytest
import torch

from hf_cka import PruningPlan, apply_plan
from hf_cka.evaluation.cost import cache_bytes, count_flops, measure_efficiency
from hf_cka.evaluation.energy import generation_energy
from tests.tiny import tiny_model


def _weights(model) -> int:
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])
def test_operations_are_two_a_weight_and_token_plus_attention(family: str) -> None:
    """The rotary embedding's own small product is the only other thing counted."""
    model = tiny_model(family)
    heads, size = model.config.num_attention_heads, model.model.layers[0].self_attn.head_dim
    found = count_flops(model, prompt_tokens=10)

    def attention(queries: int, keys: int) -> int:
        return 4 * 2 * 2 * queries * keys * heads * size  # layers, two products, multiply and add

    for counted, queries, keys in ((found.prefill, 10, 10), (found.decode, 1, 11)):
        expected = 2 * _weights(model) * queries + attention(queries, keys)
        assert expected <= counted <= expected + 2 * size * queries


def test_a_pruned_model_does_what_is_left() -> None:
    """Without one MLP its products are gone, without one attention its cache, too."""
    dense = tiny_model("llama")
    before, cache = count_flops(dense), cache_bytes(dense, 12)
    mlp = sum(p.numel() for p in dense.model.layers[1].mlp.parameters())
    plan = PruningPlan(num_layers=4, model_type="llama", removed_mlp=(1,), removed_attention=(2,))
    pruned = apply_plan(dense, plan)
    after = count_flops(pruned)
    assert before.decode - after.decode > 2 * mlp
    assert cache_bytes(pruned, 12) == cache * 3 // 4
    assert cache == 4 * 2 * 12 * 2 * 8 * 4  # layers, key and value, tokens, KV heads, head size, bytes


def test_several_models_are_measured_in_turn() -> None:
    models = {"a": tiny_model("llama"), "b": tiny_model("llama", intermediate_size=16)}
    order: list[str] = []
    for name, model in models.items():
        model.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: order.append(name) if kwargs["input_ids"].shape[1] == 5 else None,
            with_kwargs=True,
        )
    found = measure_efficiency(models, prompt_tokens=5, new_tokens=3, batch_sizes=(1, 2), repeats=2)
    assert "".join(order[:12]) == "aaaabbbb" + "aabb"  # with a warm-up each at first
    assert [speed.batch_size for speed in found["a"].speeds] == [1, 2]
    assert found["a"].speeds[0].repeats == 2
    assert found["a"].speeds[0].slowest <= found["a"].speeds[0].tokens_per_second <= found["a"].speeds[0].fastest
    assert found["b"].weight_bytes < found["a"].weight_bytes == 4 * found["a"].parameters.total
    assert found["b"].flops.decode < found["a"].flops.decode
    assert found["a"].energy is None
    assert found["a"].metrics()["cache_bytes_per_token"] == found["b"].metrics()["cache_bytes_per_token"] == 512


def test_energy_says_what_is_measured_and_what_estimated() -> None:
    pytest.importorskip("codecarbon")
    energy = generation_energy(tiny_model("llama"), prompt_tokens=4, new_tokens=8, seconds=2.5, country="FRA")
    assert energy.joules > 0
    assert energy.tokens % 8 == 0
    assert energy.seconds >= 2.5
    assert energy.joules_per_token == pytest.approx(energy.joules / energy.tokens)
    assert "ram" in energy.estimated  # nothing counts the energy of memory
    assert not set(energy.estimated) & set(energy.measured)
    assert energy.co2_grams is not None
    assert energy.co2_grams > 0


def test_energy_without_codecarbon_gives_the_command(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_cka\[energy\]'"):
        generation_energy(tiny_model("llama"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": {}}, "at least one model"),
        ({"batch_sizes": ()}, "one batch size"),
        ({"repeats": 0}, "repeats=0"),
        ({"new_tokens": 60}, "exceed the model's 64 positions"),
        ({"models": {"a": None}}, "needs a causal language model"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    arguments = {"models": {"a": tiny_model("llama")}, **change}
    if arguments["models"] == {"a": None}:
        arguments["models"] = {"a": tiny_model("bert")}
    with pytest.raises(ValueError, match=message):
        measure_efficiency(arguments.pop("models"), **arguments)


def test_an_unknown_country_is_named() -> None:
    pytest.importorskip("codecarbon")
    with pytest.raises(ValueError, match="Unknown country 'Utopia'"):
        generation_energy(tiny_model("llama"), country="Utopia")
