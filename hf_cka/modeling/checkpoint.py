"""Save a pruned model so that it loads anywhere it can, prove it, and load it again."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_cka.anatomy import find_anatomy
from hf_cka.data import public_name
from hf_cka.modeling.probe import align
from hf_cka.modeling.structure import Rung, relabelled_config, rung_of
from hf_cka.modeling.surgery import widths_of
from hf_cka.modeling.verification import Verification, inputs_for, verify_many

SCORES_FILE = "pruning_scores.json"
_RECORD_FIELDS = ("method", "settings", "calibration", "base_model", "base_revision", "recovery")


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, or does not hold what it says."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """What `save_pruned` wrote.

    Attributes:
        folder: where.
        rung: who can load it, and why it needs no more and no less.
        parameters: parameters of the model.
        verification: the checks, or None with `verify=False`.
    """

    folder: Path
    rung: Rung
    parameters: int
    verification: Verification | None

    def __str__(self) -> str:
        rung = f"rung {self.rung.name!r}, model_type {self.rung.model_type!r}"
        text = f"{self.folder}: {self.parameters:,} parameters, {rung}"
        text += f" ({self.rung.reason})" if self.rung.reason else ""
        return f"{text}\n{self.verification}" if self.verification else text


def save_pruned(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    record: Mapping[str, Any] | None = None,
    scores: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    verify: bool = True,
    max_shard_size: int | str = "5GB",
) -> SavedCheckpoint:
    """Save a model that `apply_plan` pruned, on the first rung of the ladder that can express it.

    The folder appears whole or not at all: everything is written beside it, checked there in a fresh process, and
    moved into place at the end.

    Args:
        model: the model, without adapters.
        folder: where to; it must not exist, be empty, or hold a checkpoint that `overwrite` lets go.
        tokenizer: saved with the model, if given.
        record: how the pruning was decided: "method", "settings", "calibration" (source, samples, seed, hash),
            "base_model", "base_revision"; and "recovery", how the model was trained afterwards. Goes into
            `config.json` under "pruning", with the plan.
        scores: what the criterion measured; goes into `pruning_scores.json`.
        overwrite: replace a checkpoint that is there.
        verify: reload in a fresh process and compare logits and cached, uncached and static generation.
        max_shard_size: split the weights into files of at most this size.

    Returns:
        What was written; print it.

    Raises:
        ValueError: for a model with adapters or unknown fields in `record`.
        FileExistsError: if the folder holds something and `overwrite` is not set, or it holds no checkpoint.
        CheckpointError: if there is no space, or a check fails; nothing is left behind then.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     num_hidden_layers=2, hidden_size=8, intermediate_size=16, num_attention_heads=2, vocab_size=16
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = save_pruned(LlamaForCausalLM(config), f"{folder}/out", verify=False)
        ...     saved.rung.name, type(load_pruned(saved.folder)).__name__
        ('stock', 'LlamaForCausalLM')
    """
    target = Path(folder).absolute()
    anatomy = find_anatomy(model)
    inner: Any = anatomy.model
    if getattr(inner, "peft_config", None) or inner is not model:
        raise ValueError(
            "The model holds adapters or is wrapped. Merge them first (`model = peft_model.merge_and_unload()`), or "
            "save the adapters on their own; pass the bare model."
        )
    unknown = sorted(set(record or {}) - set(_RECORD_FIELDS))
    if unknown:
        raise ValueError(f"Unknown fields {unknown} in record; it may hold {', '.join(_RECORD_FIELDS)}.")
    _check_target(target, overwrite)
    _check_space(model, target)
    rung = rung_of(inner)

    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        work.chmod(0o777 & ~_umask())
        to_save = _relabelled(model) if rung.name == "relabel" else model
        with _pruning_record(to_save.config, model, anatomy, record or {}):
            to_save.save_pretrained(work, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
        if scores is not None:
            (work / SCORES_FILE).write_text(json.dumps({"format_version": 1, "scores": scores}, indent=1))
        verification = None
        if verify:
            verification = _verify_against(model, work)
            if not verification.passed:
                raise CheckpointError(
                    f"The checkpoint does not compute what the model does, and was deleted.\n{verification}"
                )
        for file in work.iterdir():
            file.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner can read
        _move_into_place(work, target)
    except OSError as error:
        raise CheckpointError(
            f"Could not write the checkpoint to {str(target)!r}: {error}. Nothing was left."
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if verification is not None:
        verification = Verification(str(target), verification.checks)
    parameters = sum(p.numel() for p in model.parameters())
    return SavedCheckpoint(target, rung, parameters, verification)


def load_pruned(folder: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Load a checkpoint of any rung, and refuse one that does not hold what its config says.

    Args:
        folder: the checkpoint, or the name of one on the Hub.
        kwargs: passed to `from_pretrained` (`dtype` is "auto" unless given).

    Returns:
        The model, of the class that was saved.

    Raises:
        CheckpointError: if tensors are missing, left over or of another shape. Stock `from_pretrained` fills those
            with random numbers and only reports it.
    """
    from transformers import AutoConfig

    from hf_cka.modeling.probe import auto_class
    from hf_cka.modeling.register import register

    register()
    kwargs = {"dtype": "auto", "trust_remote_code": False, **kwargs}
    config = AutoConfig.from_pretrained(folder, trust_remote_code=kwargs["trust_remote_code"])
    architecture = (config.architectures or [""])[0]
    loader = auto_class(architecture)
    try:
        model, report = loader.from_pretrained(folder, output_loading_info=True, **kwargs)
    except RuntimeError as error:
        raise CheckpointError(f"{str(folder)!r} does not hold what its config says: {error}") from error
    wrong = {
        k: sorted(map(str, report[k])) for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[k]
    }
    if wrong:
        raise CheckpointError(
            f"{str(folder)!r} does not hold what its config says: "
            + "; ".join(f"{kind.replace('_', ' ')} {names[:5]}" for kind, names in wrong.items())
            + ". Save or download it again."
        )
    return model


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{str(target)!r} is a file; a checkpoint is a folder.")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"{str(target)!r} is not empty. Pass overwrite=True to replace it.")
    if not (target / "config.json").is_file():
        raise FileExistsError(f"{str(target)!r} holds no checkpoint (no config.json), and is not replaced.")


