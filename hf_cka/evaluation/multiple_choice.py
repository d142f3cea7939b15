"""Multiple choice by log-likelihood: which of some continuations a language model finds most likely.

Questions are rows ``{"question": str, "choices": [str, ...], "gold": int}``. Prompt and choice are tokenized together
and cut where the prompt alone ends, as lm-evaluation-harness does, so the numbers are the same on the same items.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from hf_cka.data import pad
from hf_cka.evaluation.running import check_causal, context_limit, filler_id, input_device, measuring

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE = "Question: {question}\nAnswer:"


@dataclass(frozen=True)
class ScoredItem:
    """One question: the log-likelihood of each choice, and how long each is.

    Args:
        gold: index of the right choice.
        log_likelihoods: one a choice, in nats, summed over its tokens.
        characters: length of each choice, without the space before it.
        bytes: the same in UTF-8 bytes.
    """

    gold: int
    log_likelihoods: tuple[float, ...]
    characters: tuple[int, ...]
    bytes: tuple[int, ...]

    def choice(self, lengths: Sequence[int] | None = None) -> int:
        """Return the most likely choice, each divided by its length if lengths are given; ties take the first.

        Example:
            >>> item = ScoredItem(1, (-4.0, -6.0), (2, 6), (2, 6))
            >>> item.choice(), item.choice(item.characters)
            (0, 1)
        """
        scores = self.log_likelihoods
        if lengths is not None:
            scores = tuple(score / length for score, length in zip(scores, lengths, strict=True))
        return max(range(len(scores)), key=scores.__getitem__)


@dataclass(frozen=True)
class MultipleChoice:
    """Accuracy on multiple-choice questions.

    Args:
        accuracy: by log-likelihood as it is (lm-eval's ``acc``).
        accuracy_norm: by log-likelihood per character of the choice (lm-eval's ``acc_norm``).
        accuracy_bytes: by log-likelihood per UTF-8 byte; differs from the above only where a choice is not ASCII.
        n: questions.
        items: all of them, in the order of the rows.
    """

    accuracy: float
    accuracy_norm: float
    accuracy_bytes: float
    n: int
    items: tuple[ScoredItem, ...]

    @property
    def standard_error(self) -> float:
        """Of ``accuracy``, as a binomial proportion: ``sqrt(p (1 - p) / n)``."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.n)

    @property
    def standard_error_norm(self) -> float:
        """Of ``accuracy_norm``."""
        return math.sqrt(self.accuracy_norm * (1 - self.accuracy_norm) / self.n)


def multiple_choice(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    *,
    template: str = TEMPLATE,
    batch_size: int = 16,
    progress: bool = True,
) -> MultipleChoice:
    """Answer multiple-choice questions by the log-likelihood of each choice after the prompt.

    A choice follows the prompt after one space. Rows of like length share a batch, padded on the right, which a causal
    model cannot see; the softmax is in float32 whatever the model's precision.

    Args:
        model: a causal language model; its training mode is put back afterwards.
        tokenizer: of the model. It needs no pad token.
        rows: ``question``, ``choices`` and ``gold`` (index of the right choice, from 0).
        template: the prompt; columns of the row in braces.
        batch_size: choices a forward pass; the result does not depend on it.
        progress: show a bar if it takes longer than two seconds.

    Raises:
        ValueError: if there are no rows, a row lacks a column or holds an impossible one, question and choice are
            longer than the model's context, the model is not causal, or its log-likelihoods are not numbers.

    Source: the multiple-choice scoring of lm-evaluation-harness.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
        >>> words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=3, hidden_size=8, intermediate_size=8,
        ...     num_hidden_layers=1, num_attention_heads=2))
        >>> result = multiple_choice(model, tokenizer, [{"question": "a", "choices": ["a", "b b"], "gold": 1}])
        >>> result.n, result.items[0].characters
        (1, (1, 3))
    """
    check_causal(model, "multiple_choice")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    _check_rows(rows)
    encoded: list[tuple[int, int, list[int], int]] = []  # row, choice, ids, where the choice starts
    limit = context_limit(model)
    for index, row in enumerate(rows):
        for number, (ids, start) in enumerate(_encode(tokenizer, row, index, template)):
            if limit is not None and len(ids) - 1 > limit:  # the last token is only predicted, never read
                raise ValueError(
                    f"Row {index} has {len(ids)} tokens with choice {number}, more than the model's {limit} positions; "
                    "shorten the question or leave the row out."
                )
            encoded.append((index, number, ids, start))
    scores = [[math.nan] * len(row["choices"]) for row in rows]
    for (index, number, _, _), score in zip(
        encoded, _score(model, tokenizer, encoded, batch_size, progress), strict=True
    ):
        if not math.isfinite(score):
            raise ValueError(
                f"The log-likelihood of choice {number} of row {index} is {score}: the model's logits are no numbers. "
                "Check its weights, or load it in float32."
            )
        scores[index][number] = score
    items = tuple(
        ScoredItem(
            int(row["gold"]),
            tuple(scores[index]),
            tuple(len(choice) for choice in row["choices"]),
            tuple(len(choice.encode()) for choice in row["choices"]),
        )
        for index, row in enumerate(rows)
    )
    right = [
        (item.choice() == item.gold, item.choice(item.characters) == item.gold, item.choice(item.bytes) == item.gold)
        for item in items
    ]
    plain, norm, by_bytes = (sum(column) / len(items) for column in zip(*right, strict=True))
    return MultipleChoice(plain, norm, by_bytes, len(items), items)


def _encode(tokenizer: Any, row: Mapping[str, Any], index: int, template: str) -> list[tuple[list[int], int]]:
    """Return, for each choice, the ids of prompt and choice together, and where the choice starts."""
    try:
        prompt = template.format_map(row)
    except KeyError as error:
        raise ValueError(
            f"Row {index} has no column {error} of the template; its columns are {sorted(row)}."
        ) from error
    text = prompt.rstrip()  # white space belongs to what follows it: a tokenizer merges it with the next word
    gap = prompt[len(text) :] or " "
    start = len(tokenizer(text)["input_ids"])
    found = []
    for choice in row["choices"]:
        ids = tokenizer(f"{text}{gap}{choice}")["input_ids"]
        if not 1 <= start < len(ids):
            raise ValueError(
                f"Row {index} has no tokens of its own for choice {choice!r} after its prompt {prompt!r}; check both."
            )
        found.append((ids, start))
    return found


def _score(
    model: Any, tokenizer: Any, encoded: Sequence[tuple[int, int, list[int], int]], batch_size: int, progress: bool
) -> list[float]:
    """Return the summed log-likelihood of each row's tokens from its start on."""
    device = input_device(model)
    # Only the logits that are scored are made: a vocabulary times all tokens of a batch is the largest tensor here.
    partial = "logits_to_keep" in inspect.signature(model.forward).parameters
    order = sorted(
        range(len(encoded)), key=lambda at: len(encoded[at][2]), reverse=True
    )  # too little memory shows first
    totals = [0.0] * len(encoded)
    bar = tqdm(total=len(encoded), desc="multiple choice", unit="choice", disable=not progress, delay=2)
    with measuring(model), bar:
        for at in range(0, len(order), batch_size):
            batch = order[at : at + batch_size]
            ids, mask = pad([encoded[row][2][:-1] for row in batch], filler_id(tokenizer), "right")
            first = min(encoded[row][3] for row in batch) - 1 if partial else 0
            kept = {"logits_to_keep": ids.shape[1] - first} if partial else {}
            inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
            logits = model(**inputs, use_cache=False, **kept).logits
            for place, row in enumerate(batch):
                _, _, full, start = encoded[row]
                predicted = logits[place, start - 1 - first : len(full) - 1 - first].float().log_softmax(-1)
                labels = torch.tensor(full[start:], device=predicted.device)[:, None]
                totals[row] = predicted.gather(1, labels).double().sum().item()
            bar.update(len(batch))
    return totals


def _check_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    if not len(rows):
        raise ValueError(
            "There are no rows to measure on; give at least one {'question': ..., 'choices': [...], 'gold': 0}."
        )
    for index, row in enumerate(rows):
        missing = [name for name in ("choices", "gold") if name not in row]
        if missing:
            raise ValueError(
                f"Row {index} has no column {missing[0]!r}; its columns are {sorted(row)}. "
                "Rows must have 'question', 'choices' and 'gold'."
            )
        choices, gold = row["choices"], row["gold"]
        if isinstance(choices, str) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise ValueError(f"Row {index}: choices must be at least 2 non-empty texts, got {choices!r}.")
        if not isinstance(gold, int) or not 0 <= gold < len(choices):
            raise ValueError(
                f"Row {index}: gold={gold!r} must be the index of the right choice, 0 to {len(choices) - 1}."
            )
