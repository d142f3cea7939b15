"""Exact parameter accounting for widths, from shapes alone: works on models on the meta device.

Nothing is chosen here: given sizes, it says how many parameters a model has.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hf_cka.anatomy import Anatomy, Slice, Width, find_anatomy
from hf_cka.modeling.counting import Weights, model_of, own_named


@dataclass(frozen=True)
class WidthSizes:
    """How wide every layer is; 0 where it has nothing of a kind.

    Args:
        kv_groups: per layer, KV groups (heads, without grouped attention; channels of a mixer without heads).
        units: per layer, MLP units, or whole experts.

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
        """Whether all layers that have any of a kind have equally many, so that one stock config can say it."""
        return len({n for n in self.kv_groups if n}) <= 1 and len({n for n in self.units if n}) <= 1


@dataclass(frozen=True)
class LayerParameters:
    """What the parts of one layer weigh.

    Args:
        group: parameters of one KV group: its rows of q, k, v, the columns of o behind its query heads, their biases.
        unit: parameters of one MLP unit; of a layer of experts, that of every expert. Or of one whole expert.
        fixed: what stays whatever the widths: norms and output biases.
        least: units (or experts) that must stay.
    """

    group: int
    unit: int
    fixed: int
    least: int = 1


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

    @property
    def usual_layer(self) -> int:
        """Parameters of a usual layer: of the first where all are equally wide, else the median.

        Example:
            >>> parts = (LayerParameters(10, 3, 2), LayerParameters(10, 3, 0), LayerParameters(10, 3, 1))
            >>> ModelParameters(parts, WidthSizes((4, 2, 1), (8, 8, 8)), other=5).usual_layer
            44
        """
        if self.sizes.uniform:
            return self.layer_total(0)
        return statistics.median_low(self.layer_total(i) for i in range(len(self.layers)))

    def fixing(self, groups: Iterable[int], units: Iterable[int]) -> ModelParameters:
        """Return the same model seen as if some layers had no groups or units, since those stay as they are.

        Args:
            groups: layers whose groups stay.
            units: layers whose units stay.

        Example:
            >>> model = ModelParameters((LayerParameters(10, 3, 2),), WidthSizes((4,), (8,)), other=5)
            >>> fixed = model.fixing([0], [])
            >>> fixed.sizes.kv_groups, fixed.total == model.total
            ((0,), True)
        """
        still = (set(groups), set(units))
        kv_groups = tuple(0 if i in still[0] else n for i, n in enumerate(self.sizes.kv_groups))
        sizes = WidthSizes(kv_groups, tuple(0 if i in still[1] else n for i, n in enumerate(self.sizes.units)))
        layers = []
        for i, part in enumerate(self.layers):
            inside = part.group * (self.sizes.kv_groups[i] - sizes.kv_groups[i])
            inside += part.unit * (self.sizes.units[i] - sizes.units[i])
            layers.append(replace(part, fixed=part.fixed + inside))
        return ModelParameters(tuple(layers), sizes, self.other)

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


def layer_parameters(source: Any, inner: str = "units") -> ModelParameters:
    """Count what every KV group, unit (or expert) and layer of a model weighs.

    Args:
        source: an `Anatomy`, a model, or a config; of a config the model is built on the meta device, which needs no
            memory.
        inner: count ``"units"``, or whole ``"experts"`` in their place.

    Raises:
        ValueError: if no layers are recognised.

    Example:
        >>> from transformers import LlamaConfig
        >>> sizes = dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, vocab_size=32000)
        >>> llama2 = layer_parameters(LlamaConfig(num_hidden_layers=32, **sizes))  # LLaMA-2-7B
        >>> llama2.total, llama2.layer_total(0)
        (6738415616, 202383360)
    """
    anatomy = source if isinstance(source, Anatomy) else find_anatomy(model_of(source))
    counted: set[int] = set()
    layers, groups, units, inside = [], [], [], 0
    for index, layer in enumerate(anatomy.layers):
        named = {name: p for name, p in own_named(layer) if id(p) not in counted}  # what layers share: with the first
        counted |= {id(p) for p in named.values()}
        whole = sum({id(p): p.numel() for p in named.values()}.values())
        heads, mlp = anatomy.width(index, "heads"), anatomy.width(index, inner)
        groups.append(heads.members if heads else 0)
        units.append(mlp.members if mlp else 0)
        group, unit = (0 if w is None else member_parameters(w, named) for w in (heads, mlp))
        fixed = whole - group * groups[-1] - unit * units[-1]
        layers.append(LayerParameters(group, unit, fixed, mlp.least if mlp else 1))
        inside += whole
    sizes = WidthSizes(tuple(groups), tuple(units))
    return ModelParameters(tuple(layers), sizes, Weights(anatomy.model).total - inside)


def member_parameters(width: Width, named: dict[str, nn.Parameter]) -> int:
    """Return what one member of a width weighs.

    Args:
        width: of a layer.
        named: the parameters of that layer that count.
    """
    return sum(share_of(s, width.members, named[s.parameter]) for s in width.slices if s.parameter in named)


def share_of(part: Slice, members: int, parameter: nn.Parameter) -> int:
    """Return how many elements of a parameter one member holds.

    Args:
        part: what members hold of it.
        members: how many there are.
        parameter: as it is stored; a packed one does not show its shape, and is taken to be spread evenly.
    """
    size = parameter.shape[part.axis] if parameter.ndim > part.axis else 0
    return parameter.numel() // size * part.block if size >= members * part.block else parameter.numel() // members
