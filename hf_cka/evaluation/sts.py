"""Semantic textual similarity: whether sentences that people find alike lie near each other for an encoder.

Rows are as those of the STS benchmark: ``sentence1``, ``sentence2`` and ``score`` (or ``label``), a number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from tqdm.auto import tqdm

from hf_cka.data import pad
from hf_cka.evaluation.running import context_limit, filler_id, input_device, measuring

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = Mapping[str, Any]


@dataclass(frozen=True)
class SentenceSimilarity:
    """How well the cosines of sentence embeddings follow people's scores.

    Args:
        spearman: rank correlation, from -1 to 1.
        n: pairs of sentences.
        cosines: of each pair.
    """

    spearman: float
    n: int
    cosines: tuple[float, ...]

    @property
    def standard_error(self) -> float:
        """Of the rank correlation.

        Source: Bonett and Wright, Psychometrika 65 (2000): ``sqrt((1 + r^2 / 2) / (n - 3))`` of Fisher's z, brought
        back to r with its derivative ``1 - r^2``.
        """
        return (1 - self.spearman**2) * math.sqrt((1 + self.spearman**2 / 2) / (self.n - 3))


def sentence_similarity(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> SentenceSimilarity:
    """Correlate the cosines of sentence embeddings with people's scores (Spearman).

    The embedding of a sentence is the mean of the encoder's last hidden states over its tokens.

    Args:
        model: a text encoder, bare (``AutoModel``) or with a head, which is left out; its training mode is put back.
        tokenizer: of the model. Sentences are cut at the model's context.
        rows: pairs of sentences with a score.
        batch_size: sentences a forward pass; the result does not depend on it.
        progress: show a bar if it takes longer than two seconds.

    Raises:
        ValueError: if there are fewer than 4 rows, one lacks a column, all scores or cosines are equal, or the model
            gives no hidden states.

    Source: the STS benchmark (Cer et al., SemEval-2017 task 1); mean pooling as in Sentence-BERT (arXiv 1908.10084).

    Example:
        >>> sentence_similarity(model, tokenizer, load_rows("stsb_dev.jsonl")).spearman  # doctest: +SKIP
    """
    rows = list(rows)
    scores = _scores(rows, batch_size)
    sentences = list(dict.fromkeys(row[side] for row in rows for side in ("sentence1", "sentence2")))
    vectors = _embedded(model, tokenizer, sentences, batch_size, progress)
    place = {sentence: index for index, sentence in enumerate(sentences)}
    first, second = (vectors[[place[row[side]] for row in rows]] for side in ("sentence1", "sentence2"))
    cosines = functional.cosine_similarity(first, second).tolist()
    for name, values in (("scores", scores), ("cosines", cosines)):
        if len(set(values)) == 1 or not all(map(math.isfinite, values)):
            raise ValueError(f"The {name} are all equal or no numbers (the first is {values[0]}): there is no ranking.")
    from scipy.stats import spearmanr

    return SentenceSimilarity(float(spearmanr(scores, cosines).statistic), len(scores), tuple(cosines))


def _embedded(model: Any, tokenizer: Any, sentences: Sequence[str], batch_size: int, progress: bool) -> torch.Tensor:
    """The mean of the last hidden states of each sentence, ``(sentences, hidden_size)``, on the CPU in float32."""
    encoder = getattr(model, "base_model", model)
    limit = min(context_limit(model) or 512, tokenizer.model_max_length)
    encoded = [tokenizer(text, truncation=True, max_length=limit)["input_ids"] for text in sentences]
    order = sorted(range(len(sentences)), key=lambda index: len(encoded[index]))
    vectors: dict[int, torch.Tensor] = {}
    device = input_device(model)
    bar = tqdm(total=len(sentences), desc="sentences", unit="sentence", disable=not progress, delay=2)
    with measuring(model), bar:
        for at in range(0, len(order), batch_size):
            part = order[at : at + batch_size]
            ids, mask = pad([encoded[index] for index in part], filler_id(tokenizer))
            output = encoder(input_ids=ids.to(device), attention_mask=mask.to(device))
            hidden = getattr(output, "last_hidden_state", None)
            if hidden is None:
                raise ValueError(f"{type(model).__name__} gives no hidden states of tokens. Load a text encoder.")
            weight = mask.to(device)[:, :, None]
            means = (hidden.float() * weight).sum(1) / weight.sum(1)
            vectors |= dict(zip(part, means.cpu(), strict=True))
            bar.update(len(part))
    return torch.stack([vectors[index] for index in range(len(sentences))])


def _scores(rows: Sequence[Row], batch_size: int) -> list[float]:
    if len(rows) < 4:
        raise ValueError(f"There are {len(rows)} rows, and a rank correlation with its error needs at least 4.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    found = []
    for index, row in enumerate(rows):
        score = row.get("score", row.get("label"))
        missing = [side for side in ("sentence1", "sentence2") if not isinstance(row.get(side), str)]
        if missing or score is None:
            raise ValueError(
                f"Row {index} has no {(missing or ['score'])[0]!r}; its columns are: {', '.join(row)}. Rows must have "
                "'sentence1', 'sentence2' and 'score'."
            )
        found.append(float(score))
    return found
