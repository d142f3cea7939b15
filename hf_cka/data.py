"""Turn texts, chats and datasets into calibration batches.

Everything here is about data: no model is touched, and nothing is decided.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = Mapping[str, Any]
Row = Mapping[str, Any]

# file suffix -> (builder of the datasets library, its options)
_FILE_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {"sample_by": "paragraph"}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".parquet": ("parquet", {}),
}


@dataclass(frozen=True)
class CalibrationInfo:
    """What calibration data was: enough to say in a record, never the data itself.

    Args:
        num_samples: rows that were measured.
        num_tokens: their tokens, padding not counted.
        hash: digest of the samples' token ids, the same for any batch size, padding and order.
        source: where the rows came from, as far as it is known.
        seed: of the draw, if there was one.
        max_length: tokens after which rows were cut, if they were.
    """

    num_samples: int
    num_tokens: int
    hash: str
    source: str | None = None
    seed: int | None = None
    max_length: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON data."""
        return asdict(self)


class CalibrationBatches(list[dict[str, torch.Tensor]]):
    """A list of model-ready batches that remembers where it came from (``source``, ``seed``, ``max_length``)."""

    def __init__(
        self,
        batches: Iterable[dict[str, torch.Tensor]],
        *,
        source: str | None = None,
        seed: int | None = None,
        max_length: int | None = None,
    ) -> None:
        super().__init__(batches)
        self.source, self.seed, self.max_length = source, seed, max_length


