"""Prove a checkpoint: reload it in a fresh process, and compare what it computes."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_cka.anatomy.inputs import probe_batches
from hf_cka.anatomy.model import twin_of
from hf_cka.anatomy.twin import quiet
from hf_cka.modeling import modeling_hf_cka as code
from hf_cka.modeling.fresh_process import run_fresh
from hf_cka.modeling.probe import compare_generation, generates, run_first

_PROBE = Path(__file__).with_name("probe.py")


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        name: what, in words.
        passed: whether it holds.
        detail: what was found where it does not.
    """

    name: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class Verification:
    """What was checked about one checkpoint.

    Attributes:
        folder: where it is.
        checks: every check that was made.
    """

    folder: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        lines = [f"{self.folder}: {'passed' if self.passed else 'FAILED'}"]
        lines += [
            f"  {'ok    ' if c.passed else 'FAILED'}  {c.name}{': ' * bool(c.detail)}{c.detail}" for c in self.checks
        ]
        return "\n".join(lines)


def verify(folder: str | os.PathLike[str], *, device: str | None = None) -> Verification:
    """Check a checkpoint folder in a fresh process: it loads whole, and caches do not change what it generates.

    A stock checkpoint is loaded with transformers alone; one that needs hf_cka is loaded twice, by the file that
    travels with it while hf_cka cannot be imported, and by the installed package, and both must compute the same.

    Args:
        folder: the checkpoint.
        device: where to load it ("cpu", "cuda:0", "auto" for `device_map="auto"`); the CPU by default.

    Returns:
        The checks, passed or not; print it. Nothing is raised for a checkpoint that fails.

    Raises:
        FileNotFoundError: if there is no checkpoint in the folder.
    """
    return verify_many([folder], device=device)[0]


def verify_many(
    folders: Sequence[str | os.PathLike[str]],
    *,
    device: str | None = None,
    expected: Mapping[int, torch.Tensor] | None = None,
    attention: str | None = None,
    inputs: Mapping[int, Sequence[Mapping[str, torch.Tensor]]] | None = None,
) -> list[Verification]:
    """Check several checkpoints in one fresh process; see `verify`.

    Args:
        folders: the checkpoints.
        device: where to load them.
        expected: position in `folders` -> the logits of the model in memory, on the inputs of `inputs_for`; they must
            come back equal to the last bit.
        attention: attention implementation to load them with.
        inputs: position in `folders` -> what to run it on, the first that it takes; by default what its config says
            it reads.
    """
    with tempfile.TemporaryDirectory() as scratch:
        jobs: list[dict[str, Any]] = []
        owners: list[int] = []
        for position, folder in enumerate(folders):
            config = _read_config(Path(folder))
            tried = (inputs or {}).get(position) or candidates(config)
            files = [str(Path(scratch) / f"inputs{position}.{i}.safetensors") for i in range(len(tried))]
            for tensors, file in zip(tried, files, strict=True):
                _save({name: value.contiguous() for name, value in tensors.items()}, Path(file))
            for way in ("remote", "package") if config.get("model_type") == code.MODEL_TYPE else ("stock",):
                owners.append(position)
                jobs.append(
                    {
                        "folder": str(Path(folder).resolve()),
                        "way": way,
                        "inputs": files,
                        "logits": str(Path(scratch) / f"logits{len(jobs)}.safetensors"),
                        "attention": attention,
                        "device": device or "cpu",
                        "threads": torch.get_num_threads(),
                        "precision": torch.get_float32_matmul_precision(),
                    }
                )
        answers = _ask(jobs, Path(scratch))
        found: list[list[Check]] = [[] for _ in folders]
        reference = dict(expected or {})
        for owner, job, answer in zip(owners, jobs, answers, strict=True):
            if any(answer.get("generation", {}).values()) and not _dense_generates(_read_config(Path(folders[owner]))):
                answer["generation"] = {}  # the dense model's own caches change what it generates
            found[owner] += _checks(job, answer, reference, owner)
    return [Verification(str(f), tuple(checks)) for f, checks in zip(folders, found, strict=True)]


