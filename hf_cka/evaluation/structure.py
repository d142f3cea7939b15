"""Where the layers of a model stood in the model it was pruned from, and how much of each is left.

Read from the pruning record that a pruned model carries in its config; a model without one is taken as whole.
"""

from __future__ import annotations

from typing import Any

from hf_cka.anatomy import find_anatomy
from hf_cka.evaluation.blocks import Strip


def original_layers(model: Any) -> tuple[int, ...]:
    """Return, for each layer that a model has now, its index in the model it was pruned from.

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
    anatomy = find_anatomy(model)
    plan = _plan(anatomy.config)
    return tuple(range(anatomy.num_layers)) if plan is None else plan.kept_layers


def num_original_layers(model: Any) -> int:
    """Return how many layers the model had that this one was pruned from; its own number if it never was.

    Args:
        model: any supported model, pruned or not.
    """
    anatomy = find_anatomy(model)
    plan = _plan(anatomy.config)
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
    anatomy = find_anatomy(model)
    plan = _plan(anatomy.config)
    if plan is None:
        return Strip(name, anatomy.num_layers)
    before = anatomy.config.pruning["widths_before"]
    attention, mlp = [0.0] * plan.num_layers, [0.0] * plan.num_layers
    for index, origin in enumerate(plan.kept_layers):
        sizes = anatomy.sizes(index)
        attention[origin] = sizes.num_kv_heads / before["num_key_value_heads"][origin]
        mlp[origin] = sizes.intermediate_size / before["intermediate_size"][origin]
    return Strip(
        name,
        plan.num_layers,
        removed=plan.removed_layers,
        removed_attention=plan.removed_attention,
        removed_mlp=plan.removed_mlp,
        attention_share=tuple(attention),
        mlp_share=tuple(mlp),
    )


def _plan(config: Any) -> Any:
    from hf_cka.modeling.plan import PruningPlan

    record = getattr(config, "pruning", None)
    return PruningPlan.from_dict(record["plan"]) if record else None
