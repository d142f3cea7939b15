"""Run in a fresh process: load checkpoints as a user would, and report what they compute. torch and transformers only.

    python -P probe.py REQUEST.json ANSWER.json

The request is a list of jobs: {"folder", "way", "inputs", "logits", "attention", "device", "threads", "precision"}.
`way` is "stock" (transformers alone), "remote" (the file that travels with the checkpoint, hf_cka not importable) or
"package" (after `import hf_cka`). The answer is one dict per job.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

# How far logits of cached and uncached decoding may differ, relative to the largest: other matrix shapes round
# differently. Reading a wrong or missing cache entry is orders of magnitude above this.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
NEW_TOKENS = 10


def auto_class(architecture: str) -> Any:
    """The auto class that loads an architecture, with its head; `AutoModel` for a model without one."""
    from transformers.models.auto import modeling_auto

    stock = re.sub(r"^Pruned(.*?)(Of\w+Config)?$", r"\1", architecture)
    for name, auto in vars(modeling_auto).items():
        if not name.startswith("AutoModelFor") or (mapping := getattr(auto, "_model_mapping", None)) is None:
            continue
        names = [n for v in mapping._model_mapping.values() for n in ((v,) if isinstance(v, str) else v)]
        if stock in names:
            return getattr(transformers, name)
    return transformers.AutoModel


def load(job: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Load the checkpoint of a job; returns the model and the loading report."""
    folder = Path(job["folder"])
    config = json.loads((folder / "config.json").read_text())
    architecture = (config.get("architectures") or [""])[0]
    loader = auto_class(architecture)
    if loader is transformers.AutoModel and job["way"] == "stock":
        loader = getattr(transformers, architecture, loader)  # a head that has no auto class of its own
    extra: dict[str, Any] = {"trust_remote_code": True} if job["way"] == "remote" else {}
    if job.get("attention"):
        extra["attn_implementation"] = job["attention"]
    if job.get("device") == "auto":
        extra["device_map"] = "auto"
    model, report = loader.from_pretrained(folder, dtype="auto", output_loading_info=True, **extra)
    if job.get("device") not in (None, "auto"):
        model = model.to(job["device"])
    return model.eval(), report


def align(model: Any) -> None:
    """Move CPU weights to aligned memory, so that only their values decide the last bit of what a model computes.

    safetensors maps a file into memory, where a tensor may start at any multiple of 8 bytes; kernels then take
    another path and round differently than on memory that torch allocated.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def placed(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inputs on the device of the model, real numbers in its dtype."""
    first = next(p for p in model.parameters() if p.is_floating_point())
    return {
        name: value.to(first.device, first.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def first_output(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits, or whatever a model without a head returns first; without a cache."""
    inputs = placed(model, inputs)
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False  # type: ignore[assignment]
    with torch.no_grad():
        output = model(**inputs)
    for name in ("logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            output = (getattr(output, name),)
            break
    first = output[0] if not hasattr(output, "values") else next(iter(output.values()))
    return first[0] if isinstance(first, (tuple, list)) else first


def generates(model: Any, inputs: dict[str, torch.Tensor]) -> bool:
    """Whether greedy text can be generated from these inputs."""
    return bool(model.can_generate()) and "input_ids" in inputs and inputs["input_ids"].ndim == 2


def compare_generation(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, str]:
    """Greedy generation with a dynamic cache and with a static one, each against none; "" where they agree."""
    inputs = {name: value for name, value in placed(model, inputs).items() if not name.startswith("decoder_")}
    common = {
        "do_sample": False,
        "num_beams": 1,
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "return_dict_in_generate": True,
        "output_logits": True,
        "pad_token_id": 0,
        # a static cache is compiled on accelerators, which takes minutes and proves nothing here
        "disable_compile": True,
    }
    plain = model.generate(**inputs, **common, use_cache=False)
    found = {}
    ways: list[tuple[str, dict[str, Any]]] = [("cached", {})]
    if getattr(model, "_can_compile_fullgraph", False):  # what transformers calls fit for a static cache
        ways.append(("static", {"cache_implementation": "static"}))
    for name, extra in ways:
        try:
            other = model.generate(**inputs, **common, **extra)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
            continue
        start = plain.sequences.shape[1] - NEW_TOKENS
        found[name] = difference(plain, other, start, TOLERANCE.get(model.dtype, 1e-1))
    return found


def difference(plain: Any, other: Any, start: int, tolerance: float) -> str:
    """Say how two greedy generations differ beyond rounding, or ""."""
    for row in range(plain.sequences.shape[0]):
        for step in range(NEW_TOKENS):
            one, two = plain.logits[step][row].double(), other.logits[step][row].double()
            scale = one.abs().max()
            gap = float((one - two).abs().max() / scale)
            if not gap <= tolerance:
                return f"row {row}, new token {step}: logits differ by {gap:.2g} of the largest"
            ours, theirs = plain.sequences[row, start + step], other.sequences[row, start + step]
            if ours != theirs:
                margin = float((one[ours] - one[theirs]).abs() / scale)
                if margin > tolerance:
                    return f"row {row}, new token {step}: {int(theirs)} instead of {int(ours)}"
                break  # a tie within rounding; from here on the texts differ for a good reason
    return ""


def run_first(model: Any, candidates: list[dict[str, torch.Tensor]]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The first of several inputs that a model takes, and what it gives."""
    for position, inputs in enumerate(candidates):
        try:
            output = first_output(model, inputs)
            if output.isfinite().all() or position == len(candidates) - 1:
                return inputs, output
        except Exception:
            if position == len(candidates) - 1:
                raise
    raise ValueError("There are no inputs to try.")


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Do one job; an error becomes part of the answer."""
    torch.set_num_threads(job.get("threads") or torch.get_num_threads())
    torch.set_float32_matmul_precision(job.get("precision") or "highest")
    answer: dict[str, Any] = {"folder": job["folder"], "way": job["way"]}
    try:
        model, report = load(job)
        answer["class"] = type(model).__name__
        answer["parameters"] = sum(p.numel() for p in model.parameters())
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            answer[kind] = sorted(map(str, report.get(kind) or ()))
        align(model)
        inputs, output = run_first(model, [load_file(path) for path in job["inputs"]])
        answer["finite"] = bool(output.isfinite().all())
        if job.get("logits"):
            save_file({"logits": output.cpu().contiguous()}, job["logits"])
        answer["generation"] = compare_generation(model, inputs) if generates(model, inputs) else {}
    except Exception as error:
        answer["error"] = f"{type(error).__name__}: {error}"
    return answer


def main() -> None:
    """Read the request, do the jobs that need no hf_cka first, write the answers."""
    jobs = json.loads(Path(sys.argv[1]).read_text())
    order = sorted(range(len(jobs)), key=lambda i: jobs[i]["way"] == "package")
    answers: list[Any] = [None] * len(jobs)
    sys.modules["hf_cka"] = None  # type: ignore[assignment]
    for index in order:
        if jobs[index]["way"] == "package" and sys.modules.get("hf_cka", False) is None:
            del sys.modules["hf_cka"]
            import hf_cka  # noqa: F401
        answers[index] = run(jobs[index])
    Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