def probe_inputs(config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the inputs that checkpoints are compared on: random tokens, the second row padded on the left.

    Args:
        config: the content of `config.json`.

    Returns:
        `input_ids` and `attention_mask`, each (2, 12).
    """
    text = config.get("text_config") or config
    generator = torch.Generator().manual_seed(0)
    # the first ids are special tokens in most vocabularies (padding and mask tokens change how encoders count)
    low = min(5, text["vocab_size"] - 1)
    ids = torch.randint(low, text["vocab_size"], (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def candidates(config: Mapping[str, Any]) -> list[dict[str, torch.Tensor]]:
    """Return inputs that a model of this config may take, the fullest first.

    Args:
        config: the content of `config.json`.
    """
    parts = [v for v in config.values() if isinstance(v, Mapping) and "model_type" in v]
    if "vocab_size" in config and not parts and not config.get("is_encoder_decoder"):
        return [probe_inputs(config)]
    made = [dict(batch) for batch in itertools.islice(probe_batches(_on_meta(config), rows=2), 24)]
    return made + ([probe_inputs(config)] if "vocab_size" in {**config, **(config.get("text_config") or {})} else [])


def inputs_for(model: Any, config: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return inputs that a model takes, and what it gives.

    Args:
        model: in eval mode.
        config: the content of its `config.json`.
    """
    inputs, output = run_first(model, candidates(config))
    return inputs, output.cpu()


def _stock(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """The stock class and the stock config that a `config.json` names."""
    import transformers

    stock = getattr(transformers, code.stock_name((config.get("architectures") or [""])[0]))
    kept = {k: v for k, v in config.items() if k not in ("hf_cka", "auto_map", "base_model_type", "model_type")}
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    model_type = str(config.get("base_model_type") or config.get("model_type"))
    cls = known[model_type] if model_type in known else stock.config_class  # noqa: SIM401 (its `get` is not lazy)
    return stock, cls.from_dict(kept)


def _on_meta(config: Mapping[str, Any]) -> Any:
    stock, plain = _stock(config)
    with quiet(), torch.device("meta"):
        return stock._from_config(plain)


def _dense_generates(config: Mapping[str, Any]) -> bool:
    """Whether the dense model generates the same with and without a cache, tried on its twin."""
    try:
        twin = twin_of(*_stock(config))
    except (AttributeError, ValueError):
        return True
    if twin is None or not generates(twin.model, twin.batch):
        return True
    return not any(compare_generation(twin.model, twin.batch).values())


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint in {str(folder)!r}: it has no config.json.")
    return json.loads(path.read_text())


def _ask(jobs: list[dict[str, Any]], scratch: Path) -> list[dict[str, Any]]:
    request, answer = scratch / "request.json", scratch / "answer.json"
    request.write_text(json.dumps(jobs))
    # modules of remote code are cached by folder name; a cache of its own keeps this run from seeing an older file
    environment = {"HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1"}
    try:
        run_fresh([str(_PROBE), str(request), str(answer)], "reloads the checkpoint", environment)
    except RuntimeError as error:
        return [{"error": str(error)} for _ in jobs]
    return json.loads(answer.read_text())


_WAYS = {
    "stock": "with transformers alone",
    "remote": "with trust_remote_code, hf_cka not installed",
    "package": "with hf_cka imported",
}


def _checks(job: dict[str, Any], answer: dict[str, Any], reference: dict[int, torch.Tensor], owner: int) -> list[Check]:
    from safetensors.torch import load_file

    way = _WAYS[job["way"]]
    if "error" in answer and "class" not in answer:
        return [Check(f"loads {way}", False, answer["error"])]
    wrong = [
        f"{kind.removesuffix('_keys')}: {', '.join(answer[kind][:3])}{' ...' * (len(answer[kind]) > 3)}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if answer.get(kind)
    ]
    checks = [Check(f"loads {way}, as {answer['class']}, every tensor in its place", not wrong, "; ".join(wrong))]
    if "error" in answer:
        return [*checks, Check("runs", False, answer["error"])]
    if not answer["finite"]:
        checks.append(Check("logits are finite", False, "NaN or infinity"))
    logits = load_file(job["logits"])["logits"]
    if owner in reference:
        same = logits.shape == reference[owner].shape and torch.equal(logits, reference[owner].to(logits.dtype))
        checks.append(Check("logits equal to the last bit", same, "" if same else _gap(logits, reference[owner])))
    reference.setdefault(owner, logits)
    for name, detail in answer["generation"].items():
        checks.append(Check(f"greedy generation, {name} = uncached", not detail, detail))
    return checks


def _gap(one: torch.Tensor, two: torch.Tensor) -> str:
    if one.shape != two.shape:
        return f"shape {tuple(one.shape)} instead of {tuple(two.shape)}"
    return f"largest difference {float((one.double() - two.double()).abs().max()):.3g}"
