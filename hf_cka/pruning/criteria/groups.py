"""From values of single weights to values of KV groups and MLP units: which rows and columns go together."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_cka.anatomy import OUTPUTS, Anatomy, Slice, Width
from hf_cka.pruning.criteria.weights import stored

#: (layer, parameter) -> one value per weight, in the shape in which the parameter is stored, or None where there is
#: nothing to add; the parameter's name is relative to the layer
Values = Callable[[int, str], torch.Tensor | None]


def group_sums(anatomy: Anatomy, values: Values) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Sum the values of all weights that go with a group: rows of q, k, v, gate, up, columns of o, down.

    Whatever else has a slice per member counts as well (convolutions, decay rates); vectors (biases, norms) do not.

    Args:
        anatomy: of the model.
        values: asked once for every parameter of every layer that members hold a part of.

    Returns:
        Per layer the sums of its KV groups, and those of its units, float64 on the CPU.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_cka.anatomy import find_anatomy
        >>> from hf_cka.pruning.criteria.weights import values_of
        >>> sizes = dict(hidden_size=8, intermediate_size=16, num_attention_heads=2, vocab_size=16)
        >>> anatomy = find_anatomy(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)))
        >>> _, units = group_sums(anatomy, lambda layer, name: values_of(anatomy, layer, name) ** 0)
        >>> units[0].tolist() == [3 * 8] * 16
        True
    """
    found: dict[str, list[torch.Tensor]] = {kind: [] for kind in OUTPUTS.values()}
    for layer in range(anatomy.num_layers):
        widths = {width.kind: width for width in anatomy.outputs(layer).values()}
        for kind, sums in found.items():
            width = widths.get(kind)
            total = torch.zeros(width.members if width else 0, dtype=torch.float64)
            for part in member_slices(anatomy, layer, width) if width else ():
                matrix = values(layer, part.parameter)
                if matrix is not None and width is not None:
                    total += by_member(matrix, part, width.members)
            sums.append(total)
    groups, units = found.values()
    return groups, units


def member_slices(anatomy: Anatomy, layer: int, width: Width) -> list[Slice]:
    """Return the slices of a width that lie in parameters of two axes or more, in the order of the layer.

    Args:
        anatomy: of the model.
        layer: which layer.
        width: of that layer.
    """
    names = [name for branch in anatomy.stack.layers[layer].branches for name in branch.parameters]
    order = {name: place for place, name in enumerate(names)}
    module = anatomy.layer(layer)
    found = []
    for part in width.slices:
        value = stored(module, part.parameter)
        # a weight that does not show itself is a matrix: what is quantized is
        if part.parameter.endswith(".weight") if value is None else value.ndim >= 2:
            found.append(part)
    return sorted(found, key=lambda part: order.get(part.parameter, len(order)))


def by_member(values: torch.Tensor, part: Slice, members: int) -> torch.Tensor:
    """Return the sums of the rows (or columns) that belong to each member, float64 on the CPU.

    Args:
        values: one per weight of a parameter.
        part: where the members lie in it.
        members: how many there are.
    """
    sums = values.double().sum(dim=[axis for axis in range(values.ndim) if axis != part.axis]).cpu()
    runs = [
        sums[start : start + members * block].unflatten(0, (members, -1)).sum(dim=1) for start, block in part.segments
    ]
    return torch.stack(runs).sum(dim=0)
