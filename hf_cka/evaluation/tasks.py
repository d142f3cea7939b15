"""``evaluate``: one model, several tasks by name, one result that goes through JSON.

A task is ``KIND:DATASET`` for what this room measures itself, or the name of a task of lm-evaluation-harness.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_cka.data import parts_of, public_name
from hf_cka.evaluation.harness import harness_tasks, run_harness, split_metrics
from hf_cka.evaluation.kinds import KINDS, MEDIA, WITHOUT_DATA, parse_task, task_data
from hf_cka.evaluation.results import EvaluationResult, EvaluationSettings, TaskResult
from hf_cka.lookup import lookup
from hf_cka.modeling.loading import load_model

__all__ = ["EvaluationResult", "EvaluationSettings", "TaskResult", "evaluate"]


def evaluate(
    model: Any,
    tasks: str | Sequence[str],
    *,
    tokenizer: Any = None,
    dataset: str | None = None,
    settings: EvaluationSettings | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: bool = True,
) -> EvaluationResult:
    """Measure a model on tasks given by name.

    ``perplexity:FILE``, ``multiple_choice:FILE``, ``classification:FILE``, ``exact_match:FILE``,
    ``completion_loss:FILE`` and ``sts:FILE`` are measured here, from a local file or a Hub dataset;
    ``image_classification:FOLDER``, ``audio_classification:FOLDER`` and ``speech:FOLDER`` from a folder or zip as well,
    and ``efficiency`` without data. Every other name is a task of lm-evaluation-harness, which runs it itself.

    Args:
        model: a Hub id, a folder (dense or pruned), or a loaded model.
        tasks: names, as a sequence or separated by commas.
        tokenizer: of a loaded model: a tokenizer, image processor, feature extractor or processor.
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
    own = {name: parsed for name in names if (parsed := parse_task(name, dataset)) is not None}
    others = [name for name in dict.fromkeys(names) if name not in own]
    manager = harness_tasks(chosen.include_path) if others else None
    if manager is not None:
        known = dict.fromkeys([*KINDS, *manager.all_tasks])
        for name in others:
            lookup(known, name, "task")
    data = {name: task_data(kind, where, chosen) for name, (kind, where) in own.items() if where}
    loaded, processor = _loaded(model, tokenizer, device, dtype)
    folder = Path(model).expanduser() if isinstance(model, str | os.PathLike) and os.path.isdir(model) else None
    found: dict[str, list[TaskResult]] = {}
    for name, (kind, where) in own.items():
        reader = processor if kind in MEDIA else _tokenizer(processor, kind)
        metrics, errors, n, details = KINDS[kind](loaded, reader, data.get(name, folder), chosen, progress)
        label = f"{kind}:{public_name(where)}" if where else kind
        found[name] = [TaskResult(label, kind, metrics, errors, n, details)]
    if others:
        # at once: lm-eval answers all tasks' requests of one kind in one go
        entries = run_harness(
            loaded,
            _tokenizer(processor, others[0]),
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


def _loaded(model: Any, tokenizer: Any, device: str, dtype: str) -> tuple[Any, Any]:
    if isinstance(model, str | os.PathLike):
        loaded, own = load_model(os.fspath(model), device, dtype)
        return loaded, tokenizer or own
    if tokenizer is None:
        raise ValueError("A loaded model needs its tokenizer or processor: pass tokenizer=...")
    return model, tokenizer


def _tokenizer(processor: Any, task: str) -> Any:
    found = parts_of(processor).tokenizer
    if found is None and task not in WITHOUT_DATA:
        raise ValueError(
            f"The task {task!r} reads text, and {type(processor).__name__} holds no tokenizer. For a model of pictures "
            f"or sound use {', '.join(MEDIA)}."
        )
    return found


def _harness_result(name: str, entry: dict[str, Any]) -> TaskResult:
    metrics, errors = split_metrics(entry)
    details: dict[str, Any] = {key: entry[key] for key in ("version", "n-shot") if key in entry}
    return TaskResult(name, "lm-eval", metrics, errors, int(entry.get("samples") or 0), details)


def _fields(settings: EvaluationSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}
