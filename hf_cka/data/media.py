"""Pictures and recordings as models take them, from whatever a row holds: files, bytes, arrays, pictures.

Which files there are is found in ``folders``; which sizes and rates a model wants is known to its processor.
"""

from __future__ import annotations

import io
import math
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_cka.data.batches import Row

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE, AUDIO = "image", "audio"
# suffixes of the files that are read
SUFFIXES = {
    IMAGE: (".jpg", ".jpeg", ".png", ".bmp", ".webp"),
    AUDIO: (".wav", ".flac", ".ogg", ".mp3"),
}
# usual names of their columns; the last ones hold a file's name, whose suffix says what it is
COLUMNS = {IMAGE: ("image", "img", "images"), AUDIO: ("audio", "speech")}
FILE_COLUMNS = ("file_name", "image_path", "audio_path", "file", "path")


class Unreadable(ValueError):
    """A picture or a recording that cannot be read; the message says which, and why."""


def modality_of_file(name: str) -> str | None:
    """Return "image" or "audio" by the suffix of a file, or None.

    Example:
        >>> modality_of_file("cats/1.JPG"), modality_of_file("a.wav"), modality_of_file("notes.txt")
        ('image', 'audio', None)
    """
    suffix = Path(name).suffix.lower()
    return next((modality for modality, suffixes in SUFFIXES.items() if suffix in suffixes), None)


def media_column(row: Row, known: Mapping[str, str] | None = None) -> tuple[str, str] | None:
    """Return the column of a row that holds a picture or a recording, and which of the two; None for neither.

    Args:
        row: of a dataset.
        known: columns whose kind is known already, as :func:`undecoded` finds them.

    Example:
        >>> media_column({"file_name": "a.flac", "text": "hello"}), media_column({"text": "hello"})
        (('file_name', 'audio'), None)
    """
    for column, modality in (known or {}).items():
        if column in row:
            return column, modality
    for modality, names in COLUMNS.items():
        for name in names:
            if row.get(name) is not None:
                return name, modality
    for name in FILE_COLUMNS:
        found = modality_of_file(row[name]) if isinstance(row.get(name), str) else None
        if found:
            return name, found
    return None


def undecoded(dataset: Any) -> tuple[Any, dict[str, str]]:
    """Return a dataset whose pictures and recordings stay bytes until they are read here, and their columns.

    Decoding here needs no torchcodec, and a broken file can be skipped by name.

    Args:
        dataset: of the ``datasets`` library, or any other data, which is returned as it is.

    Example:
        >>> undecoded([{"text": "a"}])
        ([{'text': 'a'}], {})
    """
    features = getattr(dataset, "features", None)
    if not hasattr(dataset, "cast_column") or not features:
        return dataset, {}
    from datasets import Audio, Image

    kinds = {Image: IMAGE, Audio: AUDIO}
    columns = {name: kinds[type(feature)] for name, feature in features.items() if type(feature) in kinds}
    for name, modality in columns.items():
        if features[name].decode:
            dataset = dataset.cast_column(name, (Image if modality == IMAGE else Audio)(decode=False))
    return dataset, columns


