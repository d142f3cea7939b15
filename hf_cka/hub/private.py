"""Find what must not leave a machine in a folder: its paths, and access tokens. Reads, never writes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

_TEXT = {
    "", ".cfg", ".csv", ".htm", ".html", ".ini", ".ipynb", ".jinja", ".json", ".jsonl", ".log", ".md", ".py", ".sh",
    ".svg", ".toml", ".txt", ".yaml", ".yml",
}  # fmt: skip
# Vocabularies hold every kind of string; only what is around them is looked at.
_VOCABULARIES = {"merges.txt", "vocab.json", "vocab.txt"}
_TOKEN = re.compile(r"(?<![A-Za-z0-9_])(?:hf|api_org)_[A-Za-z0-9]{30,}")
# Where home folders, scratch disks and mounts are; a URL's path does not count, as a letter, colon or slash is before.
_PATH = re.compile(
    r"(?<![\w.:/\\~-])(?:"
    r"/(?:home|Users|root|tmp|mnt|media|private|scratch|workspaces?|data|fsx|gpfs|lustre|nfs|opt|srv|var|content)"
    r"/[\w.@~+-][^\s\"'`<>)\]},;|]*"
    # not every drive letter: "A:\n" in a prompt is no path
    r"|[A-Za-z]:\\{1,2}(?:Users|Windows|Temp|home|data)\\{1,2}[^\s\"'`<>)\]},;|]*"
    r")"
)
_WHOLE = re.compile(r"(?:/[\w.@~+ -]+){2,}/?|[A-Za-z]:[\\/][\w.].*|\\\\[\w.-]+\\.+|file://.+")


@dataclass(frozen=True)
class Finding:
    """Something that must not be published.

    Attributes:
        file: where it is, relative to the folder.
        place: the line, or the key in a JSON file.
        kind: "path" or "token".
        text: what was found; of a token only the first characters.
    """

    file: str
    place: str
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}, {self.place}: {self.kind} {self.text}"


def find_private(
    folder: str | os.PathLike[str], *, tokens: tuple[str, ...] = (), ignored: tuple[str, ...] = ()
) -> list[Finding]:
    """Return the machine paths and access tokens in the text files of a folder, and in the headers of its weights.

    Args:
        folder: what is to be published.
        tokens: further secrets to look for, letter by letter.
        ignored: glob patterns of files that will not be published.

    Returns:
        The findings, in the order of the files. Binary files are not searched, except for safetensors headers.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "notes.md").write_text("trained on /home/alice/data.jsonl")
        ...     print(*find_private(folder))
        notes.md, line 1: path /home/alice/data.jsonl
    """
    root = Path(folder)
    here = {str(root.absolute()), str(root.resolve()), str(Path.cwd()), str(Path.home())}
    known = tuple(place for place in here if place.count(os.sep) > 1)
    found = []
    for file in sorted(path for path in root.rglob("*") if path.is_file()):
        name = file.relative_to(root)
        if any(fnmatch(name.as_posix(), pattern) for pattern in ignored):
            continue
        for place, text, whole in _strings(file):
            found += [Finding(name.as_posix(), place, *hit) for hit in _hits(text, whole, known, tokens)]
    return found


def find_private_text(text: str, file: str, *, tokens: tuple[str, ...] = ()) -> list[Finding]:
    """Return the machine paths and access tokens in one text.

    Args:
        text: to search.
        file: its name, for the findings.
        tokens: further secrets to look for.

    Example:
        >>> find_private_text("see https://example.org/home/page", "README.md")
        []
    """
    known = tuple(place for place in {str(Path.cwd()), str(Path.home())} if place.count(os.sep) > 1)
    return [
        Finding(file, f"line {number}", *hit)
        for number, line in enumerate(text.splitlines(), 1)
        for hit in _hits(line, False, known, tokens)
    ]


def _hits(text: str, whole: bool, known: tuple[str, ...], tokens: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    secrets = {match.group() for match in _TOKEN.finditer(text)} | {token for token in tokens if token in text}
    for secret in sorted(secrets):
        yield "token", f"{secret[:6]}..."
    paths = {match.group() for match in _PATH.finditer(text)}
    if whole and _WHOLE.fullmatch(text):
        paths.add(text)
    paths |= {place for place in known if place in text and not any(place in path for path in paths)}
    for path in sorted(paths):
        yield "path", path


def _strings(file: Path) -> Iterator[tuple[str, str, bool]]:
    """Every (place, text, whether it is a whole value) of a file that can hold a path or a token."""
    if file.suffix == ".safetensors":
        yield from _values(_safetensors_metadata(file), "__metadata__")
        return
    if file.suffix.lower() not in _TEXT or file.name in _VOCABULARIES:
        return
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return
    if file.suffix == ".json":
        try:
            data = json.loads(text)
        except json.JSONDecodeError:
            data = None
        if isinstance(data, dict | list):
            if file.name == "tokenizer.json" and isinstance(data, dict):
                data = {name: value for name, value in data.items() if name not in ("model", "added_tokens")}
            yield from _values(data, "")
            return
    for number, line in enumerate(text.splitlines(), 1):
        yield f"line {number}", line, False


def _values(data: Any, place: str) -> Iterator[tuple[str, str, bool]]:
    if isinstance(data, dict):
        for name, value in data.items():
            yield f"key of {place or 'the file'}", str(name), False
            yield from _values(value, f"{place}.{name}".lstrip("."))
    elif isinstance(data, list):
        for number, value in enumerate(data):
            yield from _values(value, f"{place}[{number}]")
    elif isinstance(data, str):
        yield place, data, True


def _safetensors_metadata(file: Path) -> dict[str, Any]:
    """What stands beside the tensors, without reading them: 8 bytes of length, then JSON."""
    with file.open("rb") as source:
        length = int.from_bytes(source.read(8), "little")
        if length > file.stat().st_size:
            return {}  # not a safetensors file; loading it says so better
        return json.loads(source.read(length)).get("__metadata__") or {}
