"""Load any model by name: dense or pruned, from a folder or the Hub, with the head its config names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(
    name: str, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Any]:
    """Load a model with the head its config names, and the tokenizer or processor that makes its inputs.

    Args:
        name: a Hub id, or the folder of a saved model.
        device: as :func:`best_device`.
        dtype: "auto" (the model's own), "float32", "bfloat16" or "float16".
        trust_remote_code: run code that the model brings along. Nothing ever asks at a terminal.

    Raises:
        ValueError: for an unknown dtype, or a model with code of its own that is not trusted.
        FileNotFoundError: for a folder that is not there or holds no model.
        OSError: if there is no such model on the Hub.

    Example:
        >>> load_model("./nowhere")
        Traceback (most recent call last):
        FileNotFoundError: There is no folder './nowhere'; give --model a Hub id or the folder of a saved model.
    """
    import torch

    from hf_cka.data import load_processor

    if dtype not in _DTYPES:
        raise ValueError(f"Unknown dtype {dtype!r}: one of {', '.join(_DTYPES)}.")
    loader, _ = _loader(name, trust_remote_code)
    chosen = dtype if dtype == "auto" else getattr(torch, dtype)
    model = loader.from_pretrained(name, dtype=chosen, trust_remote_code=trust_remote_code)
    return model.to(best_device(device)), load_processor(name, trust_remote_code=trust_remote_code)


def skeleton(name: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build a model on the meta device: its class and its shapes, without its weights.

    Args:
        name, trust_remote_code: as for :func:`load_model`.

    Raises:
        ValueError, FileNotFoundError, OSError: as :func:`load_model`.
    """
    import torch

    loader, config = _loader(name, trust_remote_code)
    with torch.device("meta"):
        if hasattr(loader, "from_config"):
            return loader.from_config(config, trust_remote_code=trust_remote_code)
        return loader(config)


def _loader(name: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """What loads a model with the head that its config names, and the config."""
    import transformers

    from hf_cka.modeling.probe import auto_class
    from hf_cka.modeling.register import register

    folder = Path(name).expanduser()
    if (folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1) and not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {name!r}; give --model a Hub id or the folder of a saved model.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        held = ", ".join(sorted(file.name for file in folder.iterdir())[:5]) or "nothing"
        raise FileNotFoundError(f"The folder {name!r} is no model: it has no config.json (it holds {held}).")
    register()
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    architecture = (config.architectures or [""])[0]
    loader = auto_class(architecture)
    if loader is transformers.AutoModel:
        loader = getattr(transformers, architecture, loader)  # a head that has no auto class of its own
    return loader, config


def best_device(device: str = "auto") -> torch.device:
    """Return the named device, or for ``"auto"`` an accelerator if there is one.

    Args:
        device: "auto", or a device as torch names it ("cpu", "cuda:1", "mps").

    Example:
        >>> best_device("cpu")
        device(type='cpu')
    """
    import torch

    if device != "auto":
        return torch.device(device)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a checkpoint.

    Args:
        folder: the checkpoint.

    Example:
        >>> weight_files(Path("nowhere"))
        []
    """
    return sorted(file for pattern in ("model*.safetensors", "pytorch_model*.bin") for file in folder.glob(pattern))
