"""The record of a selection: which layers were chosen, from which scores, and how to hand them to LoRA."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import hf_cka
from hf_cka.data import CalibrationInfo

SIDECAR = "cka_selection.json"

# Scores closer than this are one rank, and the lower layer goes first. A forward pass in float32 repeats to about
# 1e-7 when the batch size changes, so a rank must not hang on less than this.
_RESOLUTION = 1e-6


@dataclass(frozen=True)
class LayerSelection:
    """Which layers were chosen, and everything that led there.

    Args:
        layers: the chosen layers, ascending.
        scores: one a layer, higher matters more; None where it is undefined.
        errors: standard errors of the scores; None where there is none.
        status: one a layer, ``"ok"`` or what is wrong with its representation.
        criterion: the name that was asked for.
        keep_ratio: the share of layers that was asked for.
        settings: everything else that decided (estimator, kernel, pooling, seed, paper, exclude).
        model_type: of the measured model's config.
        layers_path: where its layers are (``"model.layers"``).
        projections: names of the linear modules of a layer, relative to it.
        ambiguous: true if those short names also match modules outside these layers (several towers).
        calibration: what was measured; None for criteria that need no data.
        modules: full names of the projections of every layer, where layers differ; empty where name follows from
            number and projection.
        experts: full names of the parameters that hold the experts of every layer; empty where no layer has any.
        others: the choices in further stacks of the same model.
        hf_cka_version: that made this.
        version: of this format.

    Example:
        >>> selection = LayerSelection(
        ...     layers=(0, 2), scores=(0.3, 0.1, 0.2, None), errors=(0.01, 0.01, 0.01, None),
        ...     status=("ok", "ok", "ok", "constant"), criterion="cka", keep_ratio=0.5,
        ...     model_type="llama", layers_path="model.layers", projections=("self_attn.q_proj", "mlp.up_proj"))
        >>> selection.num_hidden_layers, selection.undefined
        (4, {3: 'constant'})
        >>> selection.lora_kwargs()["layers_to_transform"]
        [0, 2]
        >>> LayerSelection.from_dict(selection.to_dict()) == selection
        True
    """

    layers: tuple[int, ...]
    scores: tuple[float | None, ...]
    errors: tuple[float | None, ...]
    status: tuple[str, ...]
    criterion: str
    keep_ratio: float
    model_type: str
    layers_path: str
    projections: tuple[str, ...]
    ambiguous: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    calibration: CalibrationInfo | None = None
    modules: tuple[tuple[str, ...], ...] = ()
    experts: tuple[tuple[str, ...], ...] = ()
    others: tuple[LayerSelection, ...] = ()
    hf_cka_version: str = hf_cka.__version__
    version: int = 1

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the measured model."""
        return len(self.scores)

    @property
    def undefined(self) -> dict[int, str]:
        """Layers without a score, and why."""
        return {i: self.status[i] for i, score in enumerate(self.scores) if score is None}

    @property
    def ties(self) -> tuple[int, ...]:
        """Layers on either side of the cut that the standard errors do not separate from it."""
        inside = [s for i in self.layers if (s := self.scores[i]) is not None]
        outside = [s for i, s in enumerate(self.scores) if i not in self.layers and s is not None]
        if not inside or not outside:
            return ()
        cut = (min(inside) + max(outside)) / 2
        return tuple(
            i
            for i, (score, error) in enumerate(zip(self.scores, self.errors, strict=True))
            if score is not None and error is not None and abs(score - cut) < error
        )

    def module_names(self, target_modules: str | Iterable[str] | None = None) -> list[str]:
        """Return the full names of the projections in the chosen layers.

        Args:
            target_modules: as in ``LoraConfig``: names or suffixes, a regular expression over full names, or
                ``"all-linear"``; None means all projections.

        Raises:
            ValueError: if nothing matches.
        """
        names = self._names()
        if target_modules is None or target_modules == "all-linear":
            return names
        if isinstance(target_modules, str):
            chosen = [name for name in names if re.fullmatch(target_modules, name)]
        else:
            wanted = tuple(target_modules)
            chosen = [name for name in names if any(name == t or name.endswith(f".{t}") for t in wanted)]
        if not chosen:
            raise ValueError(
                f"target_modules={target_modules!r} matches no projection of the chosen layers; "
                f"a layer of this model has: {', '.join(self.projections)}."
            )
        return chosen

    def _names(self) -> list[str]:
        if self.modules:
            own = [name for i in self.layers for name in self.modules[i]]
        else:
            own = [f"{self.layers_path}.{i}.{name}" for i in self.layers for name in self.projections]
        return own + [name for other in self.others for name in other._names()]

    def expert_names(self) -> list[str]:
        """Return the full names of the parameters that hold the experts of the chosen layers.

        Raises:
            ValueError: if the chosen layers have no experts.

        Example:
            >>> LayerSelection(layers=(1,), scores=(0.0, 1.0), errors=(None,) * 2, status=("ok",) * 2,
            ...     criterion="cka", keep_ratio=0.5, model_type="mixtral", layers_path="model.layers",
            ...     projections=("self_attn.q_proj",), experts=((), ("model.layers.1.mlp.experts.down_proj",))
            ... ).expert_names()
            ['model.layers.1.mlp.experts.down_proj']
        """
        names = self._experts()
        if not names:
            raise ValueError(f"The chosen layers of this {self.model_type!r} have no experts (in one parameter).")
        return names

    def _experts(self) -> list[str]:
        own = [name for i in self.layers for name in (self.experts[i] if self.experts else ())]
        return own + [name for other in self.others for name in other._experts()]

    def lora_kwargs(
        self, target_modules: str | Iterable[str] | None = None, *, exact: bool = False, experts: bool = False
    ) -> dict[str, Any]:
        """Return the arguments that make a ``LoraConfig`` adapt only the chosen layers.

        Args:
            target_modules: as in :meth:`module_names`.
            exact: give full module names instead of layer numbers; always so for models with several towers.
            experts: adapt the experts of the chosen layers too, through ``target_parameters``. Without it layers of
                experts are adapted in their attention and their shared experts.

        Returns:
            ``target_modules``, ``layers_to_transform`` and ``layers_pattern``, or ``target_modules`` alone; and
            ``target_parameters`` with ``experts``.

        Raises:
            ValueError: if ``target_modules`` matches nothing, or there are no experts.
        """
        if experts:
            return {**self.lora_kwargs(target_modules, exact=exact), "target_parameters": self.expert_names()}
        names = self.module_names(target_modules)
        pattern = self.layers_path.rpartition(".")[2]
        if exact or self.ambiguous or self.modules or self.others or "." not in self.layers_path:
            return {"target_modules": names}
        prefix = re.compile(re.escape(self.layers_path) + r"\.\d+\.")
        return {
            "target_modules": sorted({prefix.sub("", name, count=1) for name in names}),
            "layers_to_transform": list(self.layers),
            "layers_pattern": pattern,
        }

    def target_regex(self, target_modules: str | Iterable[str] | None = None) -> str:
        """Return one regular expression that matches exactly :meth:`module_names`, for tools that take one string.

        Example:
            >>> LayerSelection(layers=(0, 2), scores=(1.0, 0.0, 1.0), errors=(None,) * 3, status=("ok",) * 3,
            ...     criterion="cka", keep_ratio=0.7, model_type="llama", layers_path="model.layers",
            ...     projections=("mlp.up_proj",)).target_regex()
            'model\\\\.layers\\\\.(0|2)\\\\.(mlp\\\\.up_proj)'
        """
        names = self.module_names(target_modules)
        start = f"{self.layers_path}."
        if self.modules or self.others:
            return "|".join(map(re.escape, names))
        relative = sorted({name[len(start) :].partition(".")[2] for name in names})
        numbers = "|".join(map(str, self.layers))
        return f"{re.escape(self.layers_path)}\\.({numbers})\\.({'|'.join(map(re.escape, relative))})"

    def targets_hash(self) -> str:
        """Return a digest of the chosen modules, to compare an adapter with the model it meets."""
        return hashlib.sha256("\n".join(self.module_names()).encode()).hexdigest()[:16]

    def table(self) -> str:
        """Return the scores as text: rank, score, standard error, and what was chosen; stack by stack."""
        return "\n\n".join(one._table(bool(self.others)) for one in (self, *self.others))

    def _table(self, several: bool) -> str:
        defined = [(i, s) for i, s in enumerate(self.scores) if s is not None]
        top = max((abs(s) for _, s in defined), default=0.0) or 1.0
        rank = {i: r for r, i in enumerate(ranking(self.scores), start=1)}
        lines = [f"{'layer':>5}  {'rank':>4}  {'score':>8}  {'+/-':>7}  chosen"]
        for i, (score, error) in enumerate(zip(self.scores, self.errors, strict=True)):
            mark = ("yes" if i in self.layers else "") + (" ~" if i in self.ties else "")
            if score is None:
                lines.append(f"{i:>5}  {'':>4}  {'':>8}  {'':>7}  {mark:<6}  undefined: {self.status[i]}")
                continue
            bar = "#" * round(24 * max(score, 0.0) / top)
            note = "" if self.status[i] == "ok" else f"  ({self.status[i]})"
            shown = f"{error:7.4f}" if error is not None else " " * 7
            lines.append(f"{i:>5}  {rank[i]:>4}  {score:8.4f}  {shown}  {mark:<6}  {bar}{note}".rstrip())
        where = f" of {self.layers_path}" if several else ""
        lines.append(f"{len(self.layers)} of {self.num_hidden_layers} layers{where} chosen by {self.criterion}.")
        if self.ties:
            lines.append("~ within one standard error of the cut: more samples may choose otherwise.")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        data = asdict(self)
        data["others"] = [other.to_dict() for other in self.others]
        data["num_hidden_layers"] = self.num_hidden_layers
        data["targets_hash"] = self.targets_hash()
        return json.loads(json.dumps(data))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerSelection:
        """Rebuild a selection from :meth:`to_dict`.

        Raises:
            ValueError: if the data has another format version or lacks a field.
        """
        if data.get("version") != 1:
            raise ValueError(f"Selection format {data.get('version')!r} is not known here (1 is): update hf_cka.")
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in known}
        for name in ("modules", "experts"):
            values[name] = tuple(map(tuple, values.get(name) or ()))
        values["others"] = tuple(cls.from_dict(other) for other in data.get("others") or ())
        if values.get("calibration") is not None:
            values["calibration"] = CalibrationInfo(**values["calibration"])
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"This is not a complete selection: {error}.") from error

    def save(self, path: str | Path) -> Path:
        """Write the selection as JSON, into ``cka_selection.json`` if ``path`` is a folder; return the file."""
        file = Path(path)
        if file.is_dir() or not file.suffix:
            file.mkdir(parents=True, exist_ok=True)
            file = file / SIDECAR
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return file

    @classmethod
    def load(cls, path: str | Path) -> LayerSelection:
        """Read a selection from a file, a folder (an adapter, say) or a repository of the Hub.

        Raises:
            FileNotFoundError: if there is none.
        """
        file = Path(path)
        if file.is_dir():
            file = file / SIDECAR
        if not file.is_file():
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import HfHubHTTPError, HFValidationError

            try:
                file = Path(hf_hub_download(str(path), SIDECAR))
            except (HFValidationError, HfHubHTTPError, OSError) as error:
                raise FileNotFoundError(
                    f"There is no selection at {str(path)!r}: give a {SIDECAR} file, the folder of an adapter that "
                    "CKALoraConfig saved, or its Hub id."
                ) from error
        return cls.from_dict(json.loads(file.read_text(encoding="utf-8")))


def ranking(scores: Sequence[float | None]) -> list[int]:
    """Return the layers that have a score, highest first; equal scores keep the lower layer first."""
    defined = [(i, s) for i, s in enumerate(scores) if s is not None]
    return [i for i, _ in sorted(defined, key=lambda pair: (-round(pair[1] / _RESOLUTION), pair[0]))]