def read_image(value: Any, mode: str = "RGB") -> Image:
    """Return a picture, upright and in one colour mode.

    Args:
        value: a PIL image, a file name, bytes, ``{"bytes", "path"}`` as ``datasets`` has it, or an array of bytes
            ``(height, width)`` or ``(height, width, channels)``. Of a list the first one counts.
        mode: "RGB", or "L" for one channel.

    Raises:
        Unreadable: if it is none of these, or the file is missing or broken.
        ImportError: without pillow.

    Example:
        >>> read_image(np.zeros((4, 6), dtype=np.uint8)).size
        (6, 4)
        >>> read_image("nowhere.png")
        Traceback (most recent call last):
        hf_cka.data.media.Unreadable: nowhere.png: No such file or directory
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("Reading images needs pillow: pip install 'hf_cka[vision]'") from error
    if isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value):
        value = value[0]
    name = shown(value)
    try:
        if isinstance(value, np.ndarray):
            picture = Image.fromarray(value)
        elif isinstance(value, Image.Image):
            picture = value
        else:
            picture = Image.open(io.BytesIO(_content(value, "a PIL image")))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of palettes with transparency, and of broken metadata
            return ImageOps.exif_transpose(picture).convert(mode)
    except Unreadable:
        raise
    except Exception as error:  # each decoder of pillow has errors of its own
        raise Unreadable(f"{name}: {_why(error)}") from error


def read_audio(value: Any, sampling_rate: int) -> np.ndarray:
    """Return a recording as one channel at one rate, ``(samples,)`` in float32.

    Several channels are averaged, and another rate is resampled with a polyphase filter.

    Args:
        value: a file name, bytes, ``{"array", "sampling_rate"}`` or ``{"bytes", "path"}`` as ``datasets`` has them,
            or a decoder of torchcodec. An array is ``(samples,)`` or has the channels as its shorter axis.
        sampling_rate: in samples a second, of the result.

    Raises:
        Unreadable: if it is none of these, is empty or no number, or the file is missing or broken.
        ImportError: without soundfile, where a file or bytes must be read.

    Example:
        >>> read_audio({"array": np.zeros((2, 44100)), "sampling_rate": 44100}, 16000).shape
        (16000,)
        >>> read_audio(np.zeros(10), 16000)
        Traceback (most recent call last):
        hf_cka.data.media.Unreadable: ndarray: a file name, bytes or {'array', 'sampling_rate'} is needed
    """
    name = shown(value)
    if hasattr(value, "get_all_samples"):
        decoded = value.get_all_samples()
        samples, rate = np.asarray(decoded.data), int(decoded.sample_rate)
    elif isinstance(value, Mapping) and value.get("array") is not None:
        if not value.get("sampling_rate"):
            raise Unreadable(f"{name}: an array needs its sampling_rate")
        samples, rate = np.asarray(value["array"]), int(value["sampling_rate"])
    else:
        samples, rate = _decoded(_content(value, "{'array', 'sampling_rate'}"), name)
    if np.issubdtype(samples.dtype, np.integer):
        samples = samples / np.iinfo(samples.dtype).max
    if samples.ndim == 2:
        samples = samples.mean(axis=int(np.argmin(samples.shape)))
    if samples.ndim != 1 or not samples.size:
        raise Unreadable(f"{name}: it holds no samples (its shape is {samples.shape})")
    if not np.isfinite(samples).all():
        raise Unreadable(f"{name}: its samples are no numbers")
    if rate != sampling_rate:
        from scipy.signal import resample_poly

        common = math.gcd(rate, sampling_rate)
        samples = resample_poly(samples, sampling_rate // common, rate // common)
    return np.ascontiguousarray(samples, dtype=np.float32)


def shown(value: Any) -> str:
    """Return a name for a picture or a recording, for messages.

    Example:
        >>> shown({"bytes": b"", "path": "zip://cats/1.jpg::/data/pets.zip"}), shown(b"abc")
        ('pets.zip/cats/1.jpg', 'bytes')
    """
    path = value.get("path") if isinstance(value, Mapping) else value
    if not isinstance(path, str | Path):
        return type(value).__name__
    inner, _, archive = str(path).removeprefix("zip://").partition("::")
    return f"{Path(archive).name}/{inner}" if archive else inner


def read_bytes(path: str | Path) -> bytes:
    """Return the content of a file, of one inside a zip (``zip://inner::archive.zip``), or of what fsspec knows.

    Raises:
        OSError, KeyError, zipfile.BadZipFile: if it cannot be read.
    """
    text = str(path)
    if text.startswith("zip://"):
        inner, _, archive = text.removeprefix("zip://").partition("::")
        state = Path(archive).stat()
        return _archive(archive, (state.st_mtime_ns, state.st_size)).read(inner)
    if "://" in text:
        import fsspec

        with fsspec.open(text, "rb") as file:
            return file.read()
    return Path(path).expanduser().read_bytes()


@lru_cache(maxsize=4)
def _archive(path: str, state: tuple[int, int]) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)  # stays open, so that its table of contents is read once, not once a file


def _content(value: Any, other: str) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, Mapping) and value.get("bytes") is not None:
        return value["bytes"]
    path = value.get("path") if isinstance(value, Mapping) else value
    if not isinstance(path, str | Path):
        raise Unreadable(f"{shown(value)}: a file name, bytes or {other} is needed")
    try:
        return read_bytes(path)
    except Exception as error:  # a zip and fsspec have errors of their own
        raise Unreadable(f"{shown(value)}: {_why(error)}") from error


def _decoded(content: bytes, name: str) -> tuple[np.ndarray, int]:
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("Reading audio needs soundfile: pip install 'hf_cka[speech]'") from error
    try:
        samples, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except Exception as error:  # libsndfile's own
        raise Unreadable(f"{name}: {_why(error)}") from error
    return samples.mean(axis=1), int(rate)


def _why(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return "is not in the archive" if isinstance(error, KeyError) else text
