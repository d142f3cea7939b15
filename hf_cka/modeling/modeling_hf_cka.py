"""Models whose layers differ: removed attention or MLP, fewer KV groups or MLP units in some layers.

This file needs torch and transformers only, so that it can travel with a checkpoint: transformers runs it with
`trust_remote_code=True` where the hf_cka package is not installed. It makes, for any stock class `XForCausalLM`, the
class `PrunedXForCausalLM`: the stock model is built at the sizes of the global config (on the meta device while
loading, so that costs nothing), then every layer is cut to `config.per_layer_config[i]`. Where the parts of a layer
are is in the config too (`hf_cka_layout`), so that this file knows no family.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from huggingface_hub.dataclasses import strict
from packaging.version import parse
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.utils import output_capturing

MODEL_TYPE = "hf_cka"
PREFIX = "Pruned"

# the auto classes that can load a pruned checkpoint
_HEADS = {
    "AutoModel": "MODEL_MAPPING",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
}


# ---- what stands where a part was removed (no class here may be named *Attention*: transformers reads this source
# to decide whether the attention implementation can be switched) ----


class Zeros(nn.Module):
    """Stands for a branch that was removed: it adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class NoMixing(nn.Module):
    """Stands for an attention module that was removed; it writes nothing to the KV cache."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class LayerConfig:
    """The shared config as one layer sees it: some values are the layer's own, the rest follows the shared one."""

    def __init__(self, shared: Any, **own: Any) -> None:
        self.__dict__.update(own, _shared=shared)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_shared":
            raise AttributeError(name)
        return getattr(self._shared, name)


# ---- cutting one layer ----


def part(module: Any, path: str) -> Any:
    """`module.a.b` by dotted path, or None."""
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return None
    return module


def _replace(layer: nn.Module, path: str, module: nn.Module) -> None:
    if part(layer, path) is None:
        return
    parent, _, name = path.rpartition(".")
    setattr(part(layer, parent) if parent else layer, name, module)


def keep(module: Any, index: torch.Tensor, outputs: bool, transposed: bool) -> None:
    """Keep the given outputs (or inputs) of a projection or a norm, as new parameters.

    Args:
        module: changed in place.
        index: which outputs or inputs stay, ascending.
        outputs: whether these are outputs.
        transposed: whether weights are stored as (in, out).
    """
    for name in ("weight", "bias"):
        old = getattr(module, name, None)
        if old is None or (name == "bias" and not outputs):
            continue
        axis = 0 if old.ndim == 1 or outputs != transposed else 1
        kept = old.detach().index_select(axis, index.to(old.device)).contiguous()
        setattr(module, name, nn.Parameter(kept, requires_grad=old.requires_grad))
    for name in ("out_features", "nf") if outputs else ("in_features", "nx"):
        if hasattr(module, name):
            setattr(module, name, len(index))


def _span(units: Sequence[int], width: int, start: int = 0) -> torch.Tensor:
    """Rows of the given blocks of `width` rows."""
    blocks = torch.tensor(list(units), dtype=torch.long, device="cpu")
    return (start + blocks[:, None] * width + torch.arange(width, device="cpu")[None, :]).reshape(-1)


def keep_groups(
    layer: nn.Module,
    layout: Mapping[str, Any],
    groups: Sequence[int],
    heads: int,
    kv_heads: int,
    cut: Callable[..., None] = keep,
) -> None:
    """Keep the given KV groups of a layer: each key/value head with the query heads that read it.

    Args:
        layer: the layer, changed in place.
        layout: the entry of its family, as plain data.
        groups: indices of the KV groups to keep, ascending.
        heads: query heads the layer has now.
        kv_heads: key/value heads the layer has now.
        cut: narrows one module, with whatever is attached to it.
    """
    projections, transposed = layout["projections"], layout["transposed"]
    output = part(layer, projections["o"])
    head_dim = output.weight.shape[0 if transposed else 1] // heads
    per_group = heads // kv_heads
    query, key = _span(groups, per_group * head_dim), _span(groups, head_dim)
    if layout["qkv_layout"] == "split":
        for role, rows in (("q", query), ("k", key), ("v", key)):
            cut(part(layer, projections[role]), rows, True, transposed)
    else:
        if layout["qkv_layout"] == "interleaved":
            rows = _span(groups, 3 * head_dim)
        else:
            starts = (heads * head_dim, (heads + kv_heads) * head_dim)
            rows = torch.cat([query, *(_span(groups, head_dim, start) for start in starts)])
        cut(part(layer, projections["qkv"]), rows, True, transposed)
    cut(output, query, False, transposed)
    for path in layout["position_projections"]:
        if (module := part(layer, path)) is not None:
            cut(module, query, True, transposed)
    if layout["norm_scope"] == "all":
        for path, rows in zip(layout["query_key_norms"], (query, key), strict=True):
            if (module := part(layer, path)) is not None:
                cut(module, rows, True, False)
    core = part(layer, layout["attention_core"])
    left = len(groups)
    sizes = {
        "heads": left * per_group,
        "kv_heads": left,
        "groups": per_group,
        "query_width": left * per_group * head_dim,
    }
    for attribute, size in layout["attention_sizes"].items():
        setattr(core, attribute, sizes[size])


