"""Where rows come from: local files, folders, zips, and data sets of the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_cka.data.folders import choose_split, media_dataset, with_media

# file suffix -> (builder of the datasets library, its options)
_FILE_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {"sample_by": "paragraph"}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".parquet": ("parquet", {}),
}


def load_rows(dataset: str, split: str = "train") -> Any:
    """Load a local file, a folder or zip of images or audio, a saved data set, or a dataset of the Hub.

    Args:
        dataset: a txt, jsonl, json, csv or parquet file; a folder or a zip of pictures or recordings (see
            :func:`hf_cka.data.folders.media_dataset`); a folder of ``datasets.save_to_disk``; or a Hub id, optionally
            with a configuration after a colon (``"wikitext:wikitext-2-raw-v1"``).
        split: the split of a Hub dataset, a saved one, or a folder of splits. A local file has only ``train``.

    Returns:
        A ``datasets.Dataset``. A txt file gives one row a paragraph, in the column ``text``. Names of picture and
        sound files, relative to the file they stand in, become the column ``image`` or ``audio``.

    Raises:
        FileNotFoundError, ValueError: as :func:`file_builder` and :func:`hf_cka.data.folders.media_dataset`.
        ImportError: without the ``datasets`` library.

    Example:
        >>> load_rows("pictures.zip")[0]["label"]  # doctest: +SKIP
        0
    """
    try:
        from datasets import load_dataset, load_from_disk
    except ImportError as error:
        raise ImportError("Reading datasets needs the datasets library: pip install 'hf_cka[data]'") from error
    path = Path(dataset).expanduser()
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = load_from_disk(str(path))
        if not isinstance(saved, dict):
            return saved
        chosen = choose_split(saved, split)
        if chosen is None:
            raise ValueError(f"{dataset!r} has no split {split!r}; it has {', '.join(saved)}. Name one with --split.")
        return saved[chosen]
    if is_collection(dataset):
        return media_dataset(path, split)
    builder = file_builder(dataset)
    if builder is not None:
        name, options = builder
        return with_media(load_dataset(name, data_files=str(path), split="train", **options), path.resolve().parent)
    name, _, configuration = dataset.partition(":")
    return load_dataset(name, configuration or None, split=split)


def is_collection(dataset: str) -> bool:
    """Say whether a data set is a local folder or a zip, which ``datasets`` has no file builder for.

    Example:
        >>> is_collection("stanfordnlp/imdb"), is_collection("texts.jsonl")
        (False, False)
    """
    path = Path(dataset).expanduser()
    return path.is_dir() or (path.suffix.lower() == ".zip" and path.is_file())


def file_builder(dataset: str) -> tuple[str, dict[str, Any]] | None:
    """Return the builder of the ``datasets`` library for a local file, and its options; None for a Hub id.

    Raises:
        FileNotFoundError: if it looks like a file and is not there.
        ValueError: if the file is of another kind.

    Example:
        >>> file_builder("stanfordnlp/imdb")
        >>> file_builder("nowhere.jsonl")
        Traceback (most recent call last):
        FileNotFoundError: There is no file 'nowhere.jsonl'. Give a .txt, ... file or a Hub id.
    """
    path = Path(dataset).expanduser()
    suffix = path.suffix.lower()
    if suffix not in (*_FILE_BUILDERS, ".zip") and not path.exists():
        return None
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {dataset!r}. Give a {', '.join(_FILE_BUILDERS)} file or a Hub id.")
    if suffix not in _FILE_BUILDERS:
        raise ValueError(f"Cannot read {dataset!r}: its suffix is none of {', '.join(_FILE_BUILDERS)}.")
    return _FILE_BUILDERS[suffix]


def public_name(name: str | None) -> str | None:
    """Return the name of a model or a data set without the folders of this machine; a Hub id stays as it is.

    Records are published with what they describe, and a path says nothing to others.

    Example:
        >>> public_name("/home/me/data.jsonl"), public_name("HuggingFaceTB/SmolLM2-135M"), public_name("")
        ('data.jsonl', 'HuggingFaceTB/SmolLM2-135M', None)
    """
    if not name:
        return None
    path = Path(name).expanduser()
    return path.name if path.is_absolute() or path.exists() else name
