"""Turn texts, chats, pictures, recordings and datasets into calibration batches.

Everything here is about data: no model is touched, and nothing is decided.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from hf_cka.data.batches import CalibrationBatches, Row, decoder_inputs, pad
from hf_cka.data.inputs import Readable, alike, hear, see, see_and_read
from hf_cka.data.labels import class_names, label_ids
from hf_cka.data.media import AUDIO, IMAGE, media_column, read_audio, read_image, undecoded
from hf_cka.data.processors import Parts, parts_of
from hf_cka.data.text import caption, row_pair, row_text


def calibration(
    dataset: Iterable[str] | Iterable[Row],
    processor: Any,
    num_samples: int = 128,
    max_length: int = 512,
    seed: int = 0,
    *,
    batch_size: int = 8,
    text_column: str | None = None,
    source: str | None = None,
    decoder_start_token_id: int | None = None,
    label2id: Mapping[str, int] | None = None,
    max_seconds: float = 30.0,
) -> CalibrationBatches:
    """Draw samples and turn them into padded, model-ready batches.

    With a tokenizer, a row is a string, or a mapping with ``text``, ``messages`` (chat), ``prompt`` and ``completion``,
    ``instruction`` / ``input`` / ``output``, or one or two sentence columns. Text is cut after its last visible
    character, and a chat after the last message's content: the tokens a template appends are the same for every
    sample, so a last-token readout there would be constant and its similarity undefined. ``source`` and ``target``
    are a pair for an encoder-decoder, and so are the columns of :func:`hf_cka.data.row_pair` when it is one.

    With an image processor or a feature extractor, alone or in a processor, a row holds a picture (``image``) or a
    recording (``audio``): a file, bytes, a PIL image, ``{"array", "sampling_rate"}``, or what ``datasets`` has. Sound
    is resampled to what the model hears, in one channel. Files that cannot be read are left out and named in a warning.

    Args:
        dataset: strings or rows; anything indexable is sampled without replacement, a plain iterator is read from its
            start.
        processor: of the model that will be measured: a tokenizer, image processor, feature extractor or processor.
        num_samples: rows to draw; all rows if there are fewer.
        max_length: tokens after which a text is cut.
        seed: of the draw.
        batch_size: rows a batch. Measurements do not depend on it.
        text_column: the column to read, when it is none of the above.
        source: a name for the record ("wikitext-2, validation").
        decoder_start_token_id: of an encoder-decoder: adds ``decoder_input_ids`` and ``decoder_attention_mask``, the
            target shifted right behind this token, or this token alone where there is no target.
        label2id: of the config of a classifier of pictures or sound: adds ``labels`` from the rows' ``label``.
        max_seconds: after which a recording is cut.

    Returns:
        A list of dicts of tensors. Text: ``input_ids`` and ``attention_mask`` of shape ``(batch, tokens)``. Pictures:
        ``pixel_values``, ``(batch, channels, height, width)``. Sound: ``input_features`` or ``input_values``, and
        ``attention_mask`` where the extractor gives one. Targets: ``labels``, padded with -100.

    Raises:
        ValueError: if there is no usable sample, a column does not exist, or a number is out of range.
        ImportError: without pillow or soundfile, where they are needed.

    Example:
        >>> from transformers import AutoTokenizer
        >>> batches = calibration(["one text", "another"], AutoTokenizer.from_pretrained(...))  # doctest: +SKIP
        >>> batches = calibration(load_rows("pictures.zip"), load_processor("google/vit-base-patch16-224"))
        ...     # doctest: +SKIP
    """
    for name, value in (("num_samples", num_samples), ("max_length", max_length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if max_seconds <= 0:
        raise ValueError(f"max_seconds must be above 0, got {max_seconds}.")
    parts = parts_of(processor)
    data, known = undecoded(dataset)
    rows = list(_draw(data, num_samples, seed))
    record: dict[str, Any] = {"source": source, "seed": seed, "max_length": max_length}
    if rows and not isinstance(rows[0], str) and (parts.image_processor or parts.feature_extractor):
        found = media_column(rows[0], known)
        if found is not None:
            names = class_names(data)
            maker = _Media(
                parts,
                processor,
                *found,
                max_length=max_length,
                max_seconds=max_seconds,
                text_column=text_column,
                start=decoder_start_token_id,
                ids=label_ids(names, label2id) if names and label2id is not None else (),
                labelled=label2id is not None,
            )
            batches = maker.batches(rows, batch_size)
            return CalibrationBatches(batches, skipped=maker.skipped, **record)
    if parts.tokenizer is None and processor is not None:
        raise ValueError(_nothing_for(processor, parts, rows))
    paired = decoder_start_token_id is not None or bool(rows and _has_target(rows[0]))
    make = _pair_batches if paired else _text_batches
    batches = make(rows, parts.tokenizer, max_length, batch_size, text_column, decoder_start_token_id)
    return CalibrationBatches(batches, **record)


@dataclass
class _Media:
    """Makes batches of pictures or recordings, with their texts, targets or labels."""

    parts: Parts
    processor: Any
    column: str
    modality: str
    max_length: int
    max_seconds: float
    text_column: str | None
    start: int | None
    ids: Sequence[int]
    labelled: bool
    skipped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        part = self.parts.image_processor if self.modality == IMAGE else self.parts.feature_extractor
        if part is None:
            other = "image processor" if self.modality == IMAGE else "feature extractor"
            raise ValueError(
                f"The column {self.column!r} holds {self.modality}s, but {type(self.processor).__name__} has no "
                f"{other}. Give data of the model's kind, or its own processor."
            )

    def batches(self, rows: Sequence[Row], batch_size: int) -> list[dict[str, torch.Tensor]]:
        reading = Readable(rows, self._read)
        read = list(reading)
        self.skipped = reading.skipped
        kept = [rows[index] for index, _ in read]
        items = [item for _, item in read]
        texts = self._texts(kept)
        together: Iterable[list[int]]
        if self.modality == AUDIO:
            together = alike(self.parts.feature_extractor, items, batch_size)
        else:
            together = (list(range(at, min(at + batch_size, len(items)))) for at in range(0, len(items), batch_size))
        return [
            self._batch([items[i] for i in part], [kept[i] for i in part], texts and [texts[i] for i in part])
            for part in together
        ]

    def _read(self, row: Row) -> Any:
        value = row.get(self.column)
        if self.modality == IMAGE:
            return read_image(value, self.parts.color_mode)
        rate = int(self.parts.feature_extractor.sampling_rate)
        return read_audio(value, rate)[: max(1, int(self.max_seconds * rate))]

    def _texts(self, rows: Sequence[Row]) -> list[str]:
        """The texts of the rows; empty where they have none, or nothing reads them."""
        if self.parts.tokenizer is None:
            return []
        found = [text for row in rows if (text := caption(row, self.text_column))]
        if found and len(found) < len(rows):
            raise ValueError(f"{len(rows) - len(found)} of {len(rows)} rows have no text. Give every row one, or none.")
        return found

    def _batch(self, items: list[Any], rows: list[Row], texts: list[str]) -> dict[str, torch.Tensor]:
        if self.modality == AUDIO:
            made = hear(self.parts.feature_extractor, items)
        elif texts and self.start is None:
            return see_and_read(self.processor, items, texts, self.max_length)
        else:
            made = see(self.parts.image_processor, items)
        if texts:
            made |= _targets(self.parts.tokenizer, texts, self.max_length, self.start)
        elif self.start is not None:
            made |= decoder_inputs([[] for _ in items], self.start, self.start)
        elif self.labelled and all(isinstance(row.get("label"), int) for row in rows):
            labels = [int(row["label"]) for row in rows]
            made["labels"] = torch.tensor([self.ids[label] for label in labels] if self.ids else labels)
        return made


def _text_batches(
    rows: Sequence[Any], tokenizer: Any, max_length: int, batch_size: int, column: str | None, start: int | None
) -> list[dict[str, torch.Tensor]]:
    texts = [text for row in rows if (text := row_text(row, tokenizer, column))]
    filler = _filler(tokenizer, texts, batch_size)
    encoded = [tokenizer(text, truncation=True, max_length=max_length)["input_ids"] for text in texts]
    # Rows of like length share a batch, so that little is spent on padding.
    encoded = sorted((ids for ids in encoded if ids), key=len)
    batches = []
    for at in range(0, len(encoded), batch_size):
        ids, mask = pad(encoded[at : at + batch_size], filler)
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def _pair_batches(
    rows: Sequence[Any], tokenizer: Any, max_length: int, batch_size: int, column: str | None, start: int | None
) -> list[dict[str, torch.Tensor]]:
    pairs = [pair for row in rows if (pair := row_pair(row, tokenizer, column))[0]]
    filler = _filler(tokenizer, [source for source, _ in pairs], batch_size)
    targets = [target for _, target in pairs]
    if any(targets) and not all(targets):
        raise ValueError(
            f"{targets.count(None) + targets.count('')} of {len(pairs)} rows have no target. Give every row one, or "
            "none."
        )
    encoded = [tokenizer(source, truncation=True, max_length=max_length)["input_ids"] for source, _ in pairs]
    order = sorted((i for i, ids in enumerate(encoded) if ids), key=lambda i: len(encoded[i]))
    batches = []
    for at in range(0, len(order), batch_size):
        part = order[at : at + batch_size]
        ids, mask = pad([encoded[i] for i in part], filler)
        batch = {"input_ids": ids, "attention_mask": mask}
        if any(targets):
            batch |= _targets(tokenizer, [str(targets[i]) for i in part], max_length, start)
        elif start is not None:
            batch |= decoder_inputs([[] for _ in part], start, filler)
        batches.append(batch)
    return batches


def _targets(tokenizer: Any, texts: Sequence[str], max_length: int, start: int | None) -> dict[str, torch.Tensor]:
    """Labels, and with a start token what the decoder reads."""
    encoded = [tokenizer(text_target=text, truncation=True, max_length=max_length)["input_ids"] for text in texts]
    # a tokenizer may begin its labels with the start token, which shifting would then repeat
    encoded = [ids[1:] if start is not None and ids[:1] == [start] else ids for ids in encoded]
    labels, _ = pad(encoded, -100)
    if start is None:
        return {"labels": labels}
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else start
    return {"labels": labels, **decoder_inputs(encoded, start, filler)}


def _filler(tokenizer: Any, texts: Sequence[str], batch_size: int) -> int:
    if not texts:
        raise ValueError("The calibration data holds no text: pass at least two non-empty samples.")
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None and batch_size > 1:
        raise ValueError("The tokenizer has no pad and no eos token: set tokenizer.pad_token, or use batch_size=1.")
    return (tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id) or 0


def _has_target(row: Any) -> bool:
    return not isinstance(row, str) and isinstance(row.get("source"), str) and isinstance(row.get("target"), str)


def _nothing_for(processor: Any, parts: Parts, rows: Sequence[Any]) -> str:
    kind, column = ("images", IMAGE) if parts.image_processor is not None else ("recordings", AUDIO)
    columns = "strings" if rows and isinstance(rows[0], str) else f"columns {', '.join(rows[0])}" if rows else "no rows"
    return (
        f"{type(processor).__name__} takes {kind}, and the data has {columns}. Give rows with a column {column!r}, or "
        "a folder or zip of such files."
    )


def _draw(data: Iterable[Any], count: int, seed: int) -> Iterator[Any]:
    if isinstance(data, str):
        raise ValueError("Expected many texts, got one string: pass a list of texts.")
    if hasattr(data, "__getitem__") and isinstance(data, Sized):
        chosen = random.Random(seed).sample(range(len(data)), min(count, len(data)))
        return (data[i] for i in chosen)
    return islice(data, count)
