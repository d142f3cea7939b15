"""What a comparison is: how much is measured, what was measured of each model, and all of it side by side.

Measuring never belongs here (see ``compare``), nor does how it is shown (see ``comparison_report``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hf_cka.evaluation.blocks import Cell, Curve, Strip
from hf_cka.evaluation.disagreement import Disagreements
from hf_cka.evaluation.language import Perplexity
from hf_cka.evaluation.memory import ModelMemory
from hf_cka.evaluation.multiple_choice import MultipleChoice
from hf_cka.evaluation.robustness import ChoiceRobustness, Robustness
from hf_cka.evaluation.rows import CompletionLoss, ExactMatch
from hf_cka.evaluation.similarity_map import LayerSimilarity
from hf_cka.lookup import lookup

if TYPE_CHECKING:
    from hf_cka.evaluation.report import ReportData

PARTS = ("quality", "speed", "similarity", "disagreement", "robustness")


@dataclass(frozen=True)
class ComparisonSettings:
    """How much is measured.

    Args:
        parts: of ``PARTS``: what to measure.
        tasks: further ones, as :func:`hf_cka.evaluate` takes them: tasks of lm-evaluation-harness among them.
        limit: rows of each task; all by default.
        context: window of perplexity, in tokens; shorter where the model's own context is.
        max_tokens: tokens of text for perplexity.
        rows: prompt/completion rows for loss and exact match, questions for accuracy, texts for robustness.
        max_new_tokens: of a generated answer.
        num_samples: for the similarity of layers and the disagreement.
        max_length: tokens of such a sample.
        rates: of damage, for robustness.
        top: samples of disagreement to show.
        repeats: alternating measurements of speed.
        seed: of every draw.

    Raises:
        ValueError: for an unknown part (near names are listed) or a number out of range.

    Example:
        >>> ComparisonSettings(parts=("quality", "sped"))
        Traceback (most recent call last):
        ValueError: Unknown part 'sped'. Did you mean: 'speed'?
    """

    parts: tuple[str, ...] = PARTS
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    context: int = 512
    max_tokens: int = 4096
    rows: int = 32
    max_new_tokens: int = 64
    num_samples: int = 64
    max_length: int = 128
    rates: tuple[float, ...] = (0.1,)
    top: int = 5
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for part in self.parts:
            lookup(dict.fromkeys(PARTS), part, "part")
        least = {"context": 2, "max_tokens": 2, "rows": 1, "max_new_tokens": 1, "num_samples": 4, "max_length": 2}
        for name, smallest in {**least, "top": 0, "repeats": 1}.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {smallest}.")


@dataclass(frozen=True)
class Measured:
    """What was measured of one model; None or empty where it was not.

    Args:
        name: of the model.
        parameters: all of them.
        non_embedding: without embeddings and head.
        strip: its layers, by original index.
        file_bytes: size of its weight files; None for a model that is in memory only.
        perplexity: of the text.
        completion: loss on the completions of the rows, where the data has such rows.
        exact: exact match on them.
        choices: accuracy on the questions, where the data has ``question``, ``choices`` and ``gold``.
        tokens_per_second: greedy decoding, one row, median; to compare models use ``speed_ratio``.
        speed_ratio: median over measurements in turn with the base's of the one over the other; 1 for the base.
        decode_flops: operations of one decoded token after 12.
        cache_bytes_per_token: of the cache of keys and values.
        memory: of a fresh process that loads the model and generates; None for a model that is in memory only.
        similarity: of its layers to the base's.
        disagreement: with the base.
        robustness: under each damage; the clean row first.
        choice_robustness: the same of the questions, where the data has some.
        curves: losses of its training.
        tasks: metrics of the further tasks, by "task metric".
        notes: what could not be measured, and why.
    """

    name: str
    parameters: int
    non_embedding: int
    strip: Strip
    file_bytes: int | None = None
    perplexity: Perplexity | None = None
    completion: CompletionLoss | None = None
    exact: ExactMatch | None = None
    choices: MultipleChoice | None = None
    tokens_per_second: float | None = None
    speed_ratio: float | None = None
    decode_flops: int | None = None
    cache_bytes_per_token: float | None = None
    memory: ModelMemory | None = None
    similarity: LayerSimilarity | None = None
    disagreement: Disagreements | None = None
    robustness: tuple[Robustness, ...] = ()
    choice_robustness: tuple[ChoiceRobustness, ...] = ()
    curves: tuple[Curve, ...] = ()
    tasks: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """A base and the models made from it, measured on the same data.

    Args:
        base: the reference.
        others: the rest, in the order given.
        settings: how much was measured.
        source: name of the data.
        device: where the models ran.
    """

    base: Measured
    others: tuple[Measured, ...]
    settings: ComparisonSettings
    source: str = ""
    device: str = ""

    @property
    def models(self) -> tuple[Measured, ...]:
        """The base and the others."""
        return (self.base, *self.others)

    def results(self) -> tuple[dict[str, Cell], ...]:
        """Return one mapping of column to value a model; columns that no model has are left out.

        Sizes are in parameters and bytes; ``removed`` is the share of the base's parameters; ``decoding speed`` is
        that of one row over the base's, measured in turn, so that a drift of the machine hits both; what is "damaged"
        is the mean over the kinds and rates of damage.
        """
        rows = [self._row(model) for model in self.models]
        used = {name for row in rows for name, value in row.items() if value is not None}
        return tuple({name: value for name, value in row.items() if name in used} for row in rows)

    def report(self, title: str = "", command: str = "") -> ReportData:
        """Return everything as a report, to be written with ``write_report``.

        Args:
            title: of the page; by default the names.
            command: that made it.
        """
        from hf_cka.evaluation.comparison_report import comparison_report

        return comparison_report(self, title=title, command=command)

    def _row(self, model: Measured) -> dict[str, Cell]:
        clean = model.robustness[0] if model.robustness else None
        similarity = model.similarity
        return {
            "model": model.name,
            "parameters": model.parameters,
            "removed": 1 - model.parameters / self.base.parameters,
            "perplexity": model.perplexity.value if model.perplexity else None,
            "completion loss": model.completion.value if model.completion else None,
            "exact match": model.exact.value if model.exact else None,
            "accuracy": model.choices.accuracy if model.choices else None,
            "accuracy, normalised": model.choices.accuracy_norm if model.choices else None,
            **model.tasks,
            "accuracy, damaged": _mean_damaged(model.choice_robustness),
            "next-token accuracy": clean.accuracy if clean else None,
            "next-token accuracy, damaged": _mean_damaged(model.robustness),
            "KL to base": model.disagreement.kl if model.disagreement else None,
            "same top token": model.disagreement.same_top if model.disagreement else None,
            "CKA of last layer": similarity.values[-1][-1] if similarity else None,
            "MFLOPs / token": None if model.decode_flops is None else model.decode_flops / 1e6,
            "cache KB / token": None if model.cache_bytes_per_token is None else model.cache_bytes_per_token / 1e3,
            "peak memory MB": _peak_mb(model.memory),
            "file MB": None if model.file_bytes is None else round(model.file_bytes / 1e6, 1),
            "non-embedding": model.non_embedding,
            "decoding speed": model.speed_ratio,
        }


def _mean_damaged(rows: Sequence[Robustness | ChoiceRobustness]) -> float | None:
    """The mean accuracy over all kinds and rates of damage."""
    damaged = [row.accuracy for row in rows if row.damage != "none"]
    return sum(damaged) / len(damaged) if damaged else None


def _peak_mb(memory: ModelMemory | None) -> float | None:
    """Of torch on the CUDA device where the model is on one, else of the whole process."""
    if memory is None:
        return None
    return round((memory.peak_bytes if memory.cuda_bytes is None else memory.cuda_bytes) / 1e6, 1)
