"""Options that several commands share, and what they load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_cka.data import CalibrationBatches

Model = Annotated[str, typer.Option("--model", "-m", help="A Hub id or a folder.")]
Dataset = Annotated[
    str, typer.Option("--dataset", "-d", help="A Hub id (name:config), or a txt, jsonl, json, csv or parquet file.")
]
Split = Annotated[str, typer.Option(help="Split of a Hub dataset.")]
TextColumn = Annotated[str | None, typer.Option(help="Column with the text, if it is not one of the usual names.")]
NumSamples = Annotated[int, typer.Option(help="Calibration samples.")]
MaxLength = Annotated[int, typer.Option(help="Tokens after which a sample is cut.")]
BatchSize = Annotated[int, typer.Option(help="Samples in one forward pass.")]
Seed = Annotated[int, typer.Option(help="Seed of every draw.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")]
Dtype = Annotated[str, typer.Option(help="auto (the model's own), float32, bfloat16 or float16.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def load_model(name: str, device: str = "auto", dtype: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model with the head its config names, and its tokenizer.

    Raises:
        ValueError: for an unknown dtype.
        OSError: if there is no such model.
    """
    import torch
    import transformers
    from transformers import AutoConfig, AutoTokenizer

    from hf_cka.modeling.probe import auto_class

    known = ("auto", "float32", "bfloat16", "float16")
    if dtype not in known:
        raise ValueError(f"Unknown dtype {dtype!r}: one of {', '.join(known)}.")
    folder = Path(name).expanduser()
    if (folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1) and not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {name!r}; give --model a Hub id or the folder of a saved model.")
    config = AutoConfig.from_pretrained(name)
    architecture = (config.architectures or [""])[0]
    loader = auto_class(architecture)
    if loader is transformers.AutoModel:
        loader = getattr(transformers, architecture, loader)  # a head that has no auto class of its own
    model = loader.from_pretrained(name, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    return model.to(best_device(device)), AutoTokenizer.from_pretrained(name)


def best_device(device: str = "auto") -> torch.device:
    """Return the named device, or for ``"auto"`` an accelerator if there is one."""
    import torch

    if device != "auto":
        return torch.device(device)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def load_calibration(
    dataset: str, tokenizer: PreTrainedTokenizerBase, *, split: str = "train", **kwargs: Any
) -> CalibrationBatches:
    """Load rows and make calibration batches of them; keyword arguments as :func:`hf_cka.calibration`."""
    from hf_cka.data import calibration, load_rows, public_name

    return calibration(load_rows(dataset, split), tokenizer, source=public_name(dataset), **kwargs)
