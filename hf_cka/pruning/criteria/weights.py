"""The weights of a layer under the names that anatomy knows them by, as the model computes with them.

Adapters, quantization and the ways in which projections are stored (transposed, as convolutions, as experts one behind
the other) end here. Nothing is scored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hf_cka.anatomy import Anatomy, Slice, Width
from hf_cka.modeling.carried import added_weight


def holder_of(layer: nn.Module, name: str) -> Any:
    """Return the module that holds a parameter of a layer, the one that PEFT put around it if there is one.

    Args:
        layer: with or without adapters.
        name: of the parameter, relative to the layer.

    Example:
        >>> holder_of(nn.Sequential(nn.Linear(2, 3)), "0.weight")
        Linear(in_features=2, out_features=3, bias=True)
    """
    return layer.get_submodule(name.rpartition(".")[0])


def stored(layer: nn.Module, name: str) -> torch.Tensor | None:
    """Return a parameter of a layer if its values are there to be read; None if it is quantized or offloaded.

    Args:
        layer: with or without adapters.
        name: of the parameter, relative to the layer.

    Example:
        >>> stored(nn.Linear(2, 3), "weight").shape
        torch.Size([3, 2])
    """
    module, attribute = holder_of(layer, name), name.rpartition(".")[2]
    while not isinstance(value := getattr(module, attribute, None), torch.Tensor):
        module = getattr(module, "base_layer", None)
        if module is None:
            return None
    return value if value.is_floating_point() and not value.is_meta else None


def matrices(layer: nn.Module) -> Iterator[str]:
    """Yield the names of all parameters of a layer that have two axes or more, adapters left out.

    Args:
        layer: with or without adapters.

    Example:
        >>> list(matrices(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))))
        ['0.weight']
    """
    yield from _matrices(layer, "")


def _matrices(module: nn.Module, path: str) -> Iterator[str]:
    inside = getattr(module, "base_layer", None)
    if isinstance(inside, nn.Module):  # adapters lie beside it
        yield from _matrices(inside, path)
        return
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim >= 2:
            yield f"{path}.{name}" if path else name
    for name, child in module.named_children():
        yield from _matrices(child, f"{path}.{name}" if path else name)


def values_of(anatomy: Anatomy, layer: int, name: str) -> torch.Tensor:
    """Return the values of a parameter, as it is stored, with what active adapters add to it; float32 at least.

    A quantized module does not show its weight: there the identity goes through the module, which gives the weight it
    really computes with, as ``(out_features, in_features)``.

    Args:
        anatomy: of the model.
        layer: which layer.
        name: of the parameter, relative to the layer.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_cka.anatomy import find_anatomy
        >>> anatomy = find_anatomy(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16)))
        >>> values_of(anatomy, 0, "mlp.c_fc.weight").shape
        torch.Size([8, 32])
    """
    module, value = holder_of(anatomy.layer(layer), name), stored(anatomy.layer(layer), name)
    if value is None:
        taken = {w.output.parameter: w.members * w.output.block for w in anatomy.outputs(layer).values()}
        return _through(anatomy, module, taken.get(name) or int(getattr(module, "in_features", 0)))
    added = added_weight(module) if name.endswith("weight") and not hasattr(module, "parameter_name") else None
    value = value.detach() if added is None else value.detach() + added.to(value)
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _through(anatomy: Anatomy, module: Any, in_features: int) -> torch.Tensor:
    width = in_features or anatomy.config.hidden_size
    reference = next(p for p in anatomy.model.parameters() if p.is_floating_point())
    with torch.no_grad():
        rows = torch.cat([torch.zeros(1, width), torch.eye(width)]).to(reference.device, reference.dtype)
        out = module(rows)
        return (out[1:] - out[:1]).T.to(torch.promote_types(out.dtype, torch.float32))


def weight_matrix(anatomy: Anatomy, layer: int, role: str) -> torch.Tensor:
    """Return the weight of an output projection as ``(outputs, members' features)``, however it is stored.

    The features are in the order of the members: those of the first, of the second, and so on. Kernel positions of a
    convolution, and experts, count as further outputs.

    Args:
        anatomy: of the model.
        layer: which layer.
        role: ``"o"`` or ``"down"``.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_cka.anatomy import find_anatomy
        >>> anatomy = find_anatomy(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16)))
        >>> weight_matrix(anatomy, 0, "down").shape
        torch.Size([8, 32])
    """
    width = anatomy.outputs(layer)[role]
    output = width.output
    value = values_of(anatomy, layer, output.parameter)
    if stored(anatomy.layer(layer), output.parameter) is not None:
        value = value.T if value.ndim == 2 and output.axis == 0 else value.movedim(output.axis, -1)
        if value.ndim > 2:
            value = value.reshape(-1, value.shape[-1])
    order = member_order(width, output, value.shape[-1])
    return value if order is None else value[:, order.to(value.device)]


def member_order(width: Width, part: Slice, size: int) -> torch.Tensor | None:
    """Return the indices of an axis, member by member; None where they lie so already and are all there is.

    Args:
        width: whose members.
        part: what they hold of the axis.
        size: of the axis.

    Example:
        >>> part = Slice("o.weight", 1, ((0, 2),))
        >>> member_order(Width("heads", "attention", 3, (part,), part), part, 6) is None
        True
    """
    if len(part.segments) == 1 and part.segments[0][0] == 0 and width.members * part.block == size:
        return None
    return torch.tensor(part.indices(range(width.members)))
