"""How much memory is taken: by a block in this process, and by a model in a process of its own."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from hf_cka.modeling.fresh_process import run_fresh


@dataclass
class MemoryPeak:
    """Memory of this process during a block; filled in while it runs.

    Args:
        start_bytes: resident memory when the block began.
        peak_bytes: the highest resident memory seen in it.
        cuda_bytes: the highest memory allocated by torch on the current CUDA device in it; None without CUDA.
    """

    start_bytes: int
    peak_bytes: int
    cuda_bytes: int | None = None

    @property
    def added_bytes(self) -> int:
        """Peak above the start."""
        return self.peak_bytes - self.start_bytes


@dataclass(frozen=True)
class ModelMemory:
    """Memory of a fresh process that loaded a model and generated.

    Args:
        imported_bytes: resident before loading: Python and its libraries.
        loaded_bytes: resident after loading; weights that no pass has read yet may still be on disk.
        peak_bytes: the highest resident memory of the whole process.
        cuda_bytes: the highest memory allocated by torch on the CUDA device; None where the model is on none.
        prompt_tokens: a row.
        new_tokens: generated a row.
        batch_size: rows.
    """

    imported_bytes: int
    loaded_bytes: int
    peak_bytes: int
    cuda_bytes: int | None
    prompt_tokens: int
    new_tokens: int
    batch_size: int


def model_memory(
    model: str,
    *,
    prompt_tokens: int = 12,
    new_tokens: int = 24,
    batch_size: int = 1,
    device: str = "auto",
    dtype: str = "auto",
) -> ModelMemory:
    """Measure the peak memory of loading a model and generating with it, in a fresh Python process.

    Nothing that ran before can hide the peak, so the numbers of two models compare. Starting costs some seconds.

    Args:
        model: a folder or a Hub id of a causal language model.
        prompt_tokens: random ids, a row.
        new_tokens: decoded greedily after them, at least 2.
        batch_size: rows.
        device: as :func:`hf_cka.modeling.loading.best_device`.
        dtype: "auto" (the model's own), "float32", "bfloat16" or "float16".

    Raises:
        RuntimeError: if the process fails or is killed; the message says why.

    Example:
        >>> memory = model_memory("pruned", batch_size=8)  # doctest: +SKIP
        >>> memory.imported_bytes < memory.loaded_bytes < memory.peak_bytes  # doctest: +SKIP
        True
    """
    decoding = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch_size": batch_size}
    job = json.dumps({"model": model, "device": device, "dtype": dtype, "decoding": decoding})
    what = f"measures the memory of {model!r}"
    printed = run_fresh(["-c", "from hf_cka.evaluation.memory import main; main()", job], what).splitlines()
    answer = json.loads(printed[-1])  # a model's own code may print before
    if "error" in answer:
        raise RuntimeError(f"The process that {what} failed: {answer['error']}")
    return ModelMemory(**answer)


@contextmanager
def peak_memory(interval: float = 0.01) -> Iterator[MemoryPeak]:
    """Measure the highest memory of this process inside the block.

    Resident memory is sampled by a thread every ``interval`` seconds (and at both ends), so a spike shorter than
    that can be missed. It counts the whole process: memory that an allocator keeps from before is in
    ``start_bytes``, so compare peaks of fresh processes, or ``added_bytes`` with care.

    Args:
        interval: seconds between two samples.

    Raises:
        ValueError: if the interval is not positive.

    Example:
        >>> with peak_memory() as memory:
        ...     block = bytearray(50_000_000)
        >>> memory.peak_bytes >= memory.start_bytes > 0
        True
    """
    if interval <= 0:
        raise ValueError(f"interval={interval} must be positive.")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = resident_bytes()
    peak = MemoryPeak(start, start)
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(interval):
            peak.peak_bytes = max(peak.peak_bytes, resident_bytes())

    thread = threading.Thread(target=sample, name="peak_memory", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
        peak.peak_bytes = max(peak.peak_bytes, resident_bytes())
        if cuda:
            peak.cuda_bytes = torch.cuda.max_memory_allocated()


def resident_bytes() -> int:
    """Return the resident memory of this process.

    Raises:
        ImportError: on systems without /proc, if ``psutil`` is not installed.

    Example:
        >>> resident_bytes() > 1_000_000
        True
    """
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        try:
            import psutil
        except ImportError as error:
            raise ImportError("Measuring memory on this system needs psutil: pip install psutil") from error
        return int(psutil.Process().memory_info().rss)


def main() -> None:
    """Do the job in the last argument and print what was measured, or the error, as one line of JSON."""
    job = json.loads(sys.argv[-1])
    try:
        answer = asdict(_load_and_generate(**job))
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer))


def _load_and_generate(model: str, device: str, dtype: str, decoding: dict[str, int]) -> ModelMemory:
    # these import nearly all that loading needs, so that it is not counted as the model's
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel  # noqa: F401

    from hf_cka.evaluation.efficiency import decode_speed
    from hf_cka.modeling.loading import load_model

    imported = resident_bytes()
    loaded, _ = load_model(model, device, dtype)
    after_loading = resident_bytes()
    decode_speed(loaded, repeats=1, warmup=0, progress=False, **decoding)
    cuda = torch.cuda.max_memory_allocated(loaded.device) if loaded.device.type == "cuda" else None
    return ModelMemory(imported, after_loading, _peak_of_process(), cuda, **decoding)


def _peak_of_process() -> int:
    """Return the highest resident memory of this process since it began."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    # Second choice: on Linux it holds the memory of the process that started this one, which exec passes on.
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
