"""What a pruning run did, step by step: frozen data, on disk after every step, and enough to go on from.

No model is run or changed here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_cka.anatomy.model import unwrap
from hf_cka.modeling.plan import PruningPlan
from hf_cka.pruning.config import PruningConfig

VERSION = 1
FILE = "pruning_history.json"


@dataclass(frozen=True)
class PruningStep:
    """One step of a pruning run; every index is the original one.

    Args:
        step: its number, from 1.
        branch: ``"depth"`` or ``"width"``: what was pruned.
        removed: what went, in words.
        score: the importance of what went (the highest of several), or what decided between branches.
        scores: the importance of every candidate that was scored.
        details: further numbers of the criterion (each metric, each rank), by name, then by candidate; without those
            that are undefined.
        branches: what each branch got from the path rule; higher was better.
        parameters: of the model after the step.
        ratio: removed parameters over all, after the step.
        layer_calls: calls of a layer that the scoring took, where the criterion counts them.
        layer_calls_in_full: what scoring every candidate would have taken.
        plan: everything removed so far.
        notes: what could not be scored, and why.
        carry: the part of a KV group per layer that a mixture's attention still owes, as a fraction.
    """

    step: int
    branch: str
    removed: tuple[str, ...]
    score: float | None
    scores: Mapping[str, float]
    details: Mapping[str, Mapping[str, float]]
    branches: Mapping[str, float]
    parameters: int
    ratio: float
    layer_calls: int
    layer_calls_in_full: int
    plan: PruningPlan
    notes: tuple[str, ...] = ()
    carry: str = "0"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON data; infinite scores become the word ``"inf"``, which strict JSON holds."""
        details = {name: {k: _plain(v) for k, v in table.items()} for name, table in self.details.items()}
        data = {**vars(self), "plan": self.plan.to_dict(), "score": _plain(self.score), "details": details}
        return data | {name: {k: _plain(v) for k, v in data[name].items()} for name in ("scores", "branches")}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruningStep:
        """Read what ``to_dict`` wrote."""
        tables = {name: {k: float(v) for k, v in data[name].items()} for name in ("scores", "branches")}
        details = {name: {k: float(v) for k, v in table.items()} for name, table in data["details"].items()}
        score = None if data["score"] is None else float(data["score"])
        rest = {name: tuple(data[name]) for name in ("removed", "notes")}
        plan = PruningPlan.from_dict(data["plan"])
        return cls(**{**data, **tables, **rest, "score": score, "details": details, "plan": plan})


@dataclass(frozen=True)
class PruningHistory:
    """A whole run.

    Args:
        config: what was asked for.
        model: digest of the model that was given.
        calibration: digest of the data.
        parameters: of the model that was given.
        steps: what was done.
        version: of this format.

    Example:
        >>> history = PruningHistory(PruningConfig(ratio=0.2), model="a", calibration="b", parameters=100)
        >>> PruningHistory.from_json(history.to_json()) == history
        True
    """

    config: PruningConfig
    model: str
    calibration: str
    parameters: int
    steps: tuple[PruningStep, ...] = field(default=())
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ValueError(
                f"This history has version {self.version}; this hf_cka reads version {VERSION}. Update it."
            )

    def with_step(self, step: PruningStep) -> PruningHistory:
        """Return the history with one more step."""
        return replace(self, steps=(*self.steps, step))

    def to_json(self) -> str:
        """Return the history as JSON."""
        data = {**vars(self), "config": self.config.to_dict(), "steps": [step.to_dict() for step in self.steps]}
        return json.dumps(data, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> PruningHistory:
        """Read what ``to_json`` wrote."""
        data = json.loads(text)
        steps = tuple(PruningStep.from_dict(step) for step in data["steps"])
        return cls(**{**data, "config": PruningConfig.from_dict(data["config"]), "steps": steps})

    def save(self, folder: str | Path) -> Path:
        """Write the history into a folder, at once or not at all."""
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".tmp")
        scratch.write_text(self.to_json() + "\n")
        os.replace(scratch, path)
        return path

    @classmethod
    def load(cls, folder: str | Path) -> PruningHistory | None:
        """Read the history of a folder; None if there is none."""
        path = Path(folder) / FILE
        return cls.from_json(path.read_text()) if path.is_file() else None

    def check_same_run(self, other: PruningHistory) -> None:
        """Refuse to go on with a run that was for something else.

        Raises:
            ValueError: naming what differs: the config (which field), the model, or the calibration data.
        """
        mine, theirs = asdict(self.config), asdict(other.config)
        differ = [f"{name} was {mine[name]!r}, is {theirs[name]!r}" for name in mine if mine[name] != theirs[name]]
        differ += [
            f"another {what}" for what in ("model", "calibration") if getattr(self, what) != getattr(other, what)
        ]
        if differ:
            raise ValueError(
                f"The folder holds the history of another run: {'; '.join(differ)}. Use the same settings to go on, or "
                "another folder."
            )

    @property
    def scored_share(self) -> float | None:
        """Layer calls that the scoring took, over those of scoring every candidate at every step; None if uncounted."""
        full = sum(step.layer_calls_in_full for step in self.steps)
        return sum(step.layer_calls for step in self.steps) / full if full else None

    def table(self) -> str:
        """Return the steps as a Markdown table."""
        rows = ["| step | branch | removed | score | parameters | removed of all |", "|---|---|---|---|---|---|"]
        for step in self.steps:
            score = "" if step.score is None else f"{step.score:.4g}"
            rows.append(
                f"| {step.step} | {step.branch} | {', '.join(step.removed)} | {score} | {step.parameters:,} | "
                f"{step.ratio:.2%} |"
            )
        return "\n".join(rows)


def recorded_plan(model: Any) -> PruningPlan | None:
    """Return what was removed from a model, as its config records it; None for one that was never pruned.

    Args:
        model: bare or wrapped, or its config.

    Example:
        >>> recorded_plan(nn.Linear(2, 2)) is None
        True
    """
    config = getattr(unwrap(model), "config", None) if isinstance(model, nn.Module) else model
    for one in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
        record = getattr(one, "pruning", None)  # the first version kept it with the layers' config
        if record and "plan" in record:
            return PruningPlan.from_dict(record["plan"])
    return None


def model_digest(model: nn.Module) -> str:
    """Return a short digest of a model: names and shapes of its parameters, and a few values of each.

    Example:
        >>> torch.manual_seed(0) and len(model_digest(nn.Linear(2, 2)))
        16
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if not parameter.is_meta:
            digest.update(parameter.detach().flatten()[:16].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def data_digest(batches: Sequence[Mapping[str, Any]]) -> str:
    """Return a short digest of calibration batches: every tensor's values."""
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            if isinstance(batch[name], torch.Tensor):
                digest.update(name.encode() + batch[name].double().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _plain(value: float | None) -> float | str | None:
    return str(value) if value is not None and math.isinf(value) else value