def calibration(
    texts_or_dataset: Iterable[str] | Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int = 128,
    max_length: int = 512,
    seed: int = 0,
    *,
    batch_size: int = 8,
    text_column: str | None = None,
    source: str | None = None,
) -> CalibrationBatches:
    """Draw samples and tokenize them into padded batches.

    A row is a string, or a mapping with ``text``, ``messages`` (chat), ``prompt`` and ``completion``,
    ``instruction`` / ``input`` / ``output``, or one or two sentence columns. Text is cut after its last visible
    character, and a chat after the last message's content: the tokens a template appends are the same for every
    sample, so a last-token readout there would be constant and its similarity undefined.

    Args:
        texts_or_dataset: strings or rows; anything indexable is sampled without replacement, a plain iterator is
            read from its start.
        tokenizer: of the model that will be measured. Its padding side does not matter.
        num_samples: rows to draw; all rows if there are fewer.
        max_length: tokens after which a row is cut.
        seed: of the draw.
        batch_size: rows a batch. Measurements do not depend on it.
        text_column: the column to read, when it is none of the above.
        source: a name for the record ("wikitext-2, validation").

    Returns:
        A list of dicts of tensors, ``input_ids`` and ``attention_mask`` of shape ``(batch, tokens)``.

    Raises:
        ValueError: if there is no usable text, a column does not exist, or a number is out of range.

    Example:
        >>> from transformers import AutoTokenizer
        >>> batches = calibration(["one text", "another"], AutoTokenizer.from_pretrained(...))  # doctest: +SKIP
    """
    for name, value in (("num_samples", num_samples), ("max_length", max_length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    texts = []
    for row in _draw(texts_or_dataset, num_samples, seed):
        text = row_text(row, tokenizer, text_column)
        if text:
            texts.append(text)
    if not texts:
        raise ValueError("The calibration data holds no text: pass at least two non-empty samples.")
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None and batch_size > 1:
        raise ValueError("The tokenizer has no pad and no eos token: set tokenizer.pad_token, or use batch_size=1.")
    rows = [tokenizer(text, truncation=True, max_length=max_length)["input_ids"] for text in texts]
    rows = [row for row in rows if row]
    # Rows of like length share a batch, so that little is spent on padding.
    rows.sort(key=len)
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    batches = []
    for start in range(0, len(rows), batch_size):
        ids, mask = pad(rows[start : start + batch_size], filler or 0)
        batches.append({"input_ids": ids, "attention_mask": mask})
    return CalibrationBatches(batches, source=source, seed=seed, max_length=max_length)


def load_rows(dataset: str, split: str = "train") -> Any:
    """Load a local file (txt, jsonl, json, csv, parquet) or a dataset of the Hub.

    Args:
        dataset: a path, or a Hub id, optionally with a configuration after a colon (``"wikitext:wikitext-2-raw-v1"``).
        split: the split of a Hub dataset. A local file has only ``train``.

    Returns:
        A ``datasets.Dataset``. A txt file gives one row a paragraph, in the column ``text``.

    Raises:
        FileNotFoundError, ValueError: as :func:`file_builder`.
        ImportError: without the ``datasets`` library.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("Reading datasets needs the datasets library: pip install 'hf_cka[data]'") from error
    builder = file_builder(dataset)
    if builder is not None:
        name, options = builder
        return load_dataset(name, data_files=str(Path(dataset).expanduser()), split="train", **options)
    name, _, configuration = dataset.partition(":")
    return load_dataset(name, configuration or None, split=split)


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
    if suffix not in _FILE_BUILDERS and not path.exists():
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


def row_text(row: str | Row, tokenizer: PreTrainedTokenizerBase | None = None, text_column: str | None = None) -> str:
    """Return the text of one row.

    Args:
        row: a string, or a mapping as :func:`calibration` describes.
        tokenizer: for chat rows, whose template it holds.
        text_column: the column to read.

    Raises:
        ValueError: if the column does not exist or no known column is there; the message lists the columns.

    Example:
        >>> row_text({"instruction": "Add.", "input": "1 and 2", "output": "3"})
        'Add.\\n1 and 2\\n3'
        >>> row_text({"body": "text"}, text_column="text")
        Traceback (most recent call last):
        ValueError: The dataset has no column 'text'; its columns are: body.
    """
    if isinstance(row, str):
        return row.strip()
    if text_column is not None:
        if text_column not in row:
            raise ValueError(f"The dataset has no column {text_column!r}; its columns are: {', '.join(row)}.")
        value = row[text_column]
        return (
            _chat_text(value, tokenizer)
            if isinstance(value, Sequence) and not isinstance(value, str)
            else value.strip()
        )
    if "messages" in row:
        return _chat_text(row["messages"], tokenizer)
    if "prompt" in row and "completion" in row:
        if isinstance(row["prompt"], str):
            return (row["prompt"] + row["completion"]).strip()
        return _chat_text([*row["prompt"], *row["completion"]], tokenizer)
    for columns in (
        ("text",),
        ("instruction", "input", "output"),
        ("question", "answer"),
        ("sentence",),
        ("sentence1", "sentence2"),
    ):
        if all(column in row for column in columns):
            return "\n".join(str(row[column]).strip() for column in columns if str(row[column]).strip())
    raise ValueError(
        f"Do not know which column holds the text; the columns are: {', '.join(row)}. Name it with text_column."
    )


def pad(sequences: Sequence[Sequence[int]], value: int, side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Pad token ids to one length and return them with their attention mask, each ``(rows, longest)``.

    Example:
        >>> ids, mask = pad([[5, 6], [7]], 0, "left")
        >>> ids.tolist(), mask.tolist()
        ([[5, 6], [0, 7]], [[1, 1], [0, 1]])
    """
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), value, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), longest) if side == "left" else slice(0, len(sequence))
        ids[row, place] = torch.tensor(sequence, dtype=torch.long)
        mask[row, place] = 1
    return ids, mask


def sample_digests(input_ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
    """Return one digest a row of the tokens that the mask keeps, whatever the padding.

    Args:
        input_ids: ``(batch, tokens)``.
        mask: ``(batch, tokens)``, true where there is a token.
    """
    ids, keep = input_ids.cpu(), mask.cpu().bool()
    return [hashlib.sha256(ids[i][keep[i]].to(torch.int64).numpy().tobytes()).hexdigest() for i in range(len(ids))]


def _draw(data: Iterable[Any], count: int, seed: int) -> Iterator[Any]:
    if isinstance(data, str):
        raise ValueError("Expected many texts, got one string: pass a list of texts.")
    if hasattr(data, "__getitem__") and isinstance(data, Sized):
        chosen = random.Random(seed).sample(range(len(data)), min(count, len(data)))
        return (data[i] for i in chosen)
    return islice(data, count)


def _chat_text(messages: Sequence[Row], tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return "\n".join(str(message["content"]).strip() for message in messages)
    text = str(tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False))
    bos = tokenizer.bos_token
    if bos and text.startswith(bos) and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        text = text[len(bos) :]  # the tokenizer puts it back
    last = str(messages[-1]["content"]).strip()
    end = text.rfind(last)
    return text[: end + len(last)] if last and end >= 0 else text.strip()
