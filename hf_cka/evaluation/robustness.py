"""How quality falls when the text a model reads is damaged: typos, changed casing, dropped words.

Only what is read is damaged; the continuation that is scored, or the choices of a question, stay as they were. So every
row of the result scores the very same tokens, and a perplexity under typos is not the perplexity *of* typos.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from tqdm.auto import tqdm

from hf_cka.data import pad
from hf_cka.evaluation.multiple_choice import TEMPLATE, multiple_choice
from hf_cka.evaluation.running import check_causal, context_limit, filler_id, input_device, measuring
from hf_cka.lookup import lookup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# neighbours on a QWERTY keyboard, by row
_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_WORD = re.compile(r"(\S+)(\s*)")


def typos(text: str, rate: float, rng: random.Random) -> str:
    """Damage letters: each, with probability ``rate``, is left out, doubled, or hit beside its key (a third each).

    Args:
        text: any text; what is no letter of a QWERTY keyboard stays.
        rate: share of letters, 0 to 1.
        rng: decides.

    Example:
        >>> typos("nothing happens", 0.0, random.Random(0))
        'nothing happens'
    """
    out = []
    for letter in text:
        hit, kind, side = rng.random(), rng.random(), rng.random()
        near = _neighbours(letter)
        if hit >= rate or not near:
            out.append(letter)
        elif kind < 1 / 3:
            continue
        elif kind < 2 / 3:
            out.append(letter * 2)
        else:
            out.append(near[int(side * len(near))])
    return "".join(out)


def casing(text: str, rate: float, rng: random.Random) -> str:
    """Change the casing of words: each, with probability ``rate``, swaps upper and lower case.

    Args:
        text: any text.
        rate: share of words, 0 to 1.
        rng: decides.

    Example:
        >>> casing("The cat sat", 1.0, random.Random(0))
        'tHE CAT SAT'
    """
    return "".join(_each_word(text, rate, rng, lambda word, space: word.swapcase() + space))


def dropped_words(text: str, rate: float, rng: random.Random) -> str:
    """Leave words out, each with probability ``rate``, with the space after it; one word always stays.

    Args:
        text: any text.
        rate: share of words, 0 to 1.
        rng: decides.

    Example:
        >>> dropped_words("The cat sat", 1.0, random.Random(0))
        'The '
    """
    kept = "".join(_each_word(text, rate, rng, lambda word, space: ""))
    first = _WORD.search(text)
    return kept or (first[0] if first else "")


# the ways to damage a text; at one seed, what a lower rate damages a higher one does too
DAMAGES: dict[str, Callable[[str, float, random.Random], str]] = {
    "typos": typos,
    "casing": casing,
    "dropped words": dropped_words,
}


@dataclass(frozen=True)
class Robustness:
    """Quality under one kind of damage at one rate.

    Args:
        damage: "none" or a name of ``DAMAGES``.
        rate: share of letters or words, 0 to 1.
        perplexity: of the clean continuations given the damaged contexts; infinite where it overflows.
        accuracy: share of continuation tokens that the model thought most likely.
        tokens: continuation tokens scored, the same in every row.
    """

    damage: str
    rate: float
    perplexity: float
    accuracy: float
    tokens: int


@dataclass(frozen=True)
class ChoiceRobustness:
    """Accuracy on multiple-choice questions under one kind of damage at one rate.

    Args:
        damage: "none" or a name of ``DAMAGES``.
        rate: share of letters or words of the question, 0 to 1.
        accuracy: by log-likelihood as it is.
        accuracy_norm: by log-likelihood per character of the choice.
        n: questions, the same in every row.
    """

    damage: str
    rate: float
    accuracy: float
    accuracy_norm: float
    n: int


def robustness(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str | Mapping[str, Any]],
    *,
    damages: Sequence[str] = tuple(DAMAGES),
    rates: Sequence[float] = (0.05, 0.2),
    seed: int = 0,
    max_context: int = 128,
    max_continuation: int = 64,
    batch_size: int = 8,
    progress: bool = True,
) -> tuple[Robustness, ...]:
    """Measure next-token accuracy and perplexity on clean continuations of damaged contexts.

    Args:
        model: a causal language model; its training mode is put back afterwards.
        tokenizer: of the model.
        texts: texts, split at the white space nearest to their middle; or plain rows with ``prompt`` and
            ``completion``.
        damages: names of ``DAMAGES``.
        rates: shares of letters or words that are damaged, above 0 and at most 1.
        seed: of the damage, which is the same for every model.
        max_context: tokens of a context, its last ones.
        max_continuation: tokens of a continuation, its first ones.
        batch_size: rows a forward pass.
        progress: show a bar if it takes longer than two seconds.

    Returns:
        The clean row first, then one row for each damage and rate.

    Raises:
        ValueError: for an unknown damage (near names are listed), a rate out of range, no text that can be split, a
            model that is not causal, or one whose context is too short.

    Example:
        >>> rows = robustness(model, tokenizer, texts, rates=(0.1,))  # doctest: +SKIP
        >>> rows[1].damage, rows[1].perplexity > rows[0].perplexity  # doctest: +SKIP
        ('typos', True)
    """
    check_causal(model, "robustness")
    cases = _cases(damages, rates)
    limit = context_limit(model)
    if limit is not None and max_context + max_continuation > limit:
        raise ValueError(
            f"max_context={max_context} and max_continuation={max_continuation} exceed the model's {limit} positions."
        )
    parts = [part for text in texts if (part := _split(text)) is not None]
    if not parts:
        raise ValueError("No text has two words, so none can be split into a context and a continuation.")
    found = []
    for name, rate in tqdm(cases, desc="robustness", unit="case", disable=not progress, delay=2):
        rows = []
        for index, (context, continuation) in enumerate(parts):
            damaged = _damaged(context, name, rate, seed, index)
            read = tokenizer(damaged, verbose=False)["input_ids"][-max_context:]
            scored = tokenizer(continuation, add_special_tokens=False, verbose=False)["input_ids"][:max_continuation]
            if read and scored:
                rows.append((read, scored))
        nll, right, tokens = _score(model, tokenizer, rows, batch_size)
        mean = nll / tokens
        found.append(Robustness(name, rate, math.exp(mean) if mean < 700 else math.inf, right / tokens, tokens))
    return tuple(found)


def choice_robustness(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    *,
    damages: Sequence[str] = tuple(DAMAGES),
    rates: Sequence[float] = (0.05, 0.2),
    seed: int = 0,
    template: str = TEMPLATE,
    batch_size: int = 16,
    progress: bool = True,
) -> tuple[ChoiceRobustness, ...]:
    """Measure accuracy on multiple-choice questions whose question is damaged and whose choices are not.

    Args:
        model: a causal language model; its training mode is put back afterwards.
        tokenizer: of the model.
        rows: as :func:`hf_cka.evaluation.multiple_choice` takes them, each with a ``question``.
        damages: names of ``DAMAGES``.
        rates: shares of letters or words of the question that are damaged, above 0 and at most 1.
        seed: of the damage, which is the same for every model.
        template: the prompt; columns of the row in braces.
        batch_size: choices a forward pass.
        progress: show a bar if it takes longer than two seconds.

    Returns:
        The clean row first, then one row for each damage and rate.

    Raises:
        ValueError: for an unknown damage (near names are listed), a rate out of range, a row without a question, or
            as :func:`hf_cka.evaluation.multiple_choice`; a damaged question has more tokens than a clean one.

    Example:
        >>> rows = choice_robustness(model, tokenizer, questions, rates=(0.1,))  # doctest: +SKIP
        >>> rows[1].damage, rows[1].accuracy <= rows[0].accuracy  # doctest: +SKIP
        ('typos', True)
    """
    cases = _cases(damages, rates)
    for index, row in enumerate(rows):
        if not isinstance(row.get("question"), str):
            raise ValueError(f"Row {index} has no question as text to damage; its columns are {sorted(row)}.")
    found = []
    for name, rate in tqdm(cases, desc="robustness", unit="case", disable=not progress, delay=2):
        damaged = [
            {**row, "question": _damaged(row["question"], name, rate, seed, index)} for index, row in enumerate(rows)
        ]
        got = multiple_choice(model, tokenizer, damaged, template=template, batch_size=batch_size, progress=False)
        found.append(ChoiceRobustness(name, rate, got.accuracy, got.accuracy_norm, got.n))
    return tuple(found)


def _cases(damages: Sequence[str], rates: Sequence[float]) -> list[tuple[str, float]]:
    """Return what is measured, the clean text first; raise ValueError for what cannot be."""
    for name in damages:
        lookup(DAMAGES, name, "damage")
    for rate in rates:
        if not 0 < rate <= 1:
            raise ValueError(f"The rate {rate} must be above 0 and at most 1 (a share of letters or words).")
    return [("none", 0.0), *((name, rate) for name in damages for rate in rates)]


def _damaged(text: str, name: str, rate: float, seed: int, index: int) -> str:
    return text if name == "none" else DAMAGES[name](text, rate, random.Random(f"{seed} {index}"))


def _score(
    model: Any, tokenizer: Any, rows: Sequence[tuple[list[int], list[int]]], batch_size: int
) -> tuple[float, int, int]:
    """Return the summed loss of the second parts given the first, how many tokens were most likely, and how many."""
    device = input_device(model)
    nll, right, tokens = 0.0, 0, 0
    with measuring(model):
        for at in range(0, len(rows), batch_size):
            batch = rows[at : at + batch_size]
            ids, mask = pad([read + scored for read, scored in batch], filler_id(tokenizer))
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
            for row, (read, scored) in enumerate(batch):
                predicted = logits[row, len(read) - 1 : len(read) + len(scored) - 1].float()
                labels = torch.tensor(scored, device=predicted.device)
                nll += functional.cross_entropy(predicted, labels, reduction="none").double().sum().item()
                right += int((predicted.argmax(-1) == labels).sum())
                tokens += len(scored)
    return nll, right, tokens


def _split(text: str | Mapping[str, Any]) -> tuple[str, str] | None:
    """Return what is read and what is scored, or None for a text without two words."""
    if not isinstance(text, str):
        if not {"prompt", "completion"} <= set(text) or not isinstance(text["prompt"], str):
            raise ValueError(f"A row needs 'prompt' and 'completion' as text; its columns are {sorted(text)}.")
        return text["prompt"], text["completion"]
    text = text.strip()
    gaps = [match.start() for match in re.finditer(r"\s+", text)]
    if not gaps:
        return None
    middle = min(gaps, key=lambda gap: abs(gap - len(text) / 2))
    return text[:middle], text[middle:]


def _each_word(text: str, rate: float, rng: random.Random, change: Callable[[str, str], str]) -> list[str]:
    """Return each word with the space after it, or, with probability ``rate``, what it is changed to."""
    return [change(*match.groups()) if rng.random() < rate else match[0] for match in _WORD.finditer(text)]


def _neighbours(letter: str) -> str:
    row = next((keys for keys in _KEYS if letter.lower() in keys), "")
    place = row.find(letter.lower())
    near = (row[max(place - 1, 0) : place] + row[place + 1 : place + 2]) if row else ""
    return near.upper() if letter.isupper() else near
