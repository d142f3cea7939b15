"""Checkpoints of the first format, read as those of the second: sizes per layer become slices of the stock model.

Such a config says per layer what is skipped and how many heads and units there are. Where the parts of a layer lie is
not taken from it, but measured on the stock class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers

from hf_cka.anatomy import Layer, Width
from hf_cka.anatomy.model import findings_of
from hf_cka.modeling import modeling_hf_cka as code
from hf_cka.modeling.structure import pruned_config

_OWN = (
    "hf_cka_layout",
    "per_layer_config",
    "allow_global_per_layer_attribute_access",
    "auto_map",
    "base_model_type",
    "model_type",
)


def upgraded(config: Mapping[str, Any]) -> Any:
    """Return the config of the second format for the content of a `config.json` of the first.

    Args:
        config: with "base_model_type", "per_layer_config" and "architectures".

    Raises:
        ValueError: for a stock class that transformers does not have, or sizes that its layers do not have.
    """
    names = config.get("architectures") or [""]
    stock = getattr(transformers, code.stock_name(str(names[0])), None)
    if not isinstance(stock, type) or not hasattr(stock, "config_class"):
        raise ValueError(f"architectures={names!r} names no model of transformers.")
    dense = stock.config_class.from_dict({k: v for k, v in config.items() if k not in _OWN})
    stack = findings_of(stock, dense).stacks[0]
    table = {int(i): own for i, own in (config.get("per_layer_config") or {}).items()}
    strange = [i for i in table if not 0 <= i < len(stack.layers)]
    if strange:
        raise ValueError(f"per_layer_config names layers {strange}, but the model has {len(stack.layers)}.")
    removed: list[dict[str, Any]] = []
    narrowed: dict[str, dict[str, Any]] = {}
    uncached: list[int] = []
    for i, own in sorted(table.items()):
        layer = stack.layers[i]
        for name in own.get("skip") or ():
            branch = layer.branch(name)
            if branch is None:
                raise ValueError(f"per_layer_config[{i}] skips {name!r}, which the layer does not have.")
            for module, returns in branch.modules:
                form = None if returns is None else list(returns)
                removed.append({"module": f"{layer.path}.{module}", "kind": "branch", "returns": form})
            if name == "attention" and stack.causal:
                uncached.append(i)
        for width, left in _left(layer, own):
            entry = narrowed.setdefault(repr(width.data()), {**width.data(), "kept": {}})
            entry["kept"][layer.path] = code.as_ranges(range(left))
    structure: dict[str, Any] = {"version": code.VERSION, "removed": removed, "narrowed": list(narrowed.values())}
    return pruned_config(dense, structure | ({"uncached": uncached} if uncached else {}))


def _left(layer: Layer, own: Mapping[str, Any]) -> list[tuple[Width, int]]:
    """The widths of a layer that are smaller, and how many members are left; the weights are cut already."""
    skipped = own.get("skip") or ()
    counts = {k: v for k, v in own.items() if type(v) is int}
    heads = next((v for k, v in counts.items() if "key_value" in k), None)
    if heads is None:
        heads = next((v for k, v in counts.items() if "head" in k), None)
    units = next((v for k, v in counts.items() if "head" not in k), None)
    found = []
    for kind, branch, left in (("heads", "attention", heads), ("units", "mlp", units)):
        width = layer.width(kind)
        if left is None or branch in skipped or width is None or left == width.members:
            continue
        if not 0 < left < width.members:
            raise ValueError(f"per_layer_config says {left} {kind}, but layer {layer.path!r} has {width.members}.")
        found.append((width, left))
    return found
