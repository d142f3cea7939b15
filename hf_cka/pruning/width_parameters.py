"""Exact parameter accounting for widths, from shapes alone: works on models on the meta device.

Nothing is chosen here: given sizes, it says how many parameters a model has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hf_cka.anatomy import Anatomy, find_anatomy
from hf_cka.pruning.adapters import own_parameters

_MLP = ("gate", "up", "gate_up", "down")


@dataclass(frozen=True)
class WidthSizes:
    """How wide every layer is; 0 where the sub-layer was removed.

    Args:
        kv_groups: per layer, KV groups (heads, without grouped attention).
        units: per layer, MLP units.

    Example:
        >>> WidthSizes((8, 8), (64, 64)).uniform
        True
    """

    kv_groups: tuple[int, ...]
    units: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.kv_groups) != len(self.units):
            raise ValueError(f"{len(self.kv_groups)} layers of kv_groups and {len(self.units)} of units.")

    @property
    def uniform(self) -> bool:
        """Whether all layers that have a sub-layer have it equally wide, so that one stock config can say it."""
        return len({n for n in self.kv_groups if n}) <= 1 and len({n for n in self.units if n}) <= 1


@dataclass(frozen=True)
class LayerParameters:
    """What the parts of one layer weigh.

    Args:
        group: parameters of one KV group: its rows of q, k, v, the columns of o behind its query heads, their biases.
        unit: parameters of one MLP unit.
        fixed: what stays whatever the widths: norms and output biases.
    """

    group: int
    unit: int
    fixed: int


@dataclass(frozen=True)
class ModelParameters:
    """What a model weighs as a function of its widths.

    Args:
        layers: per layer.
        sizes: the widths it has now.
        other: embeddings, final norm, head; tied weights once.
    """

    layers: tuple[LayerParameters, ...]
    sizes: WidthSizes
    other: int

    @property
    def total(self) -> int:
        """Parameters of the model as it is."""
        return self.count(self.sizes)

    def count(self, sizes: WidthSizes) -> int:
        """Return the parameters of the model with other widths.

        Args:
            sizes: as many layers as the model has.

        Example:
            >>> model = ModelParameters((LayerParameters(10, 3, 2),), WidthSizes((4,), (8,)), other=5)
            >>> model.total, model.count(WidthSizes((3,), (6,)))
            (71, 55)
        """
        per_layer = zip(self.layers, sizes.kv_groups, sizes.units, strict=True)
        return self.other + sum(p.fixed + groups * p.group + units * p.unit for p, groups, units in per_layer)

    def layer_total(self, layer: int) -> int:
        """Return the parameters of one layer as it is."""
        part = self.layers[layer]
        return part.fixed + self.sizes.kv_groups[layer] * part.group + self.sizes.units[layer] * part.unit

    def resized(self, sizes: WidthSizes) -> ModelParameters:
        """Return the same model with other widths."""
        if len(sizes.units) != len(self.layers):
            raise ValueError(f"Sizes of {len(sizes.units)} layers for a model of {len(self.layers)}.")
        return replace(self, sizes=sizes)

    def without_layers(self, removed: tuple[int, ...]) -> ModelParameters:
        """Return the same model without some whole layers.

        Args:
            removed: their indices.

        Raises:
            ValueError: for an index that is out of range, or if no layer would stay.

        Example:
            >>> part = LayerParameters(10, 3, 2)
            >>> model = ModelParameters((part, part), WidthSizes((4, 4), (8, 8)), other=5)
            >>> model.without_layers((0,)).total
            71
        """
        wrong = [i for i in removed if not 0 <= i < len(self.layers)]
        if wrong or len(set(removed)) == len(self.layers):
            raise ValueError(f"Cannot remove layers {sorted(removed)} of {len(self.layers)}: out of range, or all.")
        kept = [i for i in range(len(self.layers)) if i not in set(removed)]
        sizes = WidthSizes(tuple(self.sizes.kv_groups[i] for i in kept), tuple(self.sizes.units[i] for i in kept))
        return ModelParameters(tuple(self.layers[i] for i in kept), sizes, self.other)


def layer_parameters(source: Any) -> ModelParameters:
    """Count what every KV group, unit and layer of a model weighs.

    Args:
        source: an `Anatomy`, a model, or a config; of a config the causal language model is built on the meta device,
            which needs no memory.

    Raises:
        ValueError: if no layers are recognised.

    Example:
        >>> from transformers import LlamaConfig
        >>> sizes = dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, vocab_size=32000)
        >>> llama2 = layer_parameters(LlamaConfig(num_hidden_layers=32, **sizes))  # LLaMA-2-7B
        >>> llama2.total, llama2.layer_total(0)
        (6738415616, 202383360)
    """
    anatomy = source if isinstance(source, Anatomy) else find_anatomy(_model_of(source))
    layers = tuple(_layer(anatomy, i) for i in range(anatomy.num_layers))
    sizes = [anatomy.sizes(i) for i in range(anatomy.num_layers)]
    inside = {id(p) for layer in anatomy.layers for p in own_parameters(layer)}
    other = sum(p.numel() for p in own_parameters(anatomy.model) if id(p) not in inside)
    return ModelParameters(
        layers, WidthSizes(tuple(s.num_kv_heads for s in sizes), tuple(s.intermediate_size for s in sizes)), other
    )


def _model_of(source: Any) -> nn.Module:
    if isinstance(source, nn.Module):
        return source
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(source)


def _layer(anatomy: Anatomy, index: int) -> LayerParameters:
    """From the sizes, not from weight shapes: a quantized weight does not show its own."""
    family, layer, sizes = anatomy.family, anatomy.layer(index), anatomy.sizes(index)
    hidden = anatomy.config.hidden_size
    queries = sizes.num_heads // sizes.num_kv_heads if sizes.num_kv_heads else 0
    # rows per KV group of each projection that reads the residual stream
    rows = {"q": queries, "k": 1, "v": 1, "qkv": queries + 2, "gate": 1, "up": 1, "gate_up": 2}
    group = unit = 0
    counted: list[nn.Module] = []
    for role, path in anatomy.projections(index).items():
        module = layer.get_submodule(path)
        counted.append(module)
        if role == "o":
            group += queries * sizes.head_dim * hidden
        elif role == "down":
            unit += hidden
        else:
            width = rows[role] * (hidden + (getattr(module, "bias", None) is not None))
            if role in _MLP:
                unit += width
            else:
                group += width * sizes.head_dim
    if sizes.num_kv_heads:
        for path in family.position_projections:
            module = _get(layer, path)
            if module is not None:
                counted.append(module)
                group += queries * sizes.head_dim * (hidden + (module.bias is not None))
        if family.norm_scope == "all":
            for path, heads in zip(family.query_key_norms, (queries, 1), strict=True):
                module = _get(layer, path)
                if module is not None:
                    counted.append(module)
                    group += heads * sizes.head_dim * len(list(own_parameters(module)))
    within = {id(p) for module in counted for p in own_parameters(module)}
    fixed = sum(p.numel() for p in own_parameters(layer) if id(p) not in within)
    for role, path in anatomy.projections(index).items():
        bias = getattr(layer.get_submodule(path), "bias", None)
        fixed += bias.numel() if role in ("o", "down") and bias is not None else 0
    return LayerParameters(group, unit, fixed)


def _get(layer: nn.Module, path: str) -> Any:
    for part in path.split("."):
        layer = getattr(layer, part, None)  # type: ignore[assignment]
        if layer is None:
            return None
    return layer
