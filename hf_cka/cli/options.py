"""Options that several commands share, and what they load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_cka.data import CalibrationBatches

_SHARED = "Data and machine"  # a box of its own in the help of every command

Model = Annotated[str, typer.Option("--model", "-m", help="A Hub id or a folder.")]
Dataset = Annotated[str, typer.Option("--dataset", "-d", help="A Hub id, a file, a folder or zip of media.")]
Split = Annotated[str, typer.Option(help="Split of a Hub dataset, which is ID or ID:CONFIG.", rich_help_panel=_SHARED)]
TextColumn = Annotated[
    str | None, typer.Option(help="Column with the text; default: one of the usual names.", rich_help_panel=_SHARED)
]
NumSamples = Annotated[int, typer.Option(help="Calibration samples.", rich_help_panel=_SHARED)]
MaxLength = Annotated[int, typer.Option(help="Tokens after which a sample is cut.", rich_help_panel=_SHARED)]
BatchSize = Annotated[int, typer.Option(help="Samples in one forward pass.", rich_help_panel=_SHARED)]
Stack = Annotated[str | None, typer.Option(help="Stack by name, or all; default: see hf-cka anatomy.")]
Seed = Annotated[int, typer.Option(help="Seed of every draw.", rich_help_panel=_SHARED)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...", rich_help_panel=_SHARED)]
Dtype = Annotated[str, typer.Option(help="auto (the model's), float32, bfloat16 or float16.", rich_help_panel=_SHARED)]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something, before anything long begins.

    Raises:
        FileExistsError: naming the folder.
    """
    if not overwrite and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty. Give another --output, or --overwrite to replace it.")


def load_calibration(
    dataset: str, processor: Any, model: PreTrainedModel, *, split: str = "train", **kwargs: Any
) -> CalibrationBatches:
    """Load rows and make calibration batches for a model; keyword arguments as :func:`hf_cka.calibration`."""
    from hf_cka.data import calibration, decoder_start, load_rows, public_name

    classifies = "Classification" in type(model).__name__
    labels = {str(name): int(index) for name, index in (model.config.label2id or {}).items()} if classifies else None
    return calibration(
        load_rows(dataset, split),
        processor,
        source=public_name(dataset),
        decoder_start_token_id=decoder_start(model.config),
        label2id=labels,
        **kwargs,
    )


def load_model(name: str, device: str = "auto", dtype: str = "auto") -> tuple[PreTrainedModel, Any]:
    """Load a model and its tokenizer or processor, as :func:`hf_cka.modeling.loading.load_model`."""
    from hf_cka.modeling.loading import load_model as load

    return load(name, device, dtype)


def stacks(given: str | None) -> str | tuple[str, ...] | None:
    """Return what `--stack` names.

    Example:
        >>> stacks("encoder,decoder"), stacks("all"), stacks(None)
        (('encoder', 'decoder'), 'all', None)
    """
    names = tuple(part.strip() for part in (given or "").split(",") if part.strip())
    return names if len(names) > 1 else names[0] if names else None
