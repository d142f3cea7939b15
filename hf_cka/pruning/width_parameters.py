"""Exact parameter accounting for widths, from shapes alone: works on models on the meta device.

Nothing is chosen here: given sizes, it says how many parameters a model has.
"""

from __future__ import annotations

import copy
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hf_cka.anatomy import Anatomy, Slice, Width, find_anatomy


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


class Weights:
    """Where each parameter of a model is, so that one which several parts share counts once, and goes with the last.

    Args:
        model: with adapters or without; theirs are left out.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        >>> model[1].weight = model[0].weight
        >>> weights = Weights(model)
        >>> weights.total, weights.freed(["0.weight", "0.bias"]), weights.freed(["0.weight", "1.weight"])
        (15, 3, 9)
    """

    def __init__(self, model: nn.Module) -> None:
        self.named = dict(own_named(model))
        self.places = Counter(id(p) for p in self.named.values())
        self.total = sum({id(p): p.numel() for p in self.named.values()}.values())

    def freed(self, names: Iterable[str]) -> int:
        """Return the parameters that are gone once these are; names that are not there count nothing."""
        gone = [self.named[name] for name in set(names) if name in self.named]
        places = Counter(id(p) for p in gone)
        return sum({id(p): p.numel() for p in gone if places[id(p)] == self.places[id(p)]}.values())

    def shared(self, names: Iterable[str]) -> bool:
        """Whether one of these is also somewhere else."""
        return any(self.places[id(self.named[name])] > 1 for name in names if name in self.named)


def own_named(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) of all that is a model's own and not an adapter's, by the name it has without adapters.

    Args:
        module: with adapters or without. A parameter that is in several places comes once for each.

    Example:
        >>> [name for name, _ in own_named(nn.Sequential(nn.Linear(3, 2)))]
        ['0.weight', '0.bias']
    """
    yield from _own_named(module, "", ())


def _own_named(module: nn.Module, prefix: str, above: tuple[nn.Module, ...]) -> Iterator[tuple[str, nn.Parameter]]:
    for inside in ("base_layer", "original_module"):  # of a tuner layer; of a module that is saved whole
        if isinstance(getattr(module, inside, None), nn.Module):
            yield from _own_named(getattr(module, inside), prefix, above)
            return
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, parameter
    for name, child in module._modules.items():
        if child is not None and not any(child is m for m in above):
            yield from _own_named(child, f"{prefix}{name}.", (*above, module))


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


def model_of(source: Any) -> nn.Module:
    """Return a model, or one without memory for a config.

    Args:
        source: either. For a config: of its first architecture; else a causal language model if its layers are a
            decoder's and there is such a class, else the bare model.
    """
    if isinstance(source, nn.Module):
        return source
    import torch
    import transformers

    from hf_cka.anatomy.twin import quiet
    from hf_cka.modeling import modeling_hf_cka as code
    from hf_cka.modeling.register import register

    register()
    name = (getattr(source, "architectures", None) or [""])[0]
    where = code if name.startswith(code.PREFIX) else transformers
    stock = getattr(where, name, None) if name else None

    def built(make: Any) -> nn.Module:
        with quiet(), torch.device("meta"):
            return make(copy.deepcopy(source))

    if isinstance(stock, type):
        return built(stock)
    bare = built(transformers.AutoModel.from_config)
    decodes = "AutoModelForCausalLM" in code.autos_of(type(source)) and find_anatomy(bare).kind == "decoder"
    return built(transformers.AutoModelForCausalLM.from_config) if decodes else bare
