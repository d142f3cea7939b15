"""``hf-cka select``: choose the layers to adapt, and write them for ``trl sft`` or for PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_cka.cli import options

if TYPE_CHECKING:
    from hf_cka.selection import LayerSelection


def select_command(
    model: options.Model,
    dataset: options.Dataset,
    output: Annotated[Path, typer.Option("--output", "-o", help="A .yaml for trl sft, or a .json.")] = Path("cka.yaml"),
    keep_ratio: Annotated[float, typer.Option(help="Share of the layers to adapt.")] = 0.5,
    criterion: Annotated[str, typer.Option(help="What scores the layers.")] = "cka",
    pooling: Annotated[str, typer.Option(help="auto, last, cls, mean or tokens.")] = "auto",
    paper: Annotated[bool, typer.Option("--paper", help="Reproduce arXiv 2602.05988.")] = False,
    stack: options.Stack = None,
    target_modules: Annotated[str | None, typer.Option(help="Such as q_proj,v_proj; default: all of a layer.")] = None,
    split: options.Split = "train",
    text_column: options.TextColumn = None,
    num_samples: options.NumSamples = 128,
    max_length: options.MaxLength = 512,
    batch_size: options.BatchSize = 8,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.Json = False,
) -> None:
    """Choose the layers of a model that matter, for LoRA.

    The criteria are cka, block_influence, random, first, last and all.

    Example: hf-cka select --model M --dataset data.jsonl --output cka.yaml
    """
    if output.suffix.lower() not in (".yaml", ".yml", ".json"):
        raise ValueError(f"--output {str(output)!r} must end in .yaml (for trl sft) or .json.")
    from hf_cka.data import is_collection
    from hf_cka.selection import select_layers

    loaded, processor = options.load_model(model, device, dtype)
    batches = options.load_calibration(
        dataset,
        processor,
        loaded,
        split=split,
        num_samples=num_samples,
        max_length=max_length,
        seed=seed,
        batch_size=batch_size,
        text_column=text_column,
    )
    selection = select_layers(
        loaded,
        batches,
        keep_ratio,
        criterion=criterion,
        pooling=pooling,
        paper=paper,
        stack=options.stacks(stack),
        seed=seed,
    )
    targets = target_modules.split(",") if target_modules else None
    selection.module_names(targets)  # a name that matches nothing is said before anything is written
    written = [selection.save(output.with_suffix(".json"))]
    # trl sft trains language models, on text from a file or the Hub
    trains = output.suffix.lower() != ".json" and batches[0].keys() == {"input_ids", "attention_mask"}
    trains = trains and not is_collection(dataset) and loaded.can_generate()
    if trains:
        output.write_text(trl_yaml(selection, model, dataset, split, targets), encoding="utf-8")
        written.insert(0, output)
    if as_json:
        typer.echo(json.dumps(selection.to_dict()))
        return
    typer.echo(selection.table())
    for file in written:
        typer.echo(f"Wrote {file}")
    if trains:
        typer.echo(f"Train with: trl sft --config {output} --output_dir OUT")
    else:
        typer.echo(f"In Python: LoraConfig(**hf_cka.LayerSelection.load({str(written[0])!r}).lora_kwargs())")


def trl_yaml(
    selection: LayerSelection, model: str, dataset: str, split: str = "train", targets: list[str] | None = None
) -> str:
    """Return a config file for the unmodified ``trl sft --config``.

    The modules go in as one regular expression, because TRL's config has no ``layers_to_transform`` and turns a list
    of one into a string, which PEFT reads as a regular expression over full module names.

    Args:
        selection: the layers.
        model: a Hub id or a folder.
        dataset: as :func:`hf_cka.data.load_rows`.
        split: the training split of a Hub dataset.
        targets: projections, as in :meth:`LayerSelection.module_names`.
    """
    import yaml

    from hf_cka.data import file_builder

    builder = file_builder(dataset)
    settings: dict[str, Any] = {"model_name_or_path": model}
    if builder is not None:
        name, _ = builder
        # TRL's datasets entry takes no further options of a builder; a txt file is then read by lines.
        settings["datasets"] = [{"path": name, "data_files": str(Path(dataset).expanduser().resolve())}]
    else:
        name, _, configuration = dataset.partition(":")
        settings |= {"dataset_name": name, "dataset_train_split": split}
        if configuration:
            settings["dataset_config"] = configuration
    settings |= {"use_peft": True, "lora_target_modules": [selection.target_regex(targets)]}
    numbers = ", ".join(map(str, selection.layers))
    return (
        f"# LoRA in {len(selection.layers)} of {selection.num_hidden_layers} layers, chosen by hf_cka "
        f"({selection.criterion}): {numbers}\n"
        "# Use: trl sft --config THIS_FILE --output_dir OUT   (any option of trl sft may be added here or there)\n"
        + yaml.safe_dump(settings, sort_keys=False, width=1000)
    )
