"""Popular models that need a configuration or inputs of their own: chosen from, adapted, pruned and reloaded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model

from hf_cka import CKALoraConfig, PruningConfig, find_anatomy, load_pruned, prune, save_pruned, select_layers
from hf_cka.pruning.width_budgets import WidthSettings

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 96}
ROWS = 8


def _ids(seed: int, length: int = 10) -> torch.Tensor:
    return torch.randint(5, 90, (ROWS, length), generator=torch.Generator().manual_seed(seed))


def _pictures(seed: int, edge: int) -> torch.Tensor:
    return torch.randn(ROWS, 3, edge, edge, generator=torch.Generator().manual_seed(seed))


def _text(seed: int) -> dict[str, torch.Tensor]:
    return {"input_ids": _ids(seed), "attention_mask": torch.ones(ROWS, 10, dtype=torch.long)}


def _ended(seed: int) -> dict[str, torch.Tensor]:
    """Texts with one end token each, which classifiers of encoder-decoders read."""
    batch = _text(seed)
    batch["input_ids"][:, -1] = 2
    return batch


def _swin() -> Any:
    config = transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=16, depths=[2, 2, 4], num_heads=[2, 2, 4], window_size=4, num_labels=4
    )
    return transformers.SwinForImageClassification(config), lambda s: {"pixel_values": _pictures(s, 64)}


def _mpnet() -> Any:
    config = transformers.MPNetConfig(**TEXT, max_position_embeddings=64, relative_attention_num_buckets=32)
    return transformers.MPNetForSequenceClassification(config), _text


def _moonshine() -> Any:
    config = transformers.MoonshineConfig(
        hidden_size=32,
        intermediate_size=48,
        encoder_num_hidden_layers=4,
        decoder_num_hidden_layers=4,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        encoder_num_key_value_heads=4,
        decoder_num_key_value_heads=4,
        vocab_size=96,
        pad_token_id=0,
        max_position_embeddings=64,
    )

    def batch(seed: int) -> dict[str, torch.Tensor]:
        wave = torch.randn(ROWS, 4000, generator=torch.Generator().manual_seed(seed))
        return {"input_values": wave, "decoder_input_ids": _ids(seed)}

    return transformers.MoonshineForConditionalGeneration(config), batch


def _qwen2_vl() -> Any:
    config = transformers.Qwen2VLConfig(
        text_config={
            **TEXT,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        image_token_id=3, video_token_id=4, vision_start_token_id=1, vision_end_token_id=2,
    )  # fmt: skip

    def batch(seed: int) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(seed)
        seen = torch.tensor([[1, 3, 3, 3, 3, 2]]).expand(ROWS, -1)
        ids = torch.cat([seen, _ids(seed)], 1)
        pixels = torch.randn(ROWS * 16, 3 * 2 * 4 * 4, generator=draw)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": pixels,
            "image_grid_thw": torch.tensor([[1, 4, 4]] * ROWS),
            "mm_token_type_ids": (ids == 3).int(),
        }

    return transformers.Qwen2VLForConditionalGeneration(config), batch


def _blip_2() -> Any:
    config = transformers.Blip2Config(
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
            "image_size": 16, "patch_size": 8,
        },
        qformer_config={**TEXT, "num_hidden_layers": 2, "encoder_hidden_size": 32, "cross_attention_frequency": 1},
        text_config={
            "model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
            "vocab_size": 96, "word_embed_proj_dim": 32, "max_position_embeddings": 64, "bos_token_id": 1,
            "pad_token_id": 1, "eos_token_id": 2,
        },
        num_query_tokens=4, image_token_index=3,
    )  # fmt: skip

    def batch(seed: int) -> dict[str, torch.Tensor]:
        ids = torch.cat([torch.full((ROWS, 4), 3), _ids(seed)], 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": _pictures(seed, 16)}

    return transformers.Blip2ForConditionalGeneration(config), batch


def _llama_4() -> Any:
    config = transformers.Llama4Config(
        text_config={
            **TEXT, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2,
            "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "bos_token_id": 1, "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 16, "patch_size": 4, "vision_output_dim": 32, "projector_input_dim": 32,
            "projector_output_dim": 32, "pixel_shuffle_ratio": 0.5,
        },
        image_token_index=3, boi_token_index=1, eoi_token_index=2,
    )  # fmt: skip

    def batch(seed: int) -> dict[str, torch.Tensor]:
        ids = torch.cat([torch.full((ROWS, 4), 3), _ids(seed)], 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": _pictures(seed, 16)}

    return transformers.Llama4ForConditionalGeneration(config), batch


def _t5() -> Any:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=4, num_heads=4, vocab_size=96, eos_token_id=2, decoder_start_token_id=0
    )
    return transformers.T5ForSequenceClassification(config), _ended


def _bart() -> Any:
    config = transformers.BartConfig(
        d_model=32, encoder_layers=4, decoder_layers=4, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=96, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.BartForSequenceClassification(config), _ended


def _timm() -> Any:
    pytest.importorskip("timm", reason="timm is not installed; its torchvision has no build for every torch")
    args = {"depth": 4, "embed_dim": 32, "num_heads": 4, "img_size": 16, "patch_size": 8, "num_classes": 4}
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=args)
    return transformers.TimmWrapperForImageClassification(config), lambda s: {"pixel_values": _pictures(s, 16)}


POPULAR = [_swin, _mpnet, _moonshine, _qwen2_vl, _blip_2, _llama_4, _t5, _bart, _timm]


def _logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("made", POPULAR, ids=lambda f: f.__name__.strip("_"))
def test_select_adapt_prune_and_reload(made, tmp_path):
    torch.manual_seed(0)
    model, batch_of = made()
    model = model.eval()
    with torch.no_grad():  # biases that differ and weights that matter
        for name, p in model.named_parameters():
            if p.ndim <= 1:
                p.add_(torch.randn(p.shape) * 0.1)
            elif p.abs().max() < 0.3 and not ("embed" in name and p.ndim == 2):
                p.normal_(std=0.1)  # BLIP-2 starts from 1e-10
    batches = [batch_of(seed) for seed in range(4)]
    try:
        dense = _logits(model, batches[0])
    except AttributeError as error:
        if "image_outputs" not in str(error):
            raise
        pytest.skip(f"this transformers cannot run Llama 4 with pictures at all: {error}")
    anatomy = find_anatomy(model)

    selection = select_layers(model, batches, keep_ratio=0.5, progress=False)
    assert len(selection.layers) == anatomy.num_layers // 2
    adapted = get_peft_model(copy.deepcopy(model), CKALoraConfig(r=2, keep_ratio=0.5, calibration=batches))
    assert torch.allclose(_logits(adapted, batches[0]), dense, atol=1e-5)  # B is zero
    held = {n for n, _ in adapted.named_parameters() if "lora_A" in n}
    chosen = [anatomy.layer_name(i) for i in selection.layers]
    assert held
    assert all(any(f".{c}." in n for n in held) for c in chosen)

    for kind, config in {
        "depth": PruningConfig(method="depth", criterion="cka", num_layers=1),
        "sublayer": PruningConfig(method="depth", criterion="cka", num_layers=1, structures="sublayers"),
        "width": PruningConfig(
            method="width", criterion="activation_norm", ratio=0.02, width=WidthSettings(structures="units")
        ),
    }.items():
        small = prune(model, batches, config, progress=False).model
        assert small.num_parameters() < model.num_parameters(), kind
        save_pruned(small, tmp_path / kind, verify=False)
        again = load_pruned(tmp_path / kind)
        assert torch.allclose(_logits(small, batches[1]), _logits(again.eval(), batches[1]), atol=1e-5), kind
    assert torch.equal(dense, _logits(model, batches[0]))
