"""Load a model by name together with what makes its inputs: a tokenizer, or a processor of pictures or sound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_cka.data import Parts, load_processor, parts_of
from hf_cka.modeling.loading import best_device, load_model
from hf_cka.modeling.probe import auto_class


def load_with_processor(name: str, device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """Load a model with the head its config names, and the tokenizer or processor that its folder holds.

    Args:
        name: a Hub id, or the folder of a saved model.
        device: as :func:`hf_cka.modeling.loading.best_device`.
        dtype: "auto" (the model's own), "float32", "bfloat16" or "float16".

    Raises:
        ValueError: for an unknown dtype, or a model without a processor, where none can be made.
        FileNotFoundError: for a folder that is not there or holds no model.
        OSError: if there is no such model on the Hub.

    Example:
        >>> load_with_processor("./nowhere")
        Traceback (most recent call last):
        FileNotFoundError: There is no folder './nowhere'; give --model a Hub id or the folder of a saved model.
    """
    import torch
    import transformers

    folder = Path(name).expanduser()
    local = folder.is_dir() or folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if local and not (folder / "config.json").is_file():
        return load_model(name, device, dtype)  # says what is missing
    processor = load_processor(name)
    if dtype not in ("auto", "float32", "bfloat16", "float16") or parts_of(processor) == Parts(tokenizer=processor):
        return load_model(name, device, dtype)[0], processor
    config = transformers.AutoConfig.from_pretrained(name)
    architecture = (config.architectures or [""])[0]
    loader = auto_class(architecture)
    if loader is transformers.AutoModel:
        loader = getattr(transformers, architecture, loader)  # a head that has no auto class among those of text
    model = loader.from_pretrained(name, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    return model.to(best_device(device)), processor
