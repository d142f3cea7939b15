"""What tasks measured of a model, and how they were asked to: frozen data with a JSON round trip."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_cka.evaluation.blocks import NOT_IN_JSON
from hf_cka.lookup import lookup

FORMAT_VERSION = 1


@dataclass(frozen=True)
class EvaluationSettings:
    """How tasks are measured.

    Args:
        limit: only the first so many rows of a task; None for all.
        batch_size: rows a forward pass.
        context: window of perplexity in tokens; shorter where the model's own context is.
        stride: tokens between two windows; None for no overlap.
        max_tokens: only so many tokens of the text for perplexity; None for all.
        template: prompt of multiple choice, and of classification by words; None for each one's own.
        label_words: for classification with a causal model, a word for each label.
        max_new_tokens: of a generated answer.
        num_fewshot: for lm-eval; None for the task's own number.
        include_path: folder of lm-eval task files.
        split: of a Hub dataset.
        seed: of lm-eval's few-shot draw.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> EvaluationSettings(limit=0)
        Traceback (most recent call last):
        ValueError: limit=0 must be at least 1.
    """

    limit: int | None = None
    batch_size: int = 8
    context: int = 512
    stride: int | None = None
    max_tokens: int | None = None
    template: str | None = None
    label_words: tuple[str, ...] = ()
    max_new_tokens: int = 64
    num_fewshot: int | None = None
    include_path: str | None = None
    split: str = "test"
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"limit": 1, "batch_size": 1, "context": 2, "stride": 1, "max_tokens": 2, "max_new_tokens": 1}
        for name, smallest in {**least, "num_fewshot": 0}.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"{name}={value} must be at least {smallest}.")


@dataclass(frozen=True)
class TaskResult:
    """What one task measured.

    Args:
        task: its name, without folders of this machine.
        kind: "lm-eval", or a name of ``KINDS``.
        metrics: values by name.
        errors: standard errors of those that have one.
        n: items, or scored tokens for perplexity.
        details: what the numbers depend on (context, stride, template, version of an lm-eval task).
    """

    task: str
    kind: str
    metrics: Mapping[str, float]
    errors: Mapping[str, float] = field(default_factory=dict)
    n: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationResult:
    """What several tasks measured of one model.

    Args:
        model: its name.
        tasks: one result each: those measured here in the order asked, then lm-eval's.
        settings: how they were measured.
        version: of this format.
    """

    model: str | None
    tasks: tuple[TaskResult, ...]
    settings: EvaluationSettings = field(default_factory=EvaluationSettings)
    version: int = FORMAT_VERSION

    def __getitem__(self, task: str) -> TaskResult:
        """Return the result of a task by its name.

        Example:
            >>> EvaluationResult("m", (TaskResult("piqa", "lm-eval", {"acc": 0.5}),))["piqa"].metrics["acc"]
            0.5
        """
        return lookup({result.task: result for result in self.tasks}, task, "task")

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that every JSON parser reads: infinite numbers go by name."""
        return _named(asdict(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EvaluationResult:
        """Make a result from what :meth:`to_dict` returned.

        Raises:
            ValueError: if a newer version of the library wrote it.

        Example:
            >>> result = EvaluationResult("m", (TaskResult("t", "perplexity", {"perplexity": float("inf")}),))
            >>> EvaluationResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
            True
        """
        if data["version"] > FORMAT_VERSION:
            raise ValueError(
                f"This evaluation has format version {data['version']}, newer than {FORMAT_VERSION}: update hf_cka."
            )
        tasks = tuple(
            TaskResult(**{**task, "metrics": {k: NOT_IN_JSON.get(v, v) for k, v in task["metrics"].items()}})
            for task in data["tasks"]
        )
        settings = {**data["settings"], "label_words": tuple(data["settings"]["label_words"])}
        return cls(data["model"], tasks, EvaluationSettings(**settings), data["version"])

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the result as JSON and return the file."""
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        return file

    def table(self) -> str:
        """Return the numbers as text, one line a metric.

        Example:
            >>> print(EvaluationResult("m", (TaskResult("piqa", "lm-eval", {"acc": 0.5}, {"acc": 0.05}, 100),)).table())
            task  metric  value     ±    n
            piqa  acc       0.5  0.05  100
        """
        rows = [("task", "metric", "value", "±", "n")]
        for result in self.tasks:
            for metric, value in result.metrics.items():
                error = result.errors.get(metric)
                shown = "" if error is None else f"{error:.2g}"
                rows.append((result.task, metric, f"{value:.5g}", shown, str(result.n)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(w) if at < 2 else cell.rjust(w) for at, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines)


def _named(value: Any) -> Any:
    """Replace numbers that JSON does not know by their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {key: _named(item) for key, item in value.items()}
    return [_named(item) for item in value] if isinstance(value, list | tuple) else value