def own_config(layer: nn.Module, layout: Mapping[str, Any], heads: int, kv_heads: int) -> None:
    """Give the attention of a layer its own head counts, where it reads them from its config in every forward pass.

    Args:
        layer: the layer, changed in place.
        layout: the entry of its family, as plain data.
        heads: its query heads.
        kv_heads: its key/value heads.
    """
    core = part(layer, layout["attention_core"])
    if layout["config_in_forward"] and heads:
        shared = getattr(core.config, "_shared", core.config)
        core.config = LayerConfig(shared, **{layout["heads"]: heads, layout["kv_heads"]: kv_heads})


def keep_units(
    layer: nn.Module, layout: Mapping[str, Any], units: Sequence[int], cut: Callable[..., None] = keep
) -> None:
    """Keep the given units of a layer's MLP.

    Args:
        layer: the layer, changed in place.
        layout: the entry of its family, as plain data.
        units: indices of the units to keep, ascending.
        cut: narrows one module, with whatever is attached to it.
    """
    projections, transposed = layout["projections"], layout["transposed"]
    index = _span(units, 1)
    down = part(layer, projections["down"])
    width = down.weight.shape[0 if transposed else 1]
    for role in ("gate", "up"):
        if role in projections:
            cut(part(layer, projections[role]), index, True, transposed)
    if "gate_up" in projections:
        cut(part(layer, projections["gate_up"]), torch.cat([index, index + width]), True, transposed)
    cut(down, index, False, transposed)
    if layout["mlp"] and hasattr(part(layer, layout["mlp"]), "intermediate_size"):
        part(layer, layout["mlp"]).intermediate_size = len(index)


def skip_sublayer(layer: nn.Module, layout: Mapping[str, Any], which: str) -> None:
    """Remove the attention or the MLP of a layer, with the norms that belong to that branch alone.

    The same replacements, and the same names, as the open transformers pull request 45332, so that a checkpoint can
    move to stock code once that is released.

    Args:
        layer: the layer, changed in place.
        layout: the entry of its family, as plain data.
        which: "attention" or "mlp".
    """
    projections = layout["projections"]
    if which == "attention":
        core, output = layout["attention_core"], projections["o"]
        _replace(layer, core, NoMixing())
        if not output.startswith(f"{core}."):
            _replace(layer, output, Zeros())  # BERT: the output projection belongs to the residual stream's module
    elif layout["mlp"]:
        _replace(layer, layout["mlp"], Zeros())
    else:
        _replace(layer, projections["up"], nn.Identity())
        _replace(layer, projections["down"], Zeros())
    for path in layout[f"{which}_norms"]:
        _replace(layer, path, nn.Identity())


def require_caches(layout: Mapping[str, Any], skips: Sequence[Sequence[str]]) -> None:
    """Raise where this transformers would generate wrongly from a decoder whose layers have no attention.

    Its KV caches learned to leave layers out in 5.23; before, they took the length of the text from the first layer
    even where that layer stores nothing. Can go once 5.23 is the oldest version that is supported.

    Args:
        layout: the entry of the family, as plain data.
        skips: the sub-layers that each layer does not have.

    Raises:
        ImportError: naming the installed version and the one that is needed.
    """
    if layout["kind"] != "decoder" or not any("attention" in skip for skip in skips):
        return
    if parse(transformers.__version__).release < (5, 23):
        raise ImportError(
            f"Decoders with layers without attention need transformers >= 5.23 (installed: {transformers.__version__})"
            ": older KV caches would generate other text, without an error. Run `pip install -U transformers`."
        )


# ---- the config ----


class PrunedConfigMixin:
    """What a stock config needs to describe layers that differ."""

    model_type = MODEL_TYPE

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.base_model_type = type(self).stock_class.model_type  # type: ignore[attr-defined]
        # Code that reads a width from the global config gets the dense one; nothing in the model does.
        self.allow_global_per_layer_attribute_access = True

    @property
    def kv_sharing_modes(self) -> list[str | None]:
        """Tells the KV caches of transformers which layers store nothing ("reuse" makes a dummy cache layer)."""
        return [
            "reuse" if "attention" in (getattr(layer, "skip", None) or ()) else None
            for layer in self.per_layer_config  # type: ignore[attr-defined]
        ]

    def validate_architecture(self) -> None:
        """Replaces the check of the stock config, which knows one head count for all layers."""

    def validate_token_ids(self) -> None:
        """The check of the stock config; it reads every field, and would warn about those that differ by layer."""
        with _as_dense(self):
            super().validate_token_ids()  # type: ignore[misc]


