"""One tiny random model per family: 4 layers, 32 wide, seeded, float32. For shapes and wiring, not for quality."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_DECODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER = {k: v for k, v in _DECODER.items() if k not in ("num_key_value_heads", "bos_token_id", "eos_token_id")}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

# model_type -> what differs from the common sizes (None removes a field)
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"layer_types": _MIXED, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": {"head_dim": 12},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "layer_types": _MIXED, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "layer_types": _MIXED, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "phi": {},
    "phi3": {},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "granite": {"attention_multiplier": 0.5, "residual_multiplier": 0.7},
    "gpt2": {"num_key_value_heads": None, "intermediate_size": None, "n_inner": 48},
    "gpt_neox": {"num_key_value_heads": None},
    "opt": {"num_key_value_heads": None, "intermediate_size": None, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "bert": {},
    "roberta": {"max_position_embeddings": 66},
    "distilbert": {"intermediate_size": None, "hidden_dim": 48},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    "modernbert": {"layer_types": _MIXED, "local_attention": 12, "cls_token_id": 1, "sep_token_id": 2},
}
ENCODERS = ("bert", "roberta", "distilbert", "deberta-v2", "modernbert")
DECODERS = tuple(name for name in SETTINGS if name not in ENCODERS)

# where attention and MLP reach the residual stream, where it is not as in Llama
_OUTPUTS = {
    "phi": ("self_attn.dense", "mlp.fc2"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "opt": ("self_attn.out_proj", "fc2"),
    "bert": ("attention.output.dense", "output.dense"),
    "roberta": ("attention.output.dense", "output.dense"),
    "deberta-v2": ("attention.output.dense", "output.dense"),
    "distilbert": ("attention.out_lin", "ffn.lin2"),
    "modernbert": ("attn.Wo", "mlp.Wo"),
}


def output_paths(model_type: str) -> dict[str, str]:
    """The projections of a layer that end its attention ("o") and its MLP ("down"); GPT-2's hold the transpose."""
    return dict(zip(("o", "down"), _OUTPUTS.get(model_type, ("self_attn.o_proj", "mlp.down_proj")), strict=True))


def tiny_config(model_type: str, **changes: Any) -> Any:
    """The config of the tiny model; `changes` override fields."""
    settings = {**(_ENCODER if model_type in ENCODERS else _DECODER), **SETTINGS.get(model_type, {}), **changes}
    if model_type == "modernbert":
        settings |= {"bos_token_id": 1, "eos_token_id": 2}
    return CONFIG_MAPPING[model_type](**{k: v for k, v in settings.items() if v is not None})


def tiny_model(model_type: str, head: str | None = None, seed: int = 0, **changes: Any) -> Any:
    """A seeded tiny model in eval mode.

    `head`: "base", "causal-lm", "masked-lm" or "classification"; by default the language-model head of the family.
    """
    head = head or ("masked-lm" if model_type in ENCODERS else "causal-lm")
    auto = {
        "base": AutoModel,
        "causal-lm": AutoModelForCausalLM,
        "masked-lm": AutoModelForMaskedLM,
        "classification": AutoModelForSequenceClassification,
    }[head]
    torch.manual_seed(seed)
    model = auto.from_config(tiny_config(model_type, **changes), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # weights large enough that every part matters to the output, and no bias or norm left at its neutral value
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "embed" not in name and "wte" not in name:
                parameter.mul_(5)
    return model


def tiny_batch(batch: int = 2, length: int = 12, vocab: int = 96, seed: int = 0, pad: str = "right") -> dict[str, Any]:
    """Random token ids whose second row is 4 tokens shorter, padded on the given side."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if batch > 1:
        gap = slice(length - 4, None) if pad == "right" else slice(0, 4)
        ids[1, gap], mask[1, gap] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def tiny_tokenizer(*words: str) -> Any:
    """A tokenizer of 96 words, as many as the tiny models have embeddings: the given ones and "w0", "w1", ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = [*(f"w{i}" for i in range(95 - len(words))), *words, "[UNK]"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="w0")
