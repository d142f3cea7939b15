"""The bridge to lm-evaluation-harness: its own tasks and its own code, on a model that is loaded here.

So a pruned model of any structure is measured exactly as a dense one. No task is written again here.
"""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hf_cka.evaluation.running import check_causal, measuring
from hf_cka.lookup import lookup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def harness_tasks(include_path: str | os.PathLike[str] | None = None) -> Any:
    """Return lm-eval's ``TaskManager``: the tasks it knows, and those of a folder of YAML files.

    Args:
        include_path: a folder of task files.

    Raises:
        ImportError: without lm-eval; the message gives the command.
        FileNotFoundError: if the folder does not exist.

    Example:
        >>> "piqa" in harness_tasks().all_tasks  # doctest: +SKIP
        True
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("lm-evaluation-harness is not installed: pip install 'hf_cka[eval]'") from error
    if include_path is not None and not os.path.isdir(include_path):
        raise FileNotFoundError(f"There is no folder {str(include_path)!r} of lm-eval task files.")
    return TaskManager(include_path=None if include_path is None else str(include_path))


def run_harness(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    manager: Any = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Run tasks of lm-evaluation-harness on a loaded causal model.

    Args:
        model: a causal language model, dense or pruned; its training mode is put back afterwards.
        tokenizer: of the model; a copy is used, because lm-eval may give it a pad token.
        tasks: names that the manager knows.
        manager: what :func:`harness_tasks` returned, for tasks of an own folder; None for lm-eval's tasks alone. Task
            files that name local data need no network.
        limit: only the first so many items of each task.
        num_fewshot: examples in the prompt; None is the task's own number.
        batch_size: rows a forward pass.
        seed: of the few-shot draw; lm-eval seeds random, NumPy and torch of this process with it, too.

    Returns:
        For each task, lm-eval's own entry: metrics such as ``"acc,none"`` with ``"acc_stderr,none"``, ``alias``, and
        added here ``samples``, ``version`` and ``n-shot`` where lm-eval gives them.

    Raises:
        ImportError: without lm-eval.
        ValueError: for an unknown task (near names are listed), or a model that is not causal.

    Source: EleutherAI, lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

    Example:
        >>> run_harness(model, tokenizer, ["piqa"], limit=100)["piqa"]["acc,none"]  # doctest: +SKIP
    """
    check_causal(model, "lm-evaluation-harness")
    manager = manager or harness_tasks()
    known = dict.fromkeys(manager.all_tasks)
    for task in tasks:
        lookup(known, task, "lm-eval task")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with measuring(model), _quiet():
        wrapped = HFLM(pretrained=model, backend="causal", tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        found = simple_evaluate(
            wrapped,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
            bootstrap_iters=1000,  # only for metrics whose standard error has no closed form
            task_manager=manager,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    results: dict[str, dict[str, Any]] = {}
    for name, entry in found["results"].items():
        results[name] = dict(entry)
        samples = found.get("n-samples", {}).get(name, {}).get("effective")
        extra = {
            "samples": samples,
            "version": found.get("versions", {}).get(name),
            "n-shot": found.get("n-shot", {}).get(name),
        }
        results[name] |= {key: value for key, value in extra.items() if value is not None}
    return results


def split_metrics(entry: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the metrics of one of lm-eval's entries and their standard errors, by the metric's name.

    The filter's name is left out where it is ``none``.

    Example:
        >>> split_metrics({"alias": "piqa", "acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 1.0})
        ({'acc': 0.5, 'em (strict)': 1.0}, {'acc': 0.1})
    """
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in entry.items():
        metric, comma, which = key.partition(",")
        if not comma or isinstance(value, str):
            continue
        into = errors if metric.endswith("_stderr") else metrics
        name = metric.removesuffix("_stderr") + ("" if which == "none" else f" ({which})")
        if math.isfinite(value):
            into[name] = float(value)
    return metrics, errors


@contextmanager
def _quiet() -> Iterator[None]:
    """Show only lm-eval's errors while the block runs: its remarks are about a command line that is not used here."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