def _check_space(model: Any, target: Path) -> None:
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    existing = next(parent for parent in (target, *target.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise CheckpointError(
            f"No space left for the checkpoint: it needs {needed / 1e9:.2f} GB, and {str(existing)!r} has "
            f"{free / 1e9:.2f} GB free."
        )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _move_into_place(work: Path, target: Path) -> None:
    """A rename is atomic. Where a checkpoint is replaced, a crash between the two renames leaves none, never half."""
    old = None
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent)) / "checkpoint"
        target.rename(old)
    work.rename(target)
    if old is not None:
        shutil.rmtree(old.parent, ignore_errors=True)


def _relabelled(model: Any) -> Any:
    """The same weights in the Mistral class of the same head."""
    import transformers

    stock = getattr(type(model), "stock_class", type(model)).__name__
    other = getattr(transformers, stock.replace("Llama", "Mistral"), None)
    if other is None:
        raise ValueError(f"There is no Mistral class for {stock}; save the model with a head that has one.")
    with torch.device("meta"):
        relabelled = other(relabelled_config(model))
    relabelled.load_state_dict(model.state_dict(), strict=True, assign=True)
    relabelled.tie_weights()
    # buffers that are computed, not stored, are still on the meta device; only the weights are saved
    if model.can_generate():
        relabelled.generation_config = copy.deepcopy(model.generation_config)
    return relabelled


class _pruning_record:
    """Put the record into the config while it is saved; on an error the model is left as it was."""

    def __init__(self, config: Any, model: Any, anatomy: Any, record: Mapping[str, Any]) -> None:
        self.config = config
        self.before = copy.deepcopy(getattr(config, "pruning", None))
        self.name = config.__dict__.get("_name_or_path", "")
        old = copy.deepcopy(getattr(model.config, "pruning", None) or {})
        base = record.get("base_model") or old.get("base_model") or public_name(model.config.name_or_path)
        revision = (
            record.get("base_revision") or old.get("base_revision") or getattr(model.config, "_commit_hash", None)
        )
        new = {
            "format_version": 2,
            **old,
            **record,
            "base_model": base,
            "base_revision": revision,
            "widths_after": widths_of(anatomy),
            "parameters_after": sum(p.numel() for p in model.parameters()),
        }
        step = {
            k: new[k] for k in ("method", "settings", "calibration", "hf_cka_version", "parameters_after") if k in new
        }
        if "recovery" in record:  # of this step; the one of an earlier step is in the history already
            step["recovery"] = record["recovery"]
        new["history"] = [*old.get("history", []), step]
        self.record = new

    def __enter__(self) -> None:
        self.config.pruning = self.record

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            self.config.pruning = self.before
            if self.before is None:
                del self.config.pruning


def _verify_against(model: Any, work: Path) -> Verification:
    """The three checks; the logits are compared on the model's own device, in the model's own dtype."""
    devices = {p.device for p in model.parameters()}
    device = str(next(iter(devices))) if len(devices) == 1 else "auto"
    training = model.training
    model.eval()
    align(model)
    rounded = _restore_buffers(model)
    try:
        inputs, logits = inputs_for(model, json.loads((work / "config.json").read_text()))
    finally:
        model.train(training)
        for module, name, buffer in rounded:
            setattr(module, name, buffer)
    attention = getattr(model.config, "_attn_implementation", None)
    return verify_many([work], device=device, expected={0: logits}, attention=attention, inputs={0: [inputs]})[0]


def _restore_buffers(model: Any) -> list[tuple[Any, str, torch.Tensor]]:
    """Compute again the RoPE frequencies that `model.to(torch.bfloat16)` rounded; returns what to put back.

    They are no part of a checkpoint: a model that is loaded in bfloat16 has them in float32.
    """
    changed = []
    for module in list(model.modules()):
        names = [
            n for n, b in module.named_buffers(recurse=False) if n.endswith("inv_freq") and b.dtype != torch.float32
        ]
        if names and hasattr(module, "config"):
            fresh = type(module)(module.config).to(getattr(module, names[0]).device)
            for name in names:
                changed.append((module, name, getattr(module, name)))
                setattr(module, name, getattr(fresh, name))
    return changed
