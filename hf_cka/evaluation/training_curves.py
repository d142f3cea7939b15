"""The losses of a training run, from the ``trainer_state.json`` that transformers' Trainer leaves in its folders."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hf_cka.evaluation.blocks import Curve

STATE_FILE = "trainer_state.json"
# key in the log -> name of the curve
_LOSSES = {"loss": "training", "eval_loss": "evaluation"}


def training_curves(folder: str | os.PathLike[str], name: str = "") -> tuple[Curve, ...]:
    """Return the losses over the steps, where a folder (or the newest checkpoint in it) holds them.

    Args:
        folder: of a model or of a training run.
        name: put before the name of each curve, to tell several runs apart.

    Returns:
        One curve for the training loss and one for the evaluation loss, those that there are; empty if there is no
        record.

    Raises:
        ValueError: if the record is not JSON.

    Example:
        >>> training_curves("nowhere")
        ()
    """
    path = Path(folder)
    files = [path / STATE_FILE, *sorted(path.glob(f"checkpoint-*/{STATE_FILE}"), key=_step, reverse=True)]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return ()
    try:
        log = json.loads(file.read_text(encoding="utf-8")).get("log_history", [])
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{str(file)!r} is not JSON ({error}); remove it, or save the trainer's state again."
        ) from error
    return log_curves(log, name)


def log_curves(log: Iterable[Mapping[str, Any]], name: str = "") -> tuple[Curve, ...]:
    """Return the losses in a Trainer's log over the steps.

    Args:
        log: ``trainer.state.log_history``, or the ``log`` of what `hf_cka.recover` returned.
        name: put before the name of each curve.

    Example:
        >>> log_curves([{"step": 1, "loss": 2.5}, {"step": 2, "eval_loss": 2.25}])[1]
        Curve(name='evaluation', points=((2.0, 2.25),))
    """
    curves = []
    for key, kind in _LOSSES.items():
        points = tuple((float(entry["step"]), float(entry[key])) for entry in log if key in entry and "step" in entry)
        if points:
            curves.append(Curve(f"{name}, {kind}" if name else kind, points))
    return tuple(curves)


def _step(file: Path) -> int:
    number = file.parent.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1
