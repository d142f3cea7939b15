"""Classification: with the head of a sequence-classification model, or by the likelihood of a word for each label.

Rows are as GLUE's: ``{"sentence": str, "label": int}``, or ``sentence1`` and ``sentence2``, or ``text``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from hf_cka.data import row_text
from hf_cka.evaluation.multiple_choice import multiple_choice
from hf_cka.evaluation.running import context_limit, input_device, measuring
from hf_cka.lookup import lookup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Classification:
    """How often the most likely label was the right one.

    Args:
        accuracy: in [0, 1].
        n: rows.
        labels: right label of each row, by index.
        predictions: most likely label of each row.
        skipped: pictures or recordings that could not be read, and why.
    """

    accuracy: float
    n: int
    labels: tuple[int, ...]
    predictions: tuple[int, ...]
    skipped: tuple[str, ...] = ()

    @property
    def standard_error(self) -> float:
        """Of the accuracy, as a binomial proportion: ``sqrt(p (1 - p) / n)``."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.n)

    @property
    def majority(self) -> float:
        """Accuracy of always saying the most frequent label: what a score should be held against.

        Example:
            >>> Classification(0.75, 4, (0, 0, 0, 1), (0, 0, 0, 0)).majority
            0.75
        """
        return max(self.labels.count(label) for label in set(self.labels)) / self.n


def classify(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    batch_size: int = 16,
    progress: bool = True,
) -> Classification:
    """Classify rows with the head of a sequence-classification model.

    Args:
        model: ``AutoModelForSequenceClassification``; its training mode is put back afterwards.
        tokenizer: of the model. Without a pad token rows go through the model one at a time.
        rows: ``label`` (index, or name as in the config's ``label2id``) and ``sentence``, ``sentence1`` and
            ``sentence2``, or ``text``.
        batch_size: rows a forward pass; the result does not depend on it.
        progress: show a bar if it takes longer than two seconds.

    Raises:
        ValueError: if there are no rows, a row lacks a column, has an unknown label or is longer than the model's
            context, or the model has no classification head or gives no numbers.

    Example:
        >>> result = classify(model, tokenizer, [{"sentence": "good", "label": 1}])  # doctest: +SKIP
    """
    if not type(model).__name__.endswith("ForSequenceClassification"):
        raise ValueError(
            f"classify needs AutoModelForSequenceClassification, but {type(model).__name__} is none. "
            "For a causal language model use classify_by_words, with a word for each label."
        )
    config = model.config
    if config.num_labels < 2:
        raise ValueError(
            f"The head of {type(model).__name__} gives one number (a regression), so there are no classes."
        )
    _check(rows, batch_size)
    labels = tuple(_label(row, index, config.num_labels, config.label2id) for index, row in enumerate(rows))
    limit = context_limit(model)
    encoded = []
    for index, row in enumerate(rows):
        pair = (row["sentence1"], row["sentence2"]) if {"sentence1", "sentence2"} <= set(row) else (row_text(row),)
        inputs = tokenizer(*pair)
        if limit is not None and len(inputs["input_ids"]) > limit:
            raise ValueError(
                f"Row {index} has {len(inputs['input_ids'])} tokens, more than the model's {limit} positions; "
                "shorten it."
            )
        encoded.append(inputs)
    # A decoder's head reads the last token that is not the config's pad token, so it must be padded with that one.
    if config.pad_token_id is None or tokenizer.pad_token_id != config.pad_token_id:
        batch_size = 1
    device = input_device(model)
    order = sorted(range(len(rows)), key=lambda at: len(encoded[at]["input_ids"]), reverse=True)
    predictions = [0] * len(rows)
    bar = tqdm(total=len(rows), desc="classification", unit="row", disable=not progress, delay=2)
    with measuring(model), bar:
        for at in range(0, len(order), batch_size):
            batch = order[at : at + batch_size]
            joined = {key: [encoded[row][key] for row in batch] for key in encoded[batch[0]]}
            tensors = dict(tokenizer.pad(joined, padding_side="right")) if len(batch) > 1 else joined
            logits = model(**{key: torch.tensor(value, device=device) for key, value in tensors.items()}).logits.float()
            for place, scores in zip(batch, logits, strict=True):
                if not torch.isfinite(scores).all():
                    raise ValueError(f"The logits of row {place} are no numbers. Check the weights, or use float32.")
                predictions[place] = int(scores.argmax())
            bar.update(len(batch))
    return _result(labels, tuple(predictions))


def classify_by_words(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    words: Sequence[str],
    *,
    template: str = "{text}\nLabel:",
    batch_size: int = 16,
    progress: bool = True,
) -> Classification:
    """Classify rows with a causal language model, by the log-likelihood of a word for each label.

    Args:
        model: a causal language model.
        tokenizer: of the model.
        rows: ``label`` (index, or one of ``words``) and text as :func:`hf_cka.data.row_text` finds it.
        words: one for each label, in the order of the labels.
        template: the prompt before the word; ``{text}`` is the row's text, other columns go by their names.
        batch_size: prompts with a word a forward pass.
        progress: show a bar if it takes longer than two seconds.

    Raises:
        ValueError: as :func:`classify` and :func:`multiple_choice`.

    Example:
        >>> classify_by_words(model, tokenizer, rows, ["negative", "positive"],
        ...     template="Review: {text}\\nSentiment:").accuracy  # doctest: +SKIP
    """
    _check(rows, batch_size)
    if len(words) < 2:
        raise ValueError(f"Give a word for each label, at least 2, got {list(words)}.")
    names = {word: index for index, word in enumerate(words)}
    labels = tuple(_label(row, index, len(words), names) for index, row in enumerate(rows))
    questions = [
        {**row, "text": row_text(row), "choices": list(words), "gold": label}
        for row, label in zip(rows, labels, strict=True)
    ]
    result = multiple_choice(model, tokenizer, questions, template=template, batch_size=batch_size, progress=progress)
    return _result(labels, tuple(item.choice() for item in result.items))


def _result(labels: tuple[int, ...], predictions: tuple[int, ...]) -> Classification:
    right = sum(a == b for a, b in zip(labels, predictions, strict=True))
    return Classification(right / len(labels), len(labels), labels, predictions)


def _label(row: Row, index: int, count: int, names: Mapping[str, int]) -> int:
    label = row["label"]
    if isinstance(label, str):
        return lookup(names, label, f"label of row {index}")
    if not isinstance(label, int) or not 0 <= label < count:
        raise ValueError(f"Row {index}: label={label!r} must be an index from 0 to {count - 1}.")
    return int(label)


def _check(rows: Sequence[Row], batch_size: int) -> None:
    if not len(rows):
        raise ValueError("There are no rows to measure on; give at least one {'sentence': ..., 'label': 0}.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    for index, row in enumerate(rows):
        if "label" not in row:
            raise ValueError(f"Row {index} has no column 'label'; its columns are {sorted(row)}.")
