"""The table of families: where each architecture keeps its parts. Data only.

A path is dotted and relative to the layer, except `layers`, `final_norm` and `embedding`, which are relative to the
backbone (the module that turns `input_ids` into hidden states). To add a family, add one entry, and one row to
`tests/tiny.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal


def _frozen(**items: str) -> Mapping[str, str]:
    return MappingProxyType(items)


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps its parts.

    Attributes:
        name: the `model_type` of the config that describes the layers.
        kind: "decoder" (causal) or "encoder".
        layers: the `ModuleList` of layers, relative to the backbone.
        attention: the attention module.
        attention_core: the part of it that mixes tokens, where the rest belongs to the residual stream.
        mlp: the MLP module, or None where the MLP is several modules of the layer.
        projections: role (q, k, v, qkv, o, gate, up, gate_up, down) -> path.
        position_projections: further projections whose rows follow the heads.
        attention_norms: norms inside the attention branch, which go when the attention goes.
        mlp_norms: norms inside the MLP branch.
        stream_norms: norms on the residual stream itself, or shared by both branches: they stay.
        query_key_norms: norms of queries and keys (path of the query's, path of the key's).
        norm_scope: whether query/key norms span one "head" or "all" heads; None without such norms.
        qkv_layout: how a fused projection orders its rows: "split" (not fused), "concat" (all queries, all keys, all
            values) or "interleaved" (query, key, value of each head in turn).
        transposed: weights are stored as (in, out), as `Conv1D` does.
        final_norm: after the last layer, relative to the backbone, or None.
        embedding: the token embedding, relative to the backbone.
        heads, kv_heads, intermediate: names of the config fields; `kv_heads` is None without grouped attention.
        head_dim: the config field that sets the width of a head freely; None where the width is always
            hidden_size / heads, so that no stock config can hold fewer heads of the same width.
        attention_sizes: attributes of `attention_core` that hold a size, and the size: "heads", "kv_heads",
            "groups" (query heads per KV head), "query_width" (heads times head_dim).
        config_in_forward: the attention reads head counts from its config in every forward pass.
        layer_lists: config fields that hold one entry per layer.
        layer_counts: config fields that hold the number of leading layers to which something applies.
        index_dependent: config flags that make a layer depend on its index, so that layers cannot be renumbered.
        first_layer_special: "always", or the config field that makes the first layer unlike the others, so that it
            cannot be removed; None where all layers are alike.
    """

    name: str
    kind: Literal["decoder", "encoder"] = "decoder"
    layers: str = "layers"
    attention: str = "self_attn"
    attention_core: str = "self_attn"
    mlp: str | None = "mlp"
    projections: Mapping[str, str] = field(
        default_factory=lambda: _frozen(
            q="self_attn.q_proj",
            k="self_attn.k_proj",
            v="self_attn.v_proj",
            o="self_attn.o_proj",
            gate="mlp.gate_proj",
            up="mlp.up_proj",
            down="mlp.down_proj",
        )
    )
    position_projections: tuple[str, ...] = ()
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)
    stream_norms: tuple[str, ...] = ()
    query_key_norms: tuple[str, ...] = ()
    norm_scope: Literal["head", "all"] | None = None
    qkv_layout: Literal["split", "concat", "interleaved"] = "split"
    transposed: bool = False
    final_norm: str | None = "norm"
    embedding: str = "embed_tokens"
    heads: str = "num_attention_heads"
    kv_heads: str | None = "num_key_value_heads"
    head_dim: str | None = "head_dim"
    intermediate: str = "intermediate_size"
    attention_sizes: Mapping[str, str] = field(default_factory=lambda: _frozen(num_key_value_groups="groups"))
    config_in_forward: bool = False
    layer_lists: tuple[str, ...] = ()
    layer_counts: tuple[str, ...] = ()
    index_dependent: tuple[str, ...] = ()
    first_layer_special: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as plain data, for a checkpoint that must describe itself.

        Example:
            >>> FAMILIES["llama"].to_dict()["projections"]["o"]
            'self_attn.o_proj'
        """
        return {
            key: dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value
            for key, value in vars(self).items()
        }


LLAMA = Family(name="llama")

_QWEN = replace(LLAMA, layer_lists=("layer_types",), layer_counts=("max_window_layers",))
_GEMMA2 = replace(
    LLAMA,
    attention_norms=("input_layernorm", "post_attention_layernorm"),
    mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    layer_lists=("layer_types",),
)
_QUERY_KEY_NORMS = ("self_attn.q_norm", "self_attn.k_norm")

_BERT = Family(
    name="bert",
    kind="encoder",
    layers="encoder.layer",
    attention="attention",
    attention_core="attention.self",
    mlp=None,
    projections=_frozen(
        q="attention.self.query",
        k="attention.self.key",
        v="attention.self.value",
        o="attention.output.dense",
        up="intermediate.dense",
        down="output.dense",
    ),
    attention_norms=(),
    mlp_norms=(),
    stream_norms=("attention.output.LayerNorm", "output.LayerNorm"),
    final_norm=None,
    embedding="embeddings.word_embeddings",
    kv_heads=None,
    head_dim=None,
    attention_sizes=_frozen(num_attention_heads="heads", all_head_size="query_width"),
)

_ENTRIES: tuple[Family, ...] = (
    LLAMA,
    replace(LLAMA, name="mistral"),
    replace(_QWEN, name="qwen2"),
    replace(_QWEN, name="qwen3", query_key_norms=_QUERY_KEY_NORMS, norm_scope="head"),
    replace(LLAMA, name="gemma"),
    replace(_GEMMA2, name="gemma2"),
    replace(_GEMMA2, name="gemma3_text", query_key_norms=_QUERY_KEY_NORMS, norm_scope="head"),
    Family(
        name="phi",
        projections=_frozen(
            q="self_attn.q_proj",
            k="self_attn.k_proj",
            v="self_attn.v_proj",
            o="self_attn.dense",
            up="mlp.fc1",
            down="mlp.fc2",
        ),
        attention_norms=(),
        mlp_norms=(),
        stream_norms=("input_layernorm",),
        # present only with `qk_layernorm`
        query_key_norms=("self_attn.q_layernorm", "self_attn.k_layernorm"),
        norm_scope="head",
        final_norm="final_layernorm",
    ),
    replace(
        LLAMA,
        name="phi3",
        projections=_frozen(
            qkv="self_attn.qkv_proj", o="self_attn.o_proj", gate_up="mlp.gate_up_proj", down="mlp.down_proj"
        ),
        qkv_layout="concat",
        attention_sizes=_frozen(num_key_value_groups="groups", num_key_value_heads="kv_heads"),
        config_in_forward=True,
    ),
    replace(
        LLAMA,
        name="olmo2",
        attention_norms=("post_attention_layernorm",),
        mlp_norms=("post_feedforward_layernorm",),
        query_key_norms=_QUERY_KEY_NORMS,
        norm_scope="all",
    ),
    replace(LLAMA, name="smollm3", layer_lists=("layer_types", "no_rope_layers")),
    replace(LLAMA, name="granite"),
    Family(
        name="gpt2",
        layers="h",
        attention="attn",
        attention_core="attn",
        projections=_frozen(qkv="attn.c_attn", o="attn.c_proj", up="mlp.c_fc", down="mlp.c_proj"),
        attention_norms=("ln_1",),
        mlp_norms=("ln_2",),
        qkv_layout="concat",
        transposed=True,
        final_norm="ln_f",
        embedding="wte",
        heads="n_head",
        kv_heads=None,
        head_dim=None,
        intermediate="n_inner",
        attention_sizes=_frozen(num_heads="heads", split_size="query_width"),
        index_dependent=("scale_attn_by_inverse_layer_idx",),
    ),
    Family(
        name="gpt_neox",
        attention="attention",
        attention_core="attention",
        projections=_frozen(
            qkv="attention.query_key_value", o="attention.dense", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"
        ),
        qkv_layout="interleaved",
        final_norm="final_layer_norm",
        embedding="embed_in",
        kv_heads=None,
        head_dim=None,
        attention_sizes=_frozen(),
    ),
    Family(
        name="opt",
        layers="decoder.layers",
        mlp=None,
        projections=_frozen(
            q="self_attn.q_proj",
            k="self_attn.k_proj",
            v="self_attn.v_proj",
            o="self_attn.out_proj",
            up="fc1",
            down="fc2",
        ),
        # opt-350m normalises after the residual sum; `find_anatomy` moves these norms to the stream there
        attention_norms=("self_attn_layer_norm",),
        mlp_norms=("final_layer_norm",),
        final_norm="decoder.final_layer_norm",
        embedding="decoder.embed_tokens",
        kv_heads=None,
        head_dim=None,
        intermediate="ffn_dim",
        attention_sizes=_frozen(num_heads="heads"),
    ),
    _BERT,
    replace(_BERT, name="roberta"),
    Family(
        name="distilbert",
        kind="encoder",
        layers="transformer.layer",
        attention="attention",
        attention_core="attention",
        mlp="ffn",
        projections=_frozen(
            q="attention.q_lin",
            k="attention.k_lin",
            v="attention.v_lin",
            o="attention.out_lin",
            up="ffn.lin1",
            down="ffn.lin2",
        ),
        attention_norms=(),
        mlp_norms=(),
        stream_norms=("sa_layer_norm", "output_layer_norm"),
        final_norm=None,
        embedding="embeddings.word_embeddings",
        heads="n_heads",
        kv_heads=None,
        head_dim=None,
        intermediate="hidden_dim",
        attention_sizes=_frozen(n_heads="heads"),
    ),
    replace(
        _BERT,
        name="deberta-v2",
        projections=_frozen(
            q="attention.self.query_proj",
            k="attention.self.key_proj",
            v="attention.self.value_proj",
            o="attention.output.dense",
            up="intermediate.dense",
            down="output.dense",
        ),
        # present unless `share_att_key`
        position_projections=("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
        # a convolution follows the first layer
        first_layer_special="conv_kernel_size",
    ),
    Family(
        name="modernbert",
        kind="encoder",
        attention="attn",
        attention_core="attn",
        projections=_frozen(qkv="attn.Wqkv", o="attn.Wo", gate_up="mlp.Wi", down="mlp.Wo"),
        attention_norms=("attn_norm",),
        mlp_norms=("mlp_norm",),
        qkv_layout="concat",
        final_norm="final_norm",
        embedding="embeddings.tok_embeddings",
        kv_heads=None,
        head_dim=None,
        layer_lists=("layer_types",),
        attention_sizes=_frozen(),
        # the first layer has no norm before its attention
        first_layer_special="always",
    ),
)

#: model_type -> Family
FAMILIES: Mapping[str, Family] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
