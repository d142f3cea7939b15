"""What a model takes in of pictures and recordings: the tensors its processor makes, and which may share a batch."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from hf_cka.data.batches import Row
from hf_cka.data.media import Unreadable

T = TypeVar("T")
_NAMED = 5  # skipped samples that a message names


class Readable(Generic[T]):
    """What rows hold, read one after the other; what cannot be read is left out, and named in a warning at the end.

    Args:
        rows: of a data set.
        read: returns what a row holds, or raises :class:`hf_cka.data.Unreadable`.

    Yields:
        The row's number and what was read. ``skipped`` holds the messages of the others.

    Raises:
        ValueError: at the end, if there was something and none of it could be read.

    Example:
        >>> from hf_cka.data import read_image
        >>> list(Readable([{"image": np.zeros((2, 2), np.uint8)}], lambda row: read_image(row["image"]).size))
        [(0, (2, 2))]
    """

    def __init__(self, rows: Iterable[Row], read: Callable[[Row], T]) -> None:
        self.rows, self.read = rows, read
        self.skipped: list[str] = []

    def __iter__(self) -> Iterator[tuple[int, T]]:
        self.skipped, total = [], 0
        for index, row in enumerate(self.rows):
            total += 1
            try:
                found = self.read(row)
            except Unreadable as error:
                self.skipped.append(str(error))
                continue
            yield index, found
        wrong = self.skipped
        listed = "; ".join(wrong[:_NAMED]) + (f"; and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else "")
        if wrong and len(wrong) == total:
            raise ValueError(f"None of the {total} samples can be read: {listed}.")
        if wrong:
            warnings.warn(f"Left out {len(wrong)} of {total} samples that cannot be read: {listed}.", stacklevel=3)


def hear(extractor: Any, sounds: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """Return what a model hears of recordings: the tensors that its feature extractor makes.

    Args:
        extractor: of the model.
        sounds: recordings at its sampling rate, each ``(samples,)``.

    Example:
        >>> from transformers import Wav2Vec2FeatureExtractor
        >>> hear(Wav2Vec2FeatureExtractor(), [np.zeros(9, np.float32), np.ones(4, np.float32)])["input_values"].shape
        torch.Size([2, 9])
    """
    # some pad to one length of their own (Whisper: 30 seconds), which the model needs
    default = inspect.signature(extractor.__call__).parameters.get("padding")
    options = {"padding": True} if default is not None and default.default in (False, None) else {}
    made = extractor(list(sounds), sampling_rate=extractor.sampling_rate, return_tensors="pt", **options)
    return {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}


def alike(extractor: Any, sounds: Sequence[np.ndarray], batch_size: int) -> Iterator[list[int]]:
    """Return which recordings go into the model together: those whose padding changes nothing.

    Where the extractor gives a mask or pads to a length of its own, any; otherwise those of one length.

    Args:
        extractor: of the model.
        sounds: recordings.
        batch_size: at most so many.

    Example:
        >>> from transformers import Wav2Vec2FeatureExtractor
        >>> sounds = [np.zeros(9), np.zeros(4), np.zeros(9)]
        >>> list(alike(Wav2Vec2FeatureExtractor(), sounds, 8))
        [[1], [0, 2]]
        >>> list(alike(Wav2Vec2FeatureExtractor(return_attention_mask=True), sounds, 8))
        [[1, 0, 2]]
    """
    padding = inspect.signature(extractor.__call__).parameters.get("padding")
    fixed = padding is None or padding.default in ("max_length", "repeatpad")
    free = fixed or bool(getattr(extractor, "return_attention_mask", False))
    together: list[int] = []
    for index in sorted(range(len(sounds)), key=lambda index: len(sounds[index])):
        other = together and not free and len(sounds[index]) != len(sounds[together[0]])
        if together and (other or len(together) == batch_size):
            yield together
            together = []
        together.append(index)
    if together:
        yield together


def see(image_processor: Any, pictures: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Return what a model sees of pictures: the tensors that its image processor makes.

    Args:
        image_processor: of the model.
        pictures: PIL images.

    Raises:
        ValueError: if they do not become one tensor, because the processor does not resize them.

    Example:
        >>> from hf_cka.data import read_image
        >>> from transformers import ViTImageProcessor
        >>> pictures = [read_image(np.zeros((5, 4, 3), np.uint8))]
        >>> see(ViTImageProcessor(size={"height": 8, "width": 8}), pictures)["pixel_values"].shape
        torch.Size([1, 3, 8, 8])
    """
    try:
        made = image_processor(images=list(pictures), return_tensors="pt")
    except ValueError as error:
        if len({picture.size for picture in pictures}) == 1:
            raise
        raise ValueError(
            f"{type(image_processor).__name__} does not bring images of different sizes to one: set its do_resize and "
            f"size, or use batch_size=1 ({error})."
        ) from error
    return {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}


def see_and_read(processor: Any, pictures: Sequence[Any], texts: Sequence[str], max_length: int) -> dict[str, Any]:
    """Return what a model of pictures and text takes in: all tensors that its processor makes of both.

    A chat template, where there is one, or the processor's image token says where in the text the picture is. The text
    is cut after its last character, as in :func:`hf_cka.calibration`; only a model of separate towers (CLIP) cuts it by
    length.

    Args:
        processor: of image processor and tokenizer.
        pictures: PIL images, one a text.
        texts: what belongs to each.
        max_length: tokens after which a text without image tokens is cut.
    """
    token = getattr(processor, "image_token", None)
    options: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
    if getattr(processor, "chat_template", None):
        texts = [_prompted(processor, text) for text in texts]
    elif token:
        texts = [text if token in text else f"{token}{text}" for text in texts]
    else:
        options |= {"truncation": True, "max_length": min(max_length, processor.tokenizer.model_max_length)}
    made = processor(images=list(pictures), text=list(texts), **options)
    return {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}


def _prompted(processor: Any, text: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": text}]
    prompt = str(processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False))
    end = prompt.rfind(text)
    return prompt[: end + len(text)] if end >= 0 else prompt
