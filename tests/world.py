"""Tiny random models of many model types, made from the defaults of transformers' own registry: for reach.

`tests/tiny.py` serves the text families that everything is tested on; this serves the rest of the world.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# what a config that has one of these fields gets
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "embedding_size", "projection_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(
        ("head_dim", "d_kv", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "attention_head_dim"), 8
    ),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), 48),
    **dict.fromkeys(("ffn_hidden_size", "intermediate_size_mlp", "dim_ff"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"), 64),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), 6),
    **dict.fromkeys(
        ("mamba_n_heads", "mamba_d_state", "state_size", "ssm_state_size", "mamba_d_head", "mamba_num_heads"), 8
    ),
    **dict.fromkeys(
        ("mamba_head_dim", "chunk_size", "mamba_chunk_size", "linear_key_head_dim", "linear_value_head_dim"), 8
    ),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank", "linear_num_value_heads"), 4),
    **dict.fromkeys(("linear_num_key_heads", "num_channels_last"), 2),
    "vocab_size": 96,
    "image_size": 32,
    "patch_size": 8,
    "num_mel_bins": 16,
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "layerdrop": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "drop_path_rate": 0.0,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "relative_attention_num_buckets": 8,
}
_MIXED = ["sliding_attention", "full_attention"] * 2
_HYBRID = ["linear_attention", "full_attention"] * 2
_SOUND = {"conv_dim": (16,) * 7, "vocab_size": 32}

CAUSAL, MASKED, SEQ2SEQ = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"
IMAGE, CTC, SPEECH = "AutoModelForImageClassification", "AutoModelForCTC", "AutoModelForSpeechSeq2Seq"
SORT, SEEING = "AutoModelForSequenceClassification", "AutoModelForImageTextToText"

# (model type, auto class) -> what differs from the above
TYPES: dict[tuple[str, str], dict[str, Any]] = {
    # grouped and fused attention, norms in other places, parallel branches, positions of every kind
    **{
        (name, CAUSAL): {} for name in ("cohere", "olmo", "olmo2", "olmo3", "helium", "seed_oss", "ernie4_5", "exaone4")
    },
    **{(name, CAUSAL): {} for name in ("stablelm", "bitnet", "glm", "glm4", "starcoder2", "arcee", "cwm")},
    **{(name, CAUSAL): {} for name in ("falcon", "bloom", "mpt", "gpt_bigcode", "gpt_neo", "biogpt")},
    **{
        (name, CAUSAL): {}
        for name in ("diffllama", "doge", "apertus", "smollm3", "granite", "phi", "persimmon", "xglm")
    },
    # experts
    **{(name, CAUSAL): {} for name in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "glm4_moe")},
    **{(name, CAUSAL): {} for name in ("llama4_text", "granitemoe", "phimoe", "minimax")},
    # state spaces, linear attention, hybrids
    **{(name, CAUSAL): {} for name in ("mamba", "rwkv", "falcon_mamba", "qwen3_next")},
    ("deepseek_v3", CAUSAL): {"num_key_value_heads": 4, "qk_head_dim": 16},
    **{(name, CAUSAL): {"rotary_dim": 4} for name in ("gptj", "codegen")},
    ("nemotron", CAUSAL): {"num_key_value_heads": 2},
    ("mamba2", CAUSAL): {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    ("granitemoehybrid", CAUSAL): {"layer_types": _HYBRID},
    ("gemma3n_text", CAUSAL): {"num_kv_shared_layers": 0, "layer_types": _MIXED, "intermediate_size": [48] * 4},
    # encoders
    **{(name, MASKED): {} for name in ("electra", "xlm-roberta", "albert", "camembert", "convbert", "nystromformer")},
    **{(name, MASKED): {} for name in ("deberta", "layoutlm", "rembert")},
    ("mpnet", MASKED): {"relative_attention_num_buckets": 32},
    ("esm", MASKED): {"vocab_size": 96, "mask_token_id": 4, "pad_token_id": 1},
    # encoder-decoders
    **{(name, SEQ2SEQ): {} for name in ("t5", "bart", "mt5", "pegasus", "marian", "m2m_100", "blenderbot", "umt5")},
    ("t5", SORT): {"decoder_start_token_id": 0, "eos_token_id": 1},
    ("bart", SORT): {},
    # pictures
    **{(name, IMAGE): {} for name in ("vit", "beit", "dinov2", "siglip", "vit_msn")},
    ("deit", IMAGE): {"architectures": ["DeiTForImageClassification"]},
    ("swin", IMAGE): {
        "embed_dim": 24,
        "depths": [1, 1, 2, 1],
        "num_heads": [1, 2, 2, 4],
        "window_size": 2,
        "patch_size": 4,
        "image_size": 64,
    },
    ("resnet", IMAGE): {"hidden_sizes": [16, 32], "depths": [2, 2], "embedding_size": 16},
    ("regnet", IMAGE): {"hidden_sizes": [16, 32], "depths": [2, 2], "embedding_size": 16, "groups_width": 8},
    ("convnext", IMAGE): {"hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2},
    # sound
    **{(name, CTC): _SOUND for name in ("wav2vec2", "hubert", "wavlm")},
    ("whisper", SPEECH): {"max_source_positions": 16},
    # pictures and text
    ("llava", SEEING): {},
    ("qwen3_vl", SEEING): {},
}


def world_model(model_type: str, auto: str = CAUSAL, seed: int = 0, **changes: Any) -> Any:
    """A seeded tiny model in eval mode, with weights that all matter."""
    config = world_config(model_type, **{**TYPES.get((model_type, auto), {}), **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, auto).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim <= 1:
                p.add_(torch.randn(p.shape) * 0.1)
            elif "embed" not in name and p.abs().max() < 0.3:
                p.mul_(5)
    return model


def world_config(model_type: str, **changes: Any) -> Any:
    """The default config of a type, made small."""
    cls = CONFIG_MAPPING[model_type]
    return cls(**{**_small(cls()), **changes})


def _small(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    depth = next((v for n in ("num_hidden_layers", "num_layers") if type(v := getattr(config, n, None)) is int), None)
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            found[name] = {**_small(value), "model_type": value.model_type}
        elif name in _SIZES and isinstance(value, (int, float)) and not isinstance(value, bool):
            found[name] = _SIZES[name]
        elif isinstance(value, list) and depth and depth > 4 and len(value) == depth:
            kinds = list(dict.fromkeys(value))[:4] if all(isinstance(v, (str, int)) for v in value) else value[:1]
            found[name] = [kinds[i % len(kinds)] for i in range(4)]
        elif name == "rope_parameters" and isinstance(value, dict) and "mrope_section" in value:
            found[name] = {**value, "mrope_section": [2, 1, 1]}
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= 96:
            found[name] = 95 - sum(map(ord, name)) % 40
    return found
