"""Classification of pictures and recordings, with the head of the model.

Rows hold ``image`` or ``audio`` in any form that :func:`hf_cka.data.read_image` and :func:`hf_cka.data.read_audio`
take, and ``label``: an index, or a name. Names of classes (those of folders) are matched with the model's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm

from hf_cka.data import (
    AUDIO,
    IMAGE,
    Readable,
    alike,
    class_names,
    hear,
    label_ids,
    media_column,
    parts_of,
    read_audio,
    read_image,
    see,
    undecoded,
)
from hf_cka.evaluation.classification import Classification
from hf_cka.evaluation.running import measuring, to_model

Row = Mapping[str, Any]
T = TypeVar("T")
_AHEAD = 4  # batches of recordings that are read ahead, so that some of one length share a batch


def classify_images(
    model: Any, processor: Any, rows: Sequence[Row], *, batch_size: int = 16, progress: bool = True
) -> Classification:
    """Classify pictures with the head of an image-classification model.

    Args:
        model: ``AutoModelForImageClassification``; its training mode is put back afterwards.
        processor: the model's image processor, or a processor that holds one.
        rows: pictures with their labels; a ``datasets.Dataset`` gives the names of the classes.
        batch_size: pictures a forward pass; the result does not depend on it.
        progress: show a bar if it takes longer than two seconds.

    Raises:
        ValueError: if there are no rows, none can be read, one has no picture or label, a class is none of the model's,
            or the model has no classification head or gives no numbers.

    Example:
        >>> classify_images(model, processor, load_rows("pictures.zip")).accuracy  # doctest: +SKIP
    """
    parts = parts_of(processor)
    if parts.image_processor is None:
        raise ValueError(f"classify_images needs an image processor, and {type(processor).__name__} holds none.")
    data, column = media_rows(rows, IMAGE, batch_size)
    labels = _labels(model, data)
    mode = parts.color_mode
    reading = Readable(data, lambda row: read_image(row[column], mode))

    def batches() -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        for read in in_parts(reading, batch_size):
            yield [index for index, _ in read], see(parts.image_processor, [picture for _, picture in read])

    return _classified(model, batches(), labels, reading, progress)


def classify_audio(
    model: Any, processor: Any, rows: Sequence[Row], *, batch_size: int = 16, progress: bool = True
) -> Classification:
    """Classify recordings with the head of an audio-classification model.

    Recordings of different lengths share a batch only where padding changes nothing: where the feature extractor gives
    a mask, or pads to a length of its own.

    Args:
        model: ``AutoModelForAudioClassification``; its training mode is put back afterwards.
        processor: the model's feature extractor, or a processor that holds one.
        rows: recordings with their labels; a ``datasets.Dataset`` gives the names of the classes.
        batch_size: recordings a forward pass.
        progress: show a bar if it takes longer than two seconds.

    Raises:
        ValueError: as :func:`classify_images`.

    Example:
        >>> classify_audio(model, feature_extractor, load_rows("sounds")).accuracy  # doctest: +SKIP
    """
    extractor = parts_of(processor).feature_extractor
    if extractor is None:
        raise ValueError(f"classify_audio needs a feature extractor, and {type(processor).__name__} holds none.")
    data, column = media_rows(rows, AUDIO, batch_size)
    labels = _labels(model, data)
    reading = Readable(data, lambda row: read_audio(row[column], extractor.sampling_rate))

    def batches() -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        for read in in_parts(reading, batch_size * _AHEAD):
            sounds = [sound for _, sound in read]
            for together in alike(extractor, sounds, batch_size):
                yield [read[at][0] for at in together], hear(extractor, [sounds[at] for at in together])

    return _classified(model, batches(), labels, reading, progress)


def media_rows(rows: Any, modality: str, batch_size: int) -> tuple[Any, str]:
    """Return rows whose pictures or recordings are read here, and the column that holds them.

    Args:
        rows: a ``datasets.Dataset`` or a sequence of mappings.
        modality: "image" or "audio".
        batch_size: is checked as well.

    Raises:
        ValueError: if there are no rows, or they hold nothing of the kind; the message lists the columns.

    Example:
        >>> media_rows([{"image": "a.png", "label": 0}], "image", 8)[1]
        'image'
        >>> media_rows([{"text": "a"}], "image", 8)
        Traceback (most recent call last):
        ValueError: Row 0 has no column 'image'; its columns are: text. Give a folder or a zip of images, or rows ...
    """
    if not len(rows):
        raise ValueError(f"There are no rows to measure on; give at least one with {modality!r}.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    data, known = undecoded(rows)
    found = media_column(data[0], {column: kind for column, kind in known.items() if kind == modality})
    if found is None or found[1] != modality:
        raise ValueError(
            f"Row 0 has no column {modality!r}; its columns are: {', '.join(data[0])}. Give a folder or a zip of "
            f"{'images' if modality == IMAGE else 'recordings'}, or rows with the name of a file in that column."
        )
    return data, found[0]


def in_parts(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of at most so many items, in order.

    Example:
        >>> list(in_parts("abc", 2))
        [['a', 'b'], ['c']]
    """
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part


def _labels(model: Any, data: Any) -> list[int]:
    """The right label of each row, in the model's numbers."""
    config = model.config
    if "Classification" not in type(model).__name__ or not getattr(config, "label2id", None):
        raise ValueError(
            f"{type(model).__name__} has no classification head. Load AutoModelForImageClassification or "
            "AutoModelForAudioClassification."
        )
    columns = data.column_names if hasattr(data, "column_names") else None
    given = list(data["label"]) if columns and "label" in columns else [row.get("label") for row in data]
    names = class_names(data)
    ids: Mapping[Any, int] = dict(enumerate(label_ids(names, config.label2id))) if names else {}
    if not names and all(isinstance(label, str) for label in given):
        words = sorted(set(given))
        ids = dict(zip(words, label_ids(words, config.label2id), strict=True))
    found = []
    for index, label in enumerate(given):
        number = ids.get(label, -1) if ids else label
        if not isinstance(number, int) or not 0 <= number < config.num_labels:
            raise ValueError(
                f"Row {index}: label={label!r} must be an index from 0 to {config.num_labels - 1}, or the name of a "
                "class."
            )
        found.append(number)
    return found


def _classified(
    model: Any,
    batches: Iterable[tuple[list[int], dict[str, torch.Tensor]]],
    labels: Sequence[int],
    reading: Readable[Any],
    progress: bool,
) -> Classification:
    predictions: dict[int, int] = {}
    bar = tqdm(total=len(labels), desc="classification", unit="row", disable=not progress, delay=2)
    with measuring(model), bar:
        for indices, inputs in batches:
            logits = model(**to_model(model, inputs)).logits.float()
            for index, scores in zip(indices, logits, strict=True):
                if not torch.isfinite(scores).all():
                    raise ValueError(f"The logits of row {index} are no numbers. Check the weights, or use float32.")
                predictions[index] = int(scores.argmax())
            bar.update(len(indices))
    order = sorted(predictions)
    right = tuple(labels[index] for index in order)
    found = tuple(predictions[index] for index in order)
    accuracy = sum(a == b for a, b in zip(right, found, strict=True)) / len(right)
    return Classification(accuracy, len(right), right, found, tuple(reading.skipped))
