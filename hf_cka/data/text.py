"""The text of a row: which columns hold it, chats through their template, and pairs of source and target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_cka.data.batches import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXT_COLUMNS: tuple[tuple[str, ...], ...] = (
    ("text",),
    ("instruction", "input", "output"),
    ("question", "answer"),
    ("sentence",),
    ("sentence1", "sentence2"),
)
# what an encoder reads, and what its decoder writes
_PAIRS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("source",), "target"),
    (("prompt",), "completion"),
    (("document",), "summary"),
    (("article",), "highlights"),
    (("instruction", "input"), "output"),
    (("question",), "answer"),
)
# what was said in a recording, or what stands below a picture
_CAPTIONS = ("text", "sentence", "transcription", "transcript", "caption", "target")


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
        value = _column(row, text_column)
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
    for columns in _TEXT_COLUMNS:
        if all(column in row for column in columns):
            return _joined(row, columns)
    raise ValueError(
        f"Do not know which column holds the text; the columns are: {', '.join(row)}. Name it with text_column."
    )


def row_pair(
    row: str | Row, tokenizer: PreTrainedTokenizerBase | None = None, text_column: str | None = None
) -> tuple[str, str | None]:
    """Return what the encoder of an encoder-decoder reads of a row, and what its decoder should write.

    Args:
        row: ``source`` and ``target``, ``prompt`` and ``completion``, ``document`` and ``summary``, ``article`` and
            ``highlights``, ``instruction``, ``input`` and ``output``, ``question`` and ``answer``, ``translation``
            (two languages), or whatever :func:`row_text` reads, which has no target.
        tokenizer: for chat rows.
        text_column: the column to read, without a target.

    Raises:
        ValueError: as :func:`row_text`.

    Example:
        >>> row_pair({"source": "Haus", "target": "house"}), row_pair("a text")
        (('Haus', 'house'), ('a text', None))
    """
    if isinstance(row, str) or text_column is not None:
        return row_text(row, tokenizer, text_column), None
    if isinstance(row.get("translation"), dict) and len(row["translation"]) == 2:
        source, target = row["translation"].values()
        return source.strip(), target.strip()
    for columns, target in _PAIRS:
        if all(isinstance(row.get(column), str) for column in (*columns, target)):
            return _joined(row, columns), row[target].strip()
    return row_text(row, tokenizer), None


def caption(row: Row, text_column: str | None = None) -> str | None:
    """Return the text that belongs to a picture or a recording, or None.

    Args:
        row: with a picture or a recording.
        text_column: the column to read.

    Raises:
        ValueError: if the named column does not exist.

    Example:
        >>> caption({"audio": "a.wav", "sentence": " Hello. "}), caption({"image": "a.png", "label": 1})
        ('Hello.', None)
    """
    if text_column is not None:
        return str(_column(row, text_column)).strip()
    return next((row[name].strip() for name in _CAPTIONS if isinstance(row.get(name), str)), None)


def _column(row: Row, name: str) -> Any:
    if name not in row:
        raise ValueError(f"The dataset has no column {name!r}; its columns are: {', '.join(row)}.")
    return row[name]


def _joined(row: Row, columns: Sequence[str]) -> str:
    return "\n".join(str(row[column]).strip() for column in columns if str(row[column]).strip())


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
