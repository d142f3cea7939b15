"""Folders and zips of pictures or recordings, as a data set: class folders, metadata files, splits.

Nothing is decoded and nothing is extracted here: a row holds where its file is.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from hf_cka.data.media import FILE_COLUMNS, IMAGE, modality_of_file, read_bytes

_METADATA = ("metadata.csv", "metadata.jsonl")
# names of a split -> what else it is called
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}


def media_dataset(place: Path, split: str = "train") -> Any:
    """Return the pictures or recordings of a folder or a zip as a ``datasets.Dataset``.

    Folders are classes: their sorted names are the labels 0, 1, ... Where the outermost folders are splits (``train``,
    ``val``, ``test``), one of them is read. A ``metadata.csv`` or ``metadata.jsonl`` with a column ``file_name``, as
    ``datasets`` has it, gives the rows and their columns instead (``text``, ``label``).

    Args:
        place: a folder or a zip.
        split: which one, where there are several.

    Returns:
        Rows of ``image`` or ``audio`` (undecoded), and ``label`` where there are class folders.

    Raises:
        ValueError: if there are no such files, both kinds, or no such split.

    Example:
        >>> media_dataset(Path("pets")).features["label"].names  # doctest: +SKIP
        ['cat', 'dog']
    """
    from datasets import Audio, ClassLabel, Dataset, Image

    inside = _files(place)
    inside = _of_split(inside, split, place)
    media = {name: modality for name in inside if (modality := modality_of_file(name))}
    kinds = sorted(set(media.values()))
    if len(kinds) != 1:
        raise ValueError(
            f"{str(place)!r} holds both images and audio; give a folder or a zip of one of them."
            if kinds
            else f"{str(place)!r} holds no image and no audio file, nor a data set of datasets (save_to_disk). Give a "
            "folder or a zip of jpg, png, bmp, webp or of wav, flac, ogg, mp3, or a txt, jsonl, csv or parquet file."
        )
    modality = kinds[0]
    feature = (Image if modality == IMAGE else Audio)(decode=False)
    metadata = next((name for name in inside if name in _METADATA), None)
    if metadata is not None:
        rows = [_with_file(row, modality, inside, metadata, place) for row in _rows(metadata, inside[metadata])]
        return Dataset.from_list(rows).cast_column(modality, feature)
    names = sorted(media)
    columns: dict[str, Any] = {modality: [inside[name] for name in names]}
    classes = sorted({PurePosixPath(name).parts[0] for name in names if "/" in name})
    if not classes:
        return Dataset.from_dict(columns).cast_column(modality, feature)
    alone = [name for name in names if "/" not in name]
    if alone:
        raise ValueError(
            f"{str(place)!r} holds class folders, and {len(alone)} files beside them (first: {alone[0]}), which are of "
            "no class. Move them into a class folder, or give one folder without folders in it."
        )
    columns["label"] = [classes.index(PurePosixPath(name).parts[0]) for name in names]
    dataset = Dataset.from_dict(columns).cast_column(modality, feature)
    return dataset.cast_column("label", ClassLabel(names=classes))


def with_media(dataset: Any, folder: Path) -> Any:
    """Return a data set whose column of file names, if it has one, says where the files are.

    Args:
        dataset: of a jsonl, csv or other file.
        folder: of that file: relative names start there.

    Returns:
        The data set with a column ``image`` or ``audio`` in place of the names, or as it was.

    Example:
        >>> with_media(load_dataset("json", data_files="speech.jsonl"), Path("."))  # doctest: +SKIP
    """
    from datasets import Audio, Image

    for column in (*FILE_COLUMNS, "image", "audio"):
        if column not in dataset.column_names or not len(dataset):
            continue
        names = dataset[column]
        kinds = {modality_of_file(name) if isinstance(name, str) else None for name in names}
        if len(kinds) == 1 and (modality := kinds.pop()):
            places = [name if "://" in name or Path(name).is_absolute() else str(folder / name) for name in names]
            feature = (Image if modality == IMAGE else Audio)(decode=False)
            return dataset.remove_columns(column).add_column(modality, places).cast_column(modality, feature)
    return dataset


def choose_split(names: Iterable[str], split: str) -> str | None:
    """Return which of the names is a split, also under its other usual names, or None.

    Example:
        >>> choose_split(["train", "val"], "validation"), choose_split(["cat", "dog"], "test")
        ('val', None)
    """
    known = list(names)
    wanted = next((others for others in _SPLITS.values() if split in others), ())
    return next((name for name in (split, *wanted) if name in known), None)


def _files(place: Path) -> dict[str, str]:
    """Return the files below a place, in order: name inside of it, with slashes -> where it is."""
    if place.is_dir():
        found = {file.relative_to(place).as_posix(): str(file.resolve()) for file in place.rglob("*") if file.is_file()}
    else:
        try:
            with zipfile.ZipFile(place) as archive:
                inner = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
        except zipfile.BadZipFile as error:
            raise ValueError(f"{str(place)!r} is no zip file: {error}. Is it complete?") from error
        found = {name: f"zip://{name}::{place.resolve()}" for name in inner}
    kept = {name: where for name, where in sorted(found.items()) if not _hidden(name)}
    # a zip of one folder is that folder
    if place.is_file() and len({name.split("/")[0] for name in kept}) == 1 and all(n.count("/") > 1 for n in kept):
        kept = {name.split("/", 1)[1]: where for name, where in kept.items()}
    return kept


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def _of_split(inside: dict[str, str], split: str, place: Path) -> dict[str, str]:
    outermost = {name.split("/")[0] for name in inside if modality_of_file(name) and "/" in name}
    if not outermost or not outermost <= {other for others in _SPLITS.values() for other in others}:
        return inside
    chosen = choose_split(outermost, split)
    if chosen is None:
        raise ValueError(
            f"{str(place)!r} has no split {split!r}; it has {', '.join(sorted(outermost))}. Name one with --split."
        )
    return {name.split("/", 1)[1]: where for name, where in inside.items() if name.startswith(f"{chosen}/")}


def _rows(name: str, where: str) -> list[dict[str, Any]]:
    text = read_bytes(where).decode("utf-8-sig")
    if name.endswith(".csv"):
        return [dict(row) for row in csv.DictReader(io.StringIO(text))]
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _with_file(
    row: Mapping[str, Any], modality: str, inside: Mapping[str, str], metadata: str, place: Path
) -> dict[str, Any]:
    if not isinstance(row.get("file_name"), str):
        raise ValueError(f"{metadata} needs a column 'file_name' in every row; its columns are: {', '.join(row)}.")
    name = PurePosixPath(row["file_name"]).as_posix()
    others = {key: value for key, value in row.items() if key != "file_name"}
    label = others.get("label")
    if isinstance(label, str) and label.isdecimal():  # a csv knows no numbers
        others["label"] = int(label)
    missing = str(place / name) if place.is_dir() else f"zip://{name}::{place.resolve()}"  # said when it is read
    return {modality: inside.get(name, missing), **others}
