"""What the experiment cannot see, one row a `model_type`: the only table of the anatomy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from hf_cka.anatomy.parts import Layer


@dataclass(frozen=True)
class Override:
    """What is said about the layers of a model instead of what was found.

    Attributes:
        stays: part -> why it stays though it seemed removable. A part is the name of a branch ("attention"), of a width
            ("heads"), or the class of a layer ("MllamaCrossAttentionDecoderLayer") for the layer as a whole.
        not_adapted: last names of projections that take no adapter.
    """

    stays: Mapping[str, str] = field(default_factory=dict)
    not_adapted: tuple[str, ...] = ()


# Fused kernels read these weights without calling their modules, so that an adapter around them would be lost; PEFT
# refuses them for these model types.
_FUSED = Override(not_adapted=("out_proj", "conv1d"))
_CONVERTED = Override(
    stays={"heads": "a checkpoint stores its projections rearranged by the number of heads in the config"}
)
OVERRIDES: dict[str, Override] = {
    "falcon_h1": _FUSED,
    "falcon_mamba": _FUSED,
    "kimi_k25": _CONVERTED,
    "mamba": _FUSED,
    "mamba2": _FUSED,
    "mistral_large4": _CONVERTED,
    "mllama_text_model": Override(
        stays={"MllamaCrossAttentionDecoderLayer": "generation asks its cache whether there was a picture"}
    ),
    "nemotron_h": _FUSED,
    "rwkv": Override(stays={"heads": "the model keeps a state of the width that its config names for every layer"}),
    "qwen4_exp_text": Override(stays={"attention": "its layer of the cache serves a convolution as well"}),
}


def overridden(layer: Layer, kind: str, model_types: Iterable[str]) -> Layer:
    """Return a layer with what the table says.

    Args:
        layer: as found.
        kind: the name of its class.
        model_types: of the model, and of the part of it that the layer is in.

    Example:
        >>> layer = Layer("backbone.layers.0", linears=("mixer.in_proj", "mixer.out_proj"))
        >>> overridden(layer, "MambaBlock", ["mamba"]).linears
        ('mixer.in_proj',)
    """
    for row in (OVERRIDES[t] for t in dict.fromkeys(model_types) if t in OVERRIDES):
        layer = replace(
            layer,
            reason=layer.reason or row.stays.get(kind, ""),
            branches=tuple(replace(b, reason=b.reason or row.stays.get(b.name, "")) for b in layer.branches),
            widths=tuple(replace(w, reason=w.reason or row.stays.get(w.name, "")) for w in layer.widths),
            linears=tuple(n for n in layer.linears if n.rpartition(".")[2] not in row.not_adapted),
        )
    return layer
