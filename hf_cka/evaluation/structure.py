"""Where the layers of a model stood in the model it was pruned from, and how much of each is left.

Read from the pruning record that a pruned model carries in its config; a model without one is taken as whole.
"""

from __future__ import annotations

from typing import Any

from hf_cka.anatomy import Anatomy, find_anatomy
from hf_cka.evaluation.blocks import Strip


def original_layers(model: Any) -> tuple[int, ...]:
    """Return, for each layer that a model has now, its index in the model it was pruned from.

    Of a model with several stacks that is about the one that was pruned (first), or the one with most parameters.

    Args:
        model: any supported model, pruned or not.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_cka import PruningPlan, apply_plan
        >>> model = LlamaForCausalLM(LlamaConfig(
        ...     num_hidden_layers=3, hidden_size=8, intermediate_size=16, num_attention_heads=2, vocab_size=16))
        >>> original_layers(model)
        (0, 1, 2)
        >>> plan = PruningPlan(num_layers=3, model_type="llama", removed_layers=(1,))
        >>> original_layers(apply_plan(model, plan))
        (0, 2)
    """
    anatomy, plan = _seen(model)
    return tuple(range(anatomy.num_layers)) if plan is None else plan.kept_layers


def num_original_layers(model: Any) -> int:
    """Return how many layers the model had that this one was pruned from; its own number if it never was.

    Args:
        model: any supported model, pruned or not.
    """
    anatomy, plan = _seen(model)
    return anatomy.num_layers if plan is None else plan.num_layers


def layer_strip(name: str, model: Any) -> Strip:
    """Return what is left of each layer, to be drawn: whole layers, attention, MLP, and their widths.

    Args:
        name: of the model in the chart.
        model: any supported model, pruned or not.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_cka import PruningPlan, apply_plan
        >>> model = LlamaForCausalLM(LlamaConfig(
        ...     num_hidden_layers=3, hidden_size=8, intermediate_size=16, num_attention_heads=2, vocab_size=16))
        >>> plan = PruningPlan(num_layers=3, model_type="llama", removed_layers=(1,), kept_units={2: range(4)})
        >>> strip = layer_strip("pruned", apply_plan(model, plan))
        >>> strip.removed, strip.mlp_share
        ((1,), (1.0, 0.0, 0.25))
    """
    anatomy, plan = _seen(model)
    if plan is None:
        return Strip(name, anatomy.num_layers)
    record = getattr(anatomy.model.config, "pruning", None) or getattr(anatomy.config, "pruning", None) or {}
    shares = []
    for kind, field in (("heads", "num_key_value_heads"), ("units", "intermediate_size")):
        before = record.get("widths_before", {}).get(field, ())
        share = [0.0 if i in plan.removed_layers else 1.0 for i in range(plan.num_layers)]
        for index, kept in plan.kept.get(kind, {}).items():
            if len(before) == plan.num_layers and before[index]:
                share[index] = len(kept) / before[index]
        shares.append(share)
    for share, gone in zip(shares, (plan.removed_attention, plan.removed_mlp), strict=True):
        for index in gone:
            share[index] = 0.0
    return Strip(
        name,
        plan.num_layers,
        removed=plan.removed_layers,
        removed_attention=plan.removed_attention,
        removed_mlp=plan.removed_mlp,
        attention_share=tuple(shares[0]),
        mlp_share=tuple(shares[1]),
    )


def _seen(model: Any) -> tuple[Anatomy, Any]:
    """The stack that was pruned, and what was removed from it."""
    from hf_cka.pruning.history import recorded_plan

    anatomy = find_anatomy(model)
    plan = recorded_plan(anatomy.model)
    return (anatomy if plan is None else plan.seen_in(anatomy)), plan
