"""From values of single weights to values of KV groups and MLP units: which rows and columns go together."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_cka.anatomy import Anatomy
from hf_cka.pruning.criteria.inputs import OUTPUT_ROLES, weight_matrix

#: (layer, role) -> one value per weight, ``(out_features, in_features)``, or None where there is nothing to add
Values = Callable[[int, str], torch.Tensor | None]


def projection_matrix(anatomy: Anatomy, layer: int, role: str) -> torch.Tensor:
    """Return the weight of a projection as ``(out_features, in_features)``, float32 at least.

    Args:
        anatomy: of the model.
        layer: which layer.
        role: which projection.
    """
    if role not in OUTPUT_ROLES:
        return weight_matrix(anatomy, layer, role)
    sizes = anatomy.sizes(layer)
    width = sizes.num_heads * sizes.head_dim if role == "o" else sizes.intermediate_size
    return weight_matrix(anatomy, layer, role, width)


def group_sums(anatomy: Anatomy, values: Values) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Sum the values of all weights that go with a group: rows of q, k, v, gate, up, columns of o, down.

    Args:
        anatomy: of the model.
        values: asked once for every projection of every layer.

    Returns:
        Per layer the sums of its KV groups, and those of its units, float64 on the CPU.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_cka.anatomy import find_anatomy
        >>> sizes = dict(hidden_size=8, intermediate_size=16, num_attention_heads=2, vocab_size=16)
        >>> anatomy = find_anatomy(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)))
        >>> _, units = group_sums(anatomy, lambda layer, role: projection_matrix(anatomy, layer, role) ** 0)
        >>> units[0].tolist() == [3 * 8] * 16
        True
    """
    groups, units = [], []
    for layer in range(anatomy.num_layers):
        sizes = anatomy.sizes(layer)
        group = torch.zeros(sizes.num_kv_heads, dtype=torch.float64)
        unit = torch.zeros(sizes.intermediate_size, dtype=torch.float64)
        for role in anatomy.projections(layer):
            matrix = values(layer, role)
            if matrix is None:
                continue
            sums = matrix.double().sum(dim=0 if role in OUTPUT_ROLES else 1).cpu()
            if role in ("down", "gate", "up"):
                unit += sums
            elif role == "gate_up":
                unit += sums.unflatten(0, (2, -1)).sum(dim=0)
            else:
                group += _by_group(anatomy, layer, role, sums)
        groups.append(group)
        units.append(unit)
    return groups, units


def _by_group(anatomy: Anatomy, layer: int, role: str, sums: torch.Tensor) -> torch.Tensor:
    """The sums of the rows (of o: columns) of q, k, v or a fused qkv that belong to each KV group."""
    sizes = anatomy.sizes(layer)
    parts = [sums]
    if role == "qkv" and anatomy.family.qkv_layout == "concat":  # otherwise the rows of one group lie together
        heads = (sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads)
        parts = list(sums.split([n * sizes.head_dim for n in heads]))
    return torch.stack([part.unflatten(0, (sizes.num_kv_heads, -1)).sum(dim=1) for part in parts]).sum(dim=0)
