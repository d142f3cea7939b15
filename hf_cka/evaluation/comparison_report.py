"""A comparison as a report: highlights, one table, the charts. Measures nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from hf_cka.evaluation.blocks import Block, Cell, Curve, Curves, Frontier, LayerStack, Point, Table
from hf_cka.evaluation.lines import short_number
from hf_cka.evaluation.report import Highlight, ReportData, Section, library_versions

if TYPE_CHECKING:
    from hf_cka.evaluation.comparison import Comparison, Measured

_PERCENT = (
    "removed",
    "exact match",
    "accuracy",
    "accuracy, normalised",
    "accuracy, damaged",
    "next-token accuracy",
    "next-token accuracy, damaged",
    "same top token",
)
_MAX_CURVES = 6
_DAMAGES_NOTE = (
    "Typos: share of letters left out, doubled or hit beside their key; casing: share of words with upper and lower "
    "case swapped; dropped words: share of words left out."
)
# how a measure of robustness is shown
_DAMAGE_CELLS: dict[str, Callable[[Any], Cell]] = {
    "accuracy": lambda one: f"{one.accuracy:.1%}",
    "accuracy, normalised": lambda one: f"{one.accuracy_norm:.1%}",
    "perplexity": lambda one: one.perplexity,
}


def comparison_report(comparison: Comparison, *, title: str = "", command: str = "") -> ReportData:
    """Return a comparison as a report.

    Args:
        comparison: what was measured.
        title: of the page; by default the names of the models.
        command: that made it.
    """
    base, others = comparison.base, comparison.others
    names = ", ".join(model.name for model in others)
    stack = LayerStack("What was removed, by original index", tuple(model.strip for model in comparison.models))
    sections = [
        Section(
            "Side by side",
            (results_table(comparison), stack, *_frontier(comparison)),
            text=_unmeasured(comparison.models),
        ),
        *(section for model in others for section in _similarity(base, model)),
        *_robustness(comparison),
        *(
            Section(f"Disagreement: {model.name}", (model.disagreement.excerpts(base.name, model.name),))
            for model in others
            if model.disagreement and model.disagreement.most
        ),
        *_curves(comparison.models),
    ]
    settings: dict[str, Cell] = {"data": comparison.source or "not named", "device": comparison.device}
    measured = asdict(comparison.settings)
    if not measured.pop("tasks"):  # the columns name them, without folders of this machine
        measured.pop("limit")
    for name, value in measured.items():
        settings[name.replace("_", " ")] = ", ".join(map(str, value)) if isinstance(value, tuple) else value
    return ReportData(
        title=title or f"{names} against {base.name}",
        summary=f"{base.name} and {names}, measured on the same data one after the other. Every number below was "
        "measured in this run; what was not measured is not shown.",
        sections=tuple(sections),
        highlights=_highlights(comparison),
        settings=settings,
        versions=library_versions(),
        command=command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        results=comparison.results(),
        notes=_notes(comparison),
    )


def results_table(comparison: Comparison) -> Table:
    """Return the models side by side as a table, shares in percent.

    Args:
        comparison: what was measured.
    """
    rows = comparison.results()
    columns = tuple(rows[0])
    shown = tuple(tuple(shown_cell(name, row[name]) for name in columns) for row in rows)
    return Table("Size, quality and speed", columns, shown, note=_notes(comparison))


def shown_cell(name: str, value: Cell) -> Cell:
    """Return a result as a table shows it: shares in percent, counts in short.

    Args:
        name: of the column, as in `Comparison.results`.
        value: of the model.

    Example:
        >>> shown_cell("removed", 0.07895), shown_cell("parameters", 134515008), shown_cell("perplexity", 19.5)
        ('7.9%', '134.5M', 19.5)
    """
    if isinstance(value, float) and name in _PERCENT:
        return f"{value:.1%}"
    if isinstance(value, float) and name == "decoding speed":
        return f"{value:.2f}×"
    if isinstance(value, int) and name in ("parameters", "non-embedding"):
        return short_number(value)
    return value


def _notes(comparison: Comparison) -> str:
    parts = []
    base, settings = comparison.base, comparison.settings
    if base.perplexity:
        parts.append(
            f"Perplexity of {base.perplexity.tokens:,} tokens in windows of {base.perplexity.context} "
            f"(stride {base.perplexity.stride})"
        )
    if base.exact:
        parts.append(f"exact match of {base.exact.n} rows")
    if base.choices:
        parts.append(
            f"accuracy on {base.choices.n} questions by log-likelihood, and normalised by the length of the choices "
            f"(standard error about {base.choices.standard_error:.1%})"
        )
    if base.robustness:
        rates = ", ".join(f"{rate:.0%}" for rate in settings.rates)
        parts.append(
            f"next-token accuracy on {base.robustness[0].tokens:,} tokens; damaged: mean over typos, casing and "
            f"dropped words in what is read, at {rates}"
        )
    if any(model.disagreement for model in comparison.others):
        parts.append("KL in nats a token")
    if base.tokens_per_second:
        parts.append(
            f"decoding of one row over that of {base.name} ({base.tokens_per_second:.3g} tokens/s), median of "
            f"{settings.repeats} measurements in turn"
        )
    memory = next((model.memory for model in comparison.models if model.memory), None)
    if memory:
        before = f"of which {memory.imported_bytes / 1e6:.0f} MB are there before the model is loaded"
        parts.append(
            f"peak memory of a fresh process that loads the model and generates {memory.new_tokens} tokens, "
            + (before if memory.cuda_bytes is None else "on the GPU")
        )
    where = f" On {comparison.source}, {comparison.device}." if comparison.source else f" On {comparison.device}."
    return ("; ".join(parts) + "." + where) if parts else ""


def _highlights(comparison: Comparison) -> tuple[Highlight, ...]:
    """The model with the best quality for its size, against the base, in at most four numbers."""
    base = comparison.base
    best = min(comparison.others, key=lambda model: model.perplexity.value if model.perplexity else math.inf)
    found = [
        Highlight(
            "parameters",
            f"{best.parameters / base.parameters - 1:+.1%}".replace("-", "−"),
            f"{best.name}: {short_number(best.parameters)} of {short_number(base.parameters)}",
        )
    ]
    if best.perplexity and base.perplexity:
        found.append(
            Highlight(
                "perplexity",
                f"{base.perplexity.value:.4g} → {best.perplexity.value:.4g}",
                f"{base.name} → {best.name}; lower is better",
            )
        )
    if best.speed_ratio is not None:
        found.append(Highlight("decoding speed", f"{best.speed_ratio:.2f}×", f"of {base.name}, one row"))
    if best.disagreement:
        found.append(
            Highlight(
                "same next token",
                f"{best.disagreement.same_top:.0%}",
                f"{best.name} and {base.name} agree on the likeliest",
            )
        )
    return tuple(found)


def _frontier(comparison: Comparison) -> tuple[Block, ...]:
    points = tuple(
        Point(model.name, float(model.parameters), model.perplexity.value)
        for model in comparison.models
        if model.perplexity and math.isfinite(model.perplexity.value)
    )
    if len(points) < 2 or points[0].name != comparison.base.name:
        return ()
    return (Frontier("Quality over size", points, note="Lower and further left is better."),)


def _similarity(base: Measured, model: Measured) -> tuple[Section, ...]:
    if model.similarity is None:
        return ()
    blocks = (model.similarity.heatmap(base.name, model.name), model.similarity.change_chart(model.name))
    text = "How alike the two models are inside: 1 where a layer's output arranges the samples in the same way."
    return (Section(f"Layers: {model.name}", blocks, text=text),)


def _robustness(comparison: Comparison) -> tuple[Section, ...]:
    tables = []
    texts = {model.name: model.robustness for model in comparison.models if model.robustness}
    if texts:
        tokens = comparison.base.robustness[0].tokens
        note = f"Next-token accuracy and perplexity on {tokens:,} tokens of clean text that follows the damaged text. "
        tables.append(_damage_table("Under damaged text", texts, ("accuracy", "perplexity"), note + _DAMAGES_NOTE))
    questions = {model.name: model.choice_robustness for model in comparison.models if model.choice_robustness}
    if questions:
        n = next(iter(questions.values()))[0].n
        note = f"Accuracy on {n} questions whose text is damaged and whose choices are not. "
        columns = ("accuracy", "accuracy, normalised")
        tables.append(_damage_table("Questions under damaged text", questions, columns, note + _DAMAGES_NOTE))
    return (Section("Robustness", tuple(tables)),) if tables else ()


def _damage_table(title: str, models: Mapping[str, Sequence[Any]], measures: Sequence[str], note: str) -> Table:
    """One row a case of damage, one column a measure and model."""
    columns = ["damage to what is read", *(f"{measure}, {name}" for measure in measures for name in models)]
    rows = []
    for case in zip(*models.values(), strict=True):
        first = case[0]
        label = "none" if first.damage == "none" else f"{first.damage}, {first.rate:.0%}"
        rows.append((label, *(_DAMAGE_CELLS[measure](one) for measure in measures for one in case)))
    return Table(title, tuple(columns), tuple(rows), note=note)


def _curves(models: Sequence[Measured]) -> tuple[Section, ...]:
    trained = [model for model in models if model.curves]
    charts = tuple(
        Curves(
            f"Training of {model.name}", tuple(Curve(curve.name, curve.points) for curve in model.curves[:_MAX_CURVES])
        )
        for model in trained
    )
    text = "Losses that the trainer logged, from the trainer_state.json in the folders."
    return (Section("Recovery", charts, text=text),) if charts else ()


def _unmeasured(models: Sequence[Measured]) -> str:
    return " ".join(f"{model.name}: {note.removesuffix('.')}." for model in models for note in model.notes)
