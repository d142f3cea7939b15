"""Which rung of the ladder each part of a model would need, were it the only one to go."""

from __future__ import annotations

from typing import Any

from hf_cka.anatomy import Anatomy
from hf_cka.modeling.plan import PruningPlan
from hf_cka.modeling.structure import rung_for


def rungs_of(anatomy: Anatomy) -> dict[str, str]:
    """Return the rung for each removable layer, branch and width.

    Args:
        anatomy: of the model.

    Returns:
        Dotted name of a layer, of a branch ("model.layers.3/attention") or of a width ("model.layers.3/heads", one
        member less in every layer that has it) -> "stock", "relabel" or "hf_cka". Of layers that are alike one is
        asked, and named. What cannot go is left out.

    Example:
        >>> from hf_cka.anatomy import find_anatomy
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     num_hidden_layers=2, hidden_size=8, intermediate_size=16, num_attention_heads=2, vocab_size=16
        ... )
        >>> rungs_of(find_anatomy(LlamaForCausalLM(config)))["model.layers.0/mlp"]
        'hf_cka'
    """
    found: dict[str, str] = {}
    for stack in anatomy.stacks:
        on = anatomy.on(stack.path)
        for alike in on.alike():
            index = alike[0]
            layer = stack.layers[index]
            if not layer.reason and len(stack.layers) > 1:
                found[layer.path] = _rung(on, removed_layers=(index,))
            for branch in () if layer.single else layer.branches:
                if not branch.reason:
                    found[f"{layer.path}/{branch.name}"] = _rung(on, removed_branches={branch.name: (index,)})
            for width in layer.widths:
                if not width.reason and width.members > 1:
                    everywhere = {
                        i: range(w.members - 1)
                        for i in range(on.num_layers)
                        if (w := on.width(i, width.name)) is not None
                    }
                    found[f"{layer.path}/{width.name}"] = _rung(on, kept={width.name: everywhere})
    return found


def _rung(on: Anatomy, **removed: Any) -> str:
    try:
        plan = PruningPlan(on.num_layers, on.model_type, stack=on.layers_path, **removed)
        plan.validate(on)
        return rung_for(on, plan).name
    except (ImportError, ValueError) as error:
        return f"refused: {error}"
