"""``evaluate``: one model, several tasks by name, one result that goes through JSON.

A task is ``KIND:DATASET`` for what this room measures itself, or the name of a task of lm-evaluation-harness.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_cka.data import load_rows, public_name, row_text
from hf_cka.evaluation.blocks import NOT_IN_JSON
from hf_cka.evaluation.classification import classify, classify_by_words
from hf_cka.evaluation.cost import measure_efficiency
from hf_cka.evaluation.harness import harness_tasks, run_harness, split_metrics
from hf_cka.evaluation.language import perplexity
from hf_cka.evaluation.multiple_choice import TEMPLATE, multiple_choice
from hf_cka.evaluation.rows import completion_loss, exact_match
from hf_cka.evaluation.running import context_limit
from hf_cka.lookup import lookup
from hf_cka.modeling.loading import load_model, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


def evaluate(
    model: Any,
    tasks: str | Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dataset: str | None = None,
    settings: EvaluationSettings | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: bool = True,
) -> EvaluationResult:
    """Measure a model on tasks given by name.

    ``perplexity:FILE``, ``multiple_choice:FILE``, ``classification:FILE``, ``exact_match:FILE`` and
    ``completion_loss:FILE`` are measured here, from a local file or a Hub dataset, and ``efficiency`` without data;
    every other name is a task of lm-evaluation-harness, which runs it itself.

    Args:
        model: a Hub id, a folder (dense or pruned), or a loaded model.
        tasks: names, as a sequence or separated by commas.
        tokenizer: of a loaded model.
        dataset: for tasks of this library that are named without one (``"perplexity"``).
        settings: how they are measured.
        device: for a model given by name: "auto", "cpu", "cuda:1", ...
        dtype: for a model given by name: "auto", "float32", "bfloat16" or "float16".
        progress: show bars.

    Raises:
        ValueError: for an unknown task (near names are listed), before a model is loaded; and as the measurements do.
        FileNotFoundError: for a folder that is no model, or data that are not there.
        ImportError: without an optional library that a task needs; the message gives the command.

    Example:
        >>> evaluate("pruned", ["perplexity:test.txt", "piqa"]).save("evaluation.json")  # doctest: +SKIP
    """
    chosen = settings or EvaluationSettings()
    names = [name.strip() for name in (tasks.split(",") if isinstance(tasks, str) else tasks) if name.strip()]
    if not names:
        raise ValueError(f"There is no task to measure. Known here: {', '.join(KINDS)}; or any task of lm-eval.")
    own = {name: parsed for name in names if (parsed := _parse(name, dataset)) is not None}
    others = [name for name in dict.fromkeys(names) if name not in own]
    manager = harness_tasks(chosen.include_path) if others else None
    if manager is not None:
        known = dict.fromkeys([*KINDS, *manager.all_tasks])
        for name in others:
            lookup(known, name, "task")
    data = {name: _data(kind, where, chosen) for name, (kind, where) in own.items() if where}
    loaded, tokens = _loaded(model, tokenizer, device, dtype)
    folder = Path(model).expanduser() if isinstance(model, str | os.PathLike) and os.path.isdir(model) else None
    found: dict[str, list[TaskResult]] = {}
    for name, (kind, where) in own.items():
        metrics, errors, n, details = KINDS[kind](loaded, tokens, data.get(name, folder), chosen, progress)
        label = f"{kind}:{public_name(where)}" if where else kind
        found[name] = [TaskResult(label, kind, metrics, errors, n, details)]
    if others:
        # at once: lm-eval answers all tasks' requests of one kind in one go
        entries = run_harness(
            loaded,
            tokens,
            others,
            manager=manager,
            limit=chosen.limit,
            num_fewshot=chosen.num_fewshot,
            batch_size=chosen.batch_size,
            seed=chosen.seed,
        )
        found["lm-eval"] = [_harness_result(name, entry) for name, entry in entries.items()]
    shown = public_name(model) if isinstance(model, str) else public_name(getattr(loaded, "name_or_path", "") or "")
    results = tuple(result for listed in found.values() for result in listed)
    include = public_name(chosen.include_path) if chosen.include_path else None
    return EvaluationResult(shown, results, EvaluationSettings(**{**_fields(chosen), "include_path": include}))


Measured = tuple[dict[str, float], dict[str, float], int, dict[str, Any]]


def _perplexity(model: Any, tokenizer: Any, text: str, settings: EvaluationSettings, progress: bool) -> Measured:
    context = min(settings.context, context_limit(model) or settings.context)
    result = perplexity(
        model,
        tokenizer,
        text,
        context=context,
        stride=settings.stride,
        max_tokens=settings.max_tokens,
        batch_size=settings.batch_size,
        progress=progress,
    )
    details = {"context": result.context, "stride": result.stride}
    return {"perplexity": result.value, "nll": result.nll}, {}, result.tokens, details


def _multiple_choice(model: Any, tokenizer: Any, rows: Any, settings: EvaluationSettings, progress: bool) -> Measured:
    template = settings.template or TEMPLATE
    result = multiple_choice(
        model, tokenizer, rows, template=template, batch_size=settings.batch_size, progress=progress
    )
    metrics = {"acc": result.accuracy, "acc_norm": result.accuracy_norm}
    errors = {"acc": result.standard_error, "acc_norm": result.standard_error_norm}
    return metrics, errors, result.n, {"template": template}


def _classification(model: Any, tokenizer: Any, rows: Any, settings: EvaluationSettings, progress: bool) -> Measured:
    options: dict[str, Any] = {"batch_size": settings.batch_size, "progress": progress}
    details: dict[str, Any] = {}
    if settings.label_words:
        if settings.template:
            options["template"] = settings.template
        result = classify_by_words(model, tokenizer, rows, settings.label_words, **options)
        details["label_words"] = list(settings.label_words)
    else:
        result = classify(model, tokenizer, rows, **options)
    metrics = {"accuracy": result.accuracy, "majority": result.majority}
    return metrics, {"accuracy": result.standard_error}, result.n, details


def _exact_match(model: Any, tokenizer: Any, rows: Any, settings: EvaluationSettings, progress: bool) -> Measured:
    result = exact_match(
        model,
        tokenizer,
        rows,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        progress=progress,
    )
    details = {"max_new_tokens": settings.max_new_tokens}
    return {"exact_match": result.value}, {"exact_match": result.standard_error}, result.n, details


def _completion_loss(model: Any, tokenizer: Any, rows: Any, settings: EvaluationSettings, progress: bool) -> Measured:
    result = completion_loss(model, tokenizer, rows, batch_size=settings.batch_size, progress=progress)
    return {"completion_loss": result.value}, {}, result.rows, {"tokens": result.tokens}


def _efficiency(
    model: Any, tokenizer: Any, folder: Path | None, settings: EvaluationSettings, progress: bool
) -> Measured:
    found = measure_efficiency({"model": model}, progress=progress)["model"]
    metrics = found.metrics()
    files = sum(file.stat().st_size for file in weight_files(folder)) if folder is not None else 0
    if files:
        metrics["file_bytes"] = files
    first = found.speeds[0]
    details = {"prompt_tokens": first.prompt_tokens, "new_tokens": first.new_tokens, "repeats": first.repeats}
    return metrics, {}, first.repeats, details


# what is measured here; one entry is one more kind of task
KINDS: dict[str, Callable[[Any, Any, Any, EvaluationSettings, bool], Measured]] = {
    "perplexity": _perplexity,
    "multiple_choice": _multiple_choice,
    "classification": _classification,
    "exact_match": _exact_match,
    "completion_loss": _completion_loss,
    "efficiency": _efficiency,
}
WITHOUT_DATA = ("efficiency",)


def _parse(name: str, dataset: str | None) -> tuple[str, str] | None:
    """Return the kind and the dataset of a task of this room, or None for a name that lm-eval must know."""
    kind, colon, where = name.partition(":")
    if name in WITHOUT_DATA:
        return kind, ""
    if kind in WITHOUT_DATA:
        raise ValueError(f"The task {kind!r} takes no data: write it without {colon + where!r}.")
    if kind in KINDS:
        if not (where or dataset):
            raise ValueError(f"The task {name!r} needs data: write {kind}:FILE, or give a dataset.")
        return kind, where or str(dataset)
    if colon and get_close_matches(kind, KINDS, n=1):
        lookup(KINDS, kind, "kind of task")  # raises, with the near name
    return None


def _data(kind: str, where: str, settings: EvaluationSettings) -> Any:
    """Return rows; for perplexity one text: a text file as it is, or other rows with an empty line between them."""
    path = Path(where).expanduser()
    if kind == "perplexity" and path.suffix.lower() == ".txt" and path.is_file() and settings.limit is None:
        return path.read_text(encoding="utf-8")
    rows = list(load_rows(where, settings.split))[: settings.limit]
    return "\n\n".join(text for row in rows if (text := row_text(row))) if kind == "perplexity" else rows


def _loaded(model: Any, tokenizer: Any, device: str, dtype: str) -> tuple[Any, Any]:
    if isinstance(model, str | os.PathLike):
        loaded, own = load_model(os.fspath(model), device, dtype)
        return loaded, tokenizer or own
    if tokenizer is None:
        raise ValueError("A loaded model needs its tokenizer: pass tokenizer=...")
    return model, tokenizer


def _harness_result(name: str, entry: dict[str, Any]) -> TaskResult:
    metrics, errors = split_metrics(entry)
    details: dict[str, Any] = {key: entry[key] for key in ("version", "n-shot") if key in entry}
    return TaskResult(name, "lm-eval", metrics, errors, int(entry.get("samples") or 0), details)


def _fields(settings: EvaluationSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}


def _named(value: Any) -> Any:
    """Replace numbers that JSON does not know by their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {key: _named(item) for key, item in value.items()}
    return [_named(item) for item in value] if isinstance(value, list | tuple) else value