def config_class(base_model_type: str) -> Any:
    """Return `PrunedXConfig` for the `model_type` of a stock config, and register its models."""
    stock = transformers.models.auto.configuration_auto.CONFIG_MAPPING[base_model_type]
    name = PREFIX + stock.__name__
    if name not in globals():
        body = {
            "__module__": __name__,
            "__doc__": f"A {stock.__name__} whose layers may differ.",
            "stock_class": stock,
            "_auto_class": "AutoConfig",
        }
        # `strict` collects the validators of a class when it decorates it, so the override needs a decoration
        globals()[name] = strict(type(name, (PrunedConfigMixin, stock), body))
        for auto, mapping in _HEADS.items():
            model = getattr(modeling_auto, mapping).get(stock, None)
            if isinstance(model, type):
                getattr(transformers, auto).register(globals()[name], model_class(model), exist_ok=True)
    return globals()[name]


def auto_map(base_model_type: str) -> dict[str, str]:
    """Return what `config.json` needs so that `trust_remote_code=True` finds the classes of this file."""
    stock = transformers.models.auto.configuration_auto.CONFIG_MAPPING[base_model_type]
    file = __name__.rpartition(".")[2]
    found = {"AutoConfig": f"{file}.{PREFIX}{stock.__name__}"}
    for auto, mapping in _HEADS.items():
        model = getattr(modeling_auto, mapping).get(stock, None)
        if isinstance(model, type):
            found[auto] = f"{file}.{PREFIX}{model.__name__}"
    return found


# ---- the models ----


@contextlib.contextmanager
def _as_dense(config: Any) -> Iterator[None]:
    """Hide what differs between layers while the stock code builds them all alike."""
    hidden = config.__dict__.pop("_heterogeneity_spec", None)
    try:
        yield
    finally:
        if hidden is not None:
            config._heterogeneity_spec = hidden


class PrunedModelMixin:
    """Builds the stock model, then cuts its layers to what the config says."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        with _as_dense(config):
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        _cut_to_config(self, config)


def _cut_to_config(model: Any, config: Any) -> None:
    if not config.is_heterogeneous:
        return
    layout = config.hf_cka_layout
    layers = part(model, layout["layers"])
    if layers is None:
        layers = part(getattr(model, model.base_model_prefix), layout["layers"])
    require_caches(layout, [own.skip for own in config.per_layer_config])
    heads, kv_heads = _dense_heads(config, layout)
    for layer, own in zip(layers, config.per_layer_config, strict=True):
        for which in own.skip:
            skip_sublayer(layer, layout, which)
        if "attention" not in own.skip:
            left = getattr(own, layout["kv_heads"]) if layout["kv_heads"] else getattr(own, layout["heads"])
            if left < kv_heads:
                keep_groups(layer, layout, range(left), heads, kv_heads)
            own_config(layer, layout, left * (heads // kv_heads), left)
        if "mlp" not in own.skip:
            units = getattr(own, layout["intermediate"])
            if units is not None and units < _dense_units(config, layout):
                keep_units(layer, layout, range(units))


def _dense(config: Any, name: str) -> Any:
    return config._getattr_without_heterogeneous_validation(name)


def _dense_heads(config: Any, layout: Mapping[str, Any]) -> tuple[int, int]:
    heads = _dense(config, layout["heads"])
    kv_heads = _dense(config, layout["kv_heads"]) if layout["kv_heads"] else None
    return heads, heads if kv_heads is None else kv_heads


def _dense_units(config: Any, layout: Mapping[str, Any]) -> int:
    units = _dense(config, layout["intermediate"])
    return 4 * config.hidden_size if units is None else units


def model_class(stock: type) -> type:
    """Return `PrunedX` for the stock model class `X`."""
    if issubclass(stock, PrunedModelMixin):
        return stock
    name = PREFIX + stock.__name__
    config = config_class(stock.config_class.model_type)  # type: ignore[attr-defined]
    if name not in globals():
        auto = next((a for a, m in _HEADS.items() if stock.__name__ in _values(m) and a != "AutoModel"), "AutoModel")
        body = {
            "__module__": __name__,
            "__doc__": f"A {stock.__name__} whose layers may differ.",
            "stock_class": stock,
            "config_class": config,
            "_auto_class": auto,
        }
        globals()[name] = type(name, (PrunedModelMixin, stock), body)
    return globals()[name]


def become(model: Any, cls: type) -> None:
    """Turn a model into another class of the same layout, as if it had been built as that class.

    transformers notes in `__init__`, by the name of the class, which outputs (`output_hidden_states`) it can record.

    Args:
        model: changed in place.
        cls: the stock class of the model, or the pruned one.
    """
    if type(model) is cls:
        return
    recordable = getattr(model, "_can_record_outputs", None)
    model.__class__ = cls
    dict.__setitem__(output_capturing._CAN_RECORD_REGISTRY, str(cls), recordable)


def _values(mapping: str) -> list[str]:
    return list(getattr(modeling_auto, mapping + "_NAMES").values())


def __getattr__(name: str) -> Any:
    """Make a class the first time it is asked for by name, as `auto_map` and pickle do."""
    stock = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if not isinstance(stock, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if issubclass(stock, PreTrainedConfig):
        return config_class(stock.model_type)
    return model_class(stock)
