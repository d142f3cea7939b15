"""The structure of a model as data: the shape of each layer, the config that says so, and who can load that."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from hf_cka.anatomy import Family
from hf_cka.anatomy.model import config_sizes

# Config fields that name layers by index in ways that differ from family to family. A family that has one of these
# needs its own translation before its layers can be renumbered.
_INDEX_VALUED = (
    "attn_layer_offset",
    "attn_layer_period",
    "cross_attention_layers",
    "decoder_sparse_step",
    "expert_layer_period",
    "first_k_dense_replace",
    "full_attn_idxs",
    "interleave_moe_layer_step",
    "moe_layers",
    "num_kv_shared_layers",
)


@dataclass(frozen=True)
class LayerShape:
    """What one layer of the new model has.

    Attributes:
        source: the index of this layer in the model as it is now.
        num_heads: query heads it keeps.
        num_kv_heads: key/value heads it keeps.
        intermediate_size: MLP units it keeps.
        skip: sub-layers it does not have ("attention", "mlp").
    """

    source: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    skip: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rung:
    """Who can load a checkpoint, and why it needs no more and no less.

    Attributes:
        name: "stock" (unchanged class), "relabel" (a stock class of another family that computes the same) or
            "hf_cka" (the classes of this package, or the file that travels with the checkpoint).
        model_type: what `config.json` will say.
        reason: why the rung before this one cannot express the structure; empty for "stock".
    """

    name: Literal["stock", "relabel", "hf_cka"]
    model_type: str
    reason: str = ""


def layer_shapes(family: Family, config: Any) -> list[LayerShape]:
    """Return the shape of every layer that a config describes.

    Args:
        family: the entry of the table.
        config: the config of the layers.

    Example:
        >>> from hf_cka.anatomy import FAMILIES
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, intermediate_size=16)
        >>> layer_shapes(FAMILIES["llama"], config)[1]
        LayerShape(source=1, num_heads=2, num_kv_heads=2, intermediate_size=16, skip=())
    """
    shapes = []
    for index in range(config.num_hidden_layers):
        sizes = config_sizes(family, config, index)
        layer = config.per_layer_config[index] if config.is_heterogeneous else config
        skip = tuple(getattr(layer, "skip", None) or ())
        shapes.append(LayerShape(index, sizes.num_heads, sizes.num_kv_heads, sizes.intermediate_size, skip))
    return shapes


def reshaped_config(family: Family, config: Any, shapes: Sequence[LayerShape]) -> Any:
    """Return the config of a model whose layers have the given shapes: of the stock class where that can say it.

    Args:
        family: the entry of the table.
        config: the config as it is now; not changed.
        shapes: the layers that stay, in order.

    Raises:
        ValueError: if the layers cannot be renumbered because something in the config depends on their index.
        ImportError: if a decoder loses attention and transformers is older than 5.23; see `require_caches`.
    """
    check_renumbering(family, config, [shape.source for shape in shapes])
    stock = getattr(type(config), "stock_class", type(config))
    new = copy.deepcopy(config)
    new.per_layer_config = None
    new.__class__ = stock
    for name in ("base_model_type", "hf_cka_layout", "auto_map", "allow_global_per_layer_attribute_access"):
        new.__dict__.pop(name, None)
    kept = [shape.source for shape in shapes]
    for name in family.layer_lists:
        if getattr(new, name, None) is not None:
            setattr(new, name, [getattr(config, name)[source] for source in kept])
    for name in family.layer_counts:
        if getattr(new, name, None) is not None:
            setattr(new, name, sum(source < getattr(config, name) for source in kept))
    new.num_hidden_layers = len(shapes)

    uniform = _uniform(family, new, shapes)
    if uniform is not None and not _rejection(uniform):
        return uniform
    from hf_cka.modeling import modeling_hf_cka as code

    code.require_caches(family.to_dict(), [shape.skip for shape in shapes])
    new.__class__ = code.config_class(stock.model_type)
    new.base_model_type = stock.model_type
    new.hf_cka_layout = family.to_dict()
    new.auto_map = code.auto_map(stock.model_type)
    new.allow_global_per_layer_attribute_access = True
    new.per_layer_config = {i: _overrides(family, shape) for i, shape in enumerate(shapes)}
    return new


def _overrides(family: Family, shape: LayerShape) -> dict[str, Any]:
    own: dict[str, Any] = {"skip": sorted(shape.skip)} if shape.skip else {}
    if "attention" not in shape.skip:
        own[family.heads] = shape.num_heads
        if family.kv_heads:
            own[family.kv_heads] = shape.num_kv_heads
    if "mlp" not in shape.skip:
        own[family.intermediate] = shape.intermediate_size
    return own


def _uniform(family: Family, config: Any, shapes: Sequence[LayerShape]) -> Any:
    """The stock config, where all layers are alike and its fields can say so; else None."""
    first = replace(shapes[0], source=0)
    if first.skip or any(replace(shape, source=0) != first for shape in shapes):
        return None
    new = copy.deepcopy(config)
    before = config_sizes(family, config, 0)
    if before.num_heads != first.num_heads:
        if not family.head_dim:
            return None
        setattr(new, family.head_dim, before.head_dim)  # else it would follow the number of heads
        setattr(new, family.heads, first.num_heads)
    if family.kv_heads:
        setattr(new, family.kv_heads, first.num_kv_heads)
    if before.intermediate_size != first.intermediate_size:
        setattr(new, family.intermediate, first.intermediate_size)
    return new


def _rejection(config: Any) -> str:
    """Why the config class does not accept its own values, or ""."""
    try:
        type(config).from_dict(config.to_dict()).validate()
    except Exception as error:  # strict validators raise their own types
        return str(error).strip().splitlines()[-1].strip()
    return ""


def check_renumbering(family: Family, config: Any, kept: Sequence[int]) -> None:
    """Raise where removing layers would change the meaning of something that names layers by index.

    Args:
        family: the entry of the table.
        config: the config of the layers.
        kept: indices of the layers that stay.

    Raises:
        ValueError: naming the field, its value and the layers.
    """
    if list(kept) == list(range(config.num_hidden_layers)):
        return
    for name in _INDEX_VALUED:
        value = getattr(config, name, None)
        if value and name not in family.layer_counts:
            raise ValueError(
                f"Cannot remove layers: {type(config).__name__}.{name}={value!r} names layers by index, and hf_cka "
                f"has no translation of it for {family.name!r}. Remove attention or MLP sub-layers, or units, instead."
            )
    for name in family.index_dependent:
        if getattr(config, name, False):
            raise ValueError(
                f"Cannot remove layers: with {name}=True each layer computes with its own index. Remove attention or "
                "MLP sub-layers, or units, instead."
            )
    special = family.first_layer_special
    if kept[0] != 0 and special is not None and (special == "always" or getattr(config, special, None)):
        raise ValueError(
            f"Cannot remove layer 0 of {family.name!r}: it is built unlike the others"
            + ("" if special == "always" else f" ({special}={getattr(config, special)!r})")
            + ". Leave layer 0 in the plan's model."
        )


def rung_of(family: Family, config: Any) -> Rung:
    """Say which rung of the ladder the config of a pruned model needs.

    Args:
        family: the entry of the table.
        config: the config as `apply_plan` leaves it.

    Example:
        >>> from hf_cka.anatomy import FAMILIES
        >>> from transformers import LlamaConfig
        >>> rung_of(FAMILIES["llama"], LlamaConfig()).name
        'stock'
    """
    base = getattr(config, "base_model_type", None)
    if base is None:
        return Rung("stock", config.model_type)
    shapes = layer_shapes(family, config)
    stock = copy.deepcopy(config)
    stock.per_layer_config = None
    stock.__class__ = type(config).stock_class
    uniform = _uniform(family, stock, shapes)
    if uniform is None:
        skips = sum(bool(shape.skip) for shape in shapes)
        if skips:
            reason = f"{skips} of {len(shapes)} layers have no attention or no MLP, and stock layers always have both"
        elif len({(s.num_heads, s.num_kv_heads, s.intermediate_size) for s in shapes}) > 1:
            reason = "the layers have different widths, and a stock config knows one width for all layers"
        else:
            reason = f"{type(stock).__name__} fixes the width of a head at hidden_size / heads"
        return Rung("hf_cka", config.model_type, reason)
    reason = f"{type(stock).__name__} rejects these sizes: {_rejection(uniform)}"
    if base == "llama" and not (config.attention_bias or config.mlp_bias):
        return Rung("relabel", "mistral", reason)
    return Rung("hf_cka", config.model_type, reason)


def relabelled_config(family: Family, config: Any) -> Any:
    """Return the Mistral config that computes the same as a bias-free Llama with any number of heads.

    Args:
        family: the entry of the table.
        config: the config of a model on the "relabel" rung.
    """
    from transformers import MistralConfig

    shape = layer_shapes(family, config)[0]
    fields = config.to_dict()
    for name in (
        "architectures",
        "allow_global_per_layer_attribute_access",
        "attention_bias",
        "auto_map",
        "base_model_type",
        "hf_cka_layout",
        "layer_types",  # transformers reads a mistral config with layer_types as another family
        "mlp_bias",
        "model_type",
        "per_layer_config",
        "pretraining_tp",
        "transformers_version",
    ):
        fields.pop(name, None)
    fields |= {
        "head_dim": config_sizes(family, config, 0).head_dim,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "sliding_window": None,
    }
    return MistralConfig.from_dict(fields)
