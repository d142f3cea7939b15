"""Small random inputs that a model accepts, whatever it reads: text, pictures, sound, or several of them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

_TOKEN = re.compile(r"(token_id|token_index|_token|token_ids)s?$")


def probe_batches(model: Any, rows: int = 4, length: int = 12, seed: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    """Yield inputs to try, those that reach most of the model first.

    Args:
        model: a `PreTrainedModel`.
        rows: samples in a batch.
        length: tokens of text.
        seed: of the draw.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> small = dict(num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=1, vocab_size=16)
        >>> sorted(next(probe_batches(LlamaForCausalLM(LlamaConfig(**small)))))
        ['attention_mask', 'input_ids']
    """
    config, draw = model.config, torch.Generator().manual_seed(seed)
    accepted = set(inspect.signature(model.forward).parameters)
    text = _text(config, rows, length, draw)
    target = {"decoder_input_ids": _text(config, rows, length, draw)["input_ids"]}
    pictures = [{"pixel_values": p} for p in _pictures(config, rows, draw)]
    sounds = list(_sounds(config, rows, draw))
    read = str(getattr(model, "main_input_name", "input_ids"))
    if read == "pixel_values":
        for picture in pictures:
            yield picture
            yield {**picture, **target}
    if read in ("input_features", "input_values", "audio_values", "speech_values"):
        for sound in sounds:
            yield {**sound, **target}
            yield sound
    if "pixel_values" in accepted:
        for picture in pictures:
            yield from _text_with_pictures(model, text, picture)
    if "decoder_input_ids" in accepted:
        yield {**text, **target}
    yield text
    yield {"input_ids": text["input_ids"]}
    end = getattr(config, "eos_token_id", None)
    if type(end) is int:  # a classifier may read the sentence at its end
        ids = text["input_ids"].clone()
        ids[:, -1] = end
        yield {**text, "input_ids": ids}
    yield {**text, **target}
    if "pixel_values" in accepted:
        for picture in pictures:
            for more in (text, {**text, **target}, target):
                yield {**picture, **more}
            yield {**text, "pixel_values": picture["pixel_values"][:, None]}
            yield {**text, "token_type_ids": torch.zeros_like(text["input_ids"])}
    yield {"inputs": text["input_ids"], "attention_mask": text["attention_mask"]}
    for picture in pictures:
        yield from ({"inputs": picture["pixel_values"]}, picture)
    for sound in sounds:
        yield from ({**sound, **target}, sound)
    yield {k: v[:1] for k, v in text.items()}  # a classifier without a padding token takes one row
    books = _field(config, ("num_codebooks", "num_channels")) or 4
    yield {"input_ids": torch.randint(1, 20, (rows * books, length), generator=draw)}


def special_ids(config: Any) -> set[int]:
    """Every token id that a config gives a meaning.

    Example:
        >>> from transformers import LlamaConfig
        >>> sorted(special_ids(LlamaConfig(bos_token_id=1, eos_token_id=2, pad_token_id=None)))
        [1, 2]
    """
    found: set[int] = set()

    def walk(data: Mapping[str, Any]) -> None:
        for key, value in data.items():
            if isinstance(value, Mapping):
                walk(value)
            elif _TOKEN.search(str(key)):
                found.update(v for v in (value if isinstance(value, (list, tuple)) else [value]) if type(v) is int)

    walk(config.to_dict())
    return found


def _text(config: Any, rows: int, length: int, draw: torch.Generator) -> dict[str, torch.Tensor]:
    inner = getattr(config, "text_config", None)
    vocabulary = _field(config, ("vocab_size",)) or getattr(inner, "vocab_size", None) or 100
    taken = special_ids(config)
    pool = torch.tensor([i for i in range(3, min(100, vocabulary)) if i not in taken] or [0])
    ids = pool[torch.randint(0, len(pool), (rows, length), generator=draw)]
    return {"input_ids": ids, "attention_mask": torch.ones(rows, length, dtype=torch.long)}


def _pictures(config: Any, rows: int, draw: torch.Generator) -> Iterator[torch.Tensor]:
    vision = next(
        (v for n in ("vision_config", "image_config", "backbone_config") if (v := getattr(config, n, None))), config
    )
    size = _field(vision, ("image_size", "input_size")) or _field(config, ("image_size",)) or 32
    channels = _field(vision, ("num_channels", "in_channels", "in_chans")) or 3
    large = (min(size) if isinstance(size, (list, tuple)) else size) > 64
    for edge in dict.fromkeys((*([64] if large else []), size, 224)):  # a convolutional net takes any size
        pair = edge if isinstance(edge, (list, tuple)) else (edge, edge)
        yield torch.randn(rows if pair[0] <= 32 else 2, channels, *pair, generator=draw)


def _sounds(config: Any, rows: int, draw: torch.Generator) -> Iterator[dict[str, torch.Tensor]]:
    names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_dim", "feature_size")
    mel = _field(config, names) or 16
    positions = _field(config, ("max_source_positions",)) or 16
    frames = torch.randn(rows, mel, 2 * positions, generator=draw)
    wave = torch.randn(rows, 4000, generator=draw)
    yield {"input_features": frames}
    yield {"input_features": frames.mT.contiguous()}
    yield {"input_values": wave}
    yield {"input_values": frames.mT.contiguous()}
    yield {"input_values": torch.randn(rows, _field(config, ("max_length",)) or 64, mel, generator=draw)}


def _text_with_pictures(
    model: Any, text: dict[str, torch.Tensor], picture: dict[str, torch.Tensor]
) -> Iterator[dict[str, torch.Tensor]]:
    """Text with as many picture tokens as the model makes of a picture."""
    config = model.config
    token = next(
        (t for n in ("image_token_id", "image_token_index") if type(t := getattr(config, n, None)) is int), None
    )
    if token is None or not hasattr(model, "get_image_features"):
        return
    rows = len(text["input_ids"])
    pixels = picture["pixel_values"][:rows]
    for more in _picture_forms(config, pixels):
        try:
            with torch.no_grad():
                made = model.get_image_features(**more)
        except Exception:
            continue
        made = getattr(made, "pooler_output", made)
        made = torch.cat([m.flatten(0, -2) for m in made]) if isinstance(made, (list, tuple)) else made.flatten(0, -2)
        each, rest = divmod(len(made), rows)
        if rest:
            continue
        marks = torch.full((rows, each), token)
        ids = torch.cat([text["input_ids"][:, :4], marks, text["input_ids"][:, 4:]], dim=1)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}
        yield batch
        if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
            yield {**batch, "mm_token_type_ids": (ids == token).long()}
        yield {**batch, "token_type_ids": (ids == token).long()}


def _picture_forms(config: Any, pixels: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
    """A picture as pixels, or as patches with a grid."""
    yield {"pixel_values": pixels}
    vision = getattr(config, "vision_config", None) or config
    patch, frames = _field(vision, ("patch_size",)), getattr(vision, "temporal_patch_size", 1) or 1
    merge = getattr(vision, "spatial_merge_size", 1) or 1
    if patch:
        side = 2 * merge
        count = len(pixels) * side * side
        values = pixels.flatten()
        need = count * pixels.shape[1] * frames * patch * patch
        values = values.repeat(need // len(values) + 1)[:need].view(count, -1)
        yield {"pixel_values": values, "image_grid_thw": torch.tensor([[1, side, side]] * len(pixels))}
        yield {"pixel_values": values, "image_grid_hws": torch.tensor([[side, side]] * len(pixels))}
    height = torch.tensor([list(pixels.shape[-2:])] * len(pixels))
    yield {"pixel_values": pixels, "image_sizes": height}


def _field(config: Any, names: tuple[str, ...], depth: int = 0) -> Any:
    """The first of the named fields that a config, or one inside it, gives a positive number."""
    for name in names:
        value = getattr(config, name, None)
        if type(value) is int and value > 0:
            return value
        if (
            isinstance(value, (list, tuple))
            and value
            and name in ("image_size", "input_size")
            and type(value[0]) is int
        ):
            return tuple(value[-2:])
    for key, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type") and depth < 3 and key != "text_config":
            found = _field(value, names, depth + 1)
            if found:
                return found
    return None
