"""Find the parts of one model: from the table of families, or from its structure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hf_cka.anatomy.families import FAMILIES, LLAMA, Family
from hf_cka.lookup import lookup

if TYPE_CHECKING:
    from torch import nn

# What the structural fallback looks for in each layer.
_LLAMA_SHAPE = tuple(LLAMA.projections.values())
# Config fields of other families that hold one entry per layer; the fallback cuts them with the layers.
_KNOWN_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type", "layer_rope_theta")


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of one layer; 0 where the sub-layer was removed.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key/value heads.
        head_dim: width of one head.
        intermediate_size: units of the MLP.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int


def _get(module: Any, path: str) -> Any:
    """`module.a.b.0` by dotted path, through PEFT wrappers as well; None where it does not exist."""
    for part in path.split("."):
        module = getattr(module, part, None)
        if module is None:
            return None
    return module


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model.

    Attributes:
        model: the model that was handed in, unwrapped from PEFT, DDP and `torch.compile`.
        family: the entry of the table, or the one made from the structure.
        backbone: the module that turns `input_ids` into hidden states.
        backbone_path: its dotted path in `model` ("" where the model is a bare backbone).
        config: the config that describes the layers.
    """

    model: nn.Module
    family: Family
    backbone: nn.Module
    backbone_path: str
    config: Any

    @property
    def kind(self) -> str:
        """ "decoder" or "encoder"."""
        return self.family.kind

    @property
    def layers_path(self) -> str:
        """Dotted path of the list of layers in `model`, e.g. "model.layers"."""
        return ".".join(filter(None, (self.backbone_path, self.family.layers)))

    @property
    def layers(self) -> nn.ModuleList:
        """The list of layers."""
        return _get(self.backbone, self.family.layers)

    @property
    def num_layers(self) -> int:
        """Number of layers the model has now."""
        return len(self.layers)

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm after the last layer, or None."""
        return _get(self.backbone, self.family.final_norm) if self.family.final_norm else None

    @property
    def embedding(self) -> nn.Module:
        """The token embedding."""
        return _get(self.backbone, self.family.embedding)

    @property
    def linear_names(self) -> tuple[str, ...]:
        """Paths of all projections relative to the layer, attention first."""
        return tuple(self.family.projections.values())

    def layer(self, index: int) -> nn.Module:
        """Layer `index`."""
        return self.layers[index]

    def layer_name(self, index: int) -> str:
        """Dotted path of layer `index` in `model`."""
        return f"{self.layers_path}.{index}"

    def skipped(self, index: int) -> tuple[str, ...]:
        """The sub-layers ("attention", "mlp") that layer `index` no longer has."""
        return tuple(getattr(_layer_config(self.config, index), "skip", None) or ())

    def attention(self, index: int) -> nn.Module | None:
        """The attention module of layer `index`; None where it was removed."""
        return None if "attention" in self.skipped(index) else _get(self.layer(index), self.family.attention)

    def mlp(self, index: int) -> nn.Module | None:
        """The MLP module of layer `index`; None where it was removed or is several modules of the layer."""
        if self.family.mlp is None or "mlp" in self.skipped(index):
            return None
        return _get(self.layer(index), self.family.mlp)

    def projections(self, index: int) -> dict[str, str]:
        """Role -> path relative to the layer, of the projections that layer `index` has."""
        skipped = self.skipped(index)
        gone = {r for r in self.family.projections if ("mlp" if r in _MLP_ROLES else "attention") in skipped}
        return {role: path for role, path in self.family.projections.items() if role not in gone}

    def sizes(self, index: int) -> LayerSizes:
        """Sizes of layer `index`, from the config (a quantized weight does not show its shape)."""
        return config_sizes(self.family, self.config, index)


_MLP_ROLES = frozenset({"gate", "up", "gate_up", "down"})


def _layer_config(config: Any, index: int) -> Any:
    return config.per_layer_config[index] if getattr(config, "is_heterogeneous", False) else config


def config_sizes(family: Family, config: Any, index: int) -> LayerSizes:
    """Return the sizes of layer `index` that a config describes.

    Args:
        family: the entry of the table.
        config: the config of the layers.
        index: which layer.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
        >>> config_sizes(FAMILIES["llama"], config, 0)
        LayerSizes(num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48)
    """
    layer = _layer_config(config, index)
    skipped = getattr(layer, "skip", None) or ()
    heads = getattr(layer, family.heads)
    head_dim = getattr(config, family.head_dim, None) if family.head_dim else None
    if head_dim is None:
        # the width of a head comes from the head count the model was built with, which stays in the global field
        head_dim = config.hidden_size // config._getattr_without_heterogeneous_validation(family.heads)
    kv_heads = getattr(layer, family.kv_heads, None) if family.kv_heads else None
    units = getattr(layer, family.intermediate)
    units = 4 * config.hidden_size if units is None else units  # gpt2 leaves n_inner out
    return LayerSizes(
        num_heads=0 if "attention" in skipped else heads,
        num_kv_heads=0 if "attention" in skipped else (kv_heads if kv_heads is not None else heads),
        head_dim=head_dim,
        intermediate_size=0 if "mlp" in skipped else units,
    )


def find_anatomy(model: nn.Module) -> Anatomy:
    """Find where a model keeps its layers, attention, MLP, projections and norms.

    Args:
        model: a `PreTrainedModel` with any head, a bare backbone, or either inside PEFT, DDP or `torch.compile`.

    Raises:
        ValueError: if no layers are recognised, or more than one tower has some; the message says what was looked
            for and which families are known.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     num_hidden_layers=2, hidden_size=8, intermediate_size=16, num_attention_heads=2, vocab_size=16
        ... )
        >>> anatomy = find_anatomy(LlamaForCausalLM(config))
        >>> anatomy.layers_path, anatomy.num_layers
        ('model.layers', 2)
        >>> anatomy.linear_names[:2]
        ('self_attn.q_proj', 'self_attn.k_proj')
    """
    model = unwrap(model)
    found: list[Anatomy] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{a.backbone_path}." if a.backbone_path else "") for a in found):
            continue  # inside a tower that is already known
        config = getattr(module, "config", None)
        family = FAMILIES.get(_family_name(config)) if config is not None else None
        if family is not None and _resolves(module, family):
            found.append(Anatomy(model, _variant(family, config), module, path, config))
    if not found:
        found = list(_by_structure(model))
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{type(model).__name__} has layers in {len(found)} towers: "
            + ", ".join(f"{a.backbone_path!r} ({a.family.name})" for a in found)
            + ". Pass one of these modules instead of the whole model."
        )
    raise ValueError(
        f"No layers were recognised in {type(model).__name__} (model_type "
        f"{getattr(getattr(model, 'config', None), 'model_type', None)!r}). Looked for the families "
        f"{', '.join(sorted(FAMILIES))}, and for a ModuleList whose layers all have {', '.join(_LLAMA_SHAPE)}. "
        "To support another family, add an entry to hf_cka/anatomy/families.py."
    )


def family_of_config(config: Any) -> Family:
    """Return the entry for a config, where there is no model to look at.

    Args:
        config: the config of the layers (for a model with several towers, that of the text model).

    Raises:
        ValueError: if the family is not in the table.

    Example:
        >>> from transformers import BertConfig
        >>> family_of_config(BertConfig()).kind
        'encoder'
    """
    return _variant(lookup(FAMILIES, _family_name(config), "family"), config)


def unwrap(model: nn.Module, keep_adapters: bool = False) -> nn.Module:
    """Return the model inside `torch.compile`, DDP and PEFT; told by what they have, so that none needs importing.

    Args:
        model: wrapped or not.
        keep_adapters: stop at a `PeftModel` instead of returning what is in it.

    Example:
        >>> from torch import nn
        >>> linear = nn.Linear(2, 2)
        >>> unwrap(linear) is linear
        True
    """
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            if keep_adapters:
                return model
            model = model.get_base_model()  # type: ignore[operator]
        elif hasattr(model, "module") and hasattr(model, "device_ids"):
            model = model.module  # type: ignore[assignment]
        else:
            return model


def _family_name(config: Any) -> str:
    """The `model_type`, or that of the stock model a pruned one was made from."""
    return str(getattr(config, "base_model_type", None) or getattr(config, "model_type", ""))


def _resolves(module: nn.Module, family: Family) -> bool:
    layers = _get(module, family.layers)
    return layers is not None and len(layers) > 0 and _get(module, family.embedding) is not None


def _variant(family: Family, config: Any) -> Family:
    """The entry adjusted to a setting of the config that moves parts."""
    if family.name == "opt" and not config.do_layer_norm_before:
        # opt-350m normalises after the residual sum
        norms = family.attention_norms + family.mlp_norms
        return replace(family, attention_norms=(), mlp_norms=(), stream_norms=norms, final_norm=None)
    if family.name == "phi" and config.qk_layernorm:
        return replace(family, head_dim=None)  # these norms are built hidden_size / heads wide
    return family


def _by_structure(model: nn.Module) -> Iterator[Anatomy]:
    """Towers that are shaped like Llama although their family is not in the table."""
    from torch import nn

    for path, module in model.named_modules():
        layers = getattr(module, "layers", None)
        config = getattr(module, "config", None)
        if not isinstance(layers, nn.ModuleList) or len(layers) == 0 or config is None:
            continue
        alike = all(_get(layer, name) is not None for layer in layers for name in _LLAMA_SHAPE)
        if not alike or len({type(layer) for layer in layers}) > 1 or _get(module, LLAMA.embedding) is None:
            continue
        first = layers[0]
        norms = tuple(name for name, child in first.named_children() if "norm" in name.lower())
        attention_norms, mlp_norms = _branch_norms(norms)
        head_norms = tuple(p for p in ("self_attn.q_norm", "self_attn.k_norm") if _get(first, p) is not None)
        family = replace(
            LLAMA,
            name=config.model_type,
            attention_norms=attention_norms,
            mlp_norms=mlp_norms,
            stream_norms=tuple(n for n in norms if n not in attention_norms + mlp_norms),
            query_key_norms=head_norms,
            norm_scope=_norm_scope(first, head_norms, config),
            final_norm="norm" if getattr(module, "norm", None) is not None else None,
            head_dim="head_dim" if getattr(config, "head_dim", None) is not None else None,
            layer_lists=tuple(
                name
                for name in _KNOWN_LAYER_LISTS
                if isinstance(getattr(config, name, None), list) and len(getattr(config, name)) == len(layers)
            ),
        )
        yield Anatomy(model, family, module, path, config)


def _branch_norms(norms: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which norms belong to which branch, by the three naming schemes in use."""
    for scheme in (FAMILIES["gemma2"], FAMILIES["olmo2"], LLAMA):
        if set(scheme.attention_norms + scheme.mlp_norms) == set(norms):
            return scheme.attention_norms, scheme.mlp_norms
    return (), ()


def _norm_scope(layer: nn.Module, paths: tuple[str, ...], config: Any) -> Any:
    if not paths:
        return None
    weight = _get(layer, f"{paths[0]}.weight")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return "head" if weight is None or weight.shape[-1] == head_dim else "all"
