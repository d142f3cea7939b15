"""``hf-cka prune``: remove the parts of a model that matter least, and save a checkpoint that loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_cka.cli import options

if TYPE_CHECKING:
    from hf_cka.pruning.config import PruningConfig
    from hf_cka.pruning.history import PruningStep
    from hf_cka.pruning.pruners import PruningResult


def prune_command(
    model: options.Model,
    dataset: options.Dataset,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the pruned checkpoint.")] = Path("pruned"),
    method: Annotated[str, typer.Option(help="depth, width, mop, everything and others.")] = "depth",
    ratio: Annotated[float | None, typer.Option(help="Share of the parameters to remove; default: none.")] = None,
    num_layers: Annotated[
        int | None, typer.Option(help="Layers (sub-layers, steps) instead of it; default: none.")
    ] = None,
    criterion: Annotated[str | None, typer.Option(help="What scores; default: the method's.")] = None,
    path: Annotated[
        str | None, typer.Option(help="Of mop: cosine, kl, perplexity, random, LG..; default: cka.")
    ] = None,
    paper: Annotated[
        str | None, typer.Option(help="Settings of cka, consensus, shortgpt, mop ..; default: none.")
    ] = None,
    structures: Annotated[
        str | None, typer.Option(help="Of depth: layers (default), sublayers, attention or mlp.")
    ] = None,
    widths: Annotated[str | None, typer.Option(help="Of width and mop: both (default), heads, units, experts.")] = None,
    multiple_of: Annotated[
        int | None, typer.Option(help="Round the MLP units that stay to a multiple; default: 1.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Of width: uniform (default), importance or global.")] = None,
    repair: Annotated[str | None, typer.Option(help="least_squares, mean_shift, linear_map; default: none.")] = None,
    steps: Annotated[int | None, typer.Option(help="How often to score; default: after each removal.")] = None,
    protect: Annotated[str | None, typer.Option(help="Layers that stay, such as 0,-1; default: none.")] = None,
    stack: options.Stack = None,
    pooling: Annotated[str | None, typer.Option(help="Readout: mean (default), last, cls or auto.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan and price only; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in --output.")] = False,
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
    """Remove the layers, sub-layers, heads and units that matter least.

    Methods: depth, width, mop, everything, consensus and amp. An interrupted run goes on.

    Example: hf-cka prune --model M --dataset data.jsonl --method mop --ratio 0.3 --output pruned
    """
    from hf_cka.pruning.pruners import prune

    given = {
        "method": method if paper is None or method != "depth" else None,
        "ratio": ratio,
        "num_layers": num_layers,
        "criterion": criterion,
        "path": path,
        "structures": structures,
        "budget": budget,
        "repair": repair,
        "steps": steps,
        "protect": None if protect is None else tuple(int(part) for part in protect.split(",")),
        "stack": options.stacks(stack),
        "pooling": pooling,
        "seed": seed,
    }
    config = config_of(paper, {name: value for name, value in given.items() if value is not None}, widths, multiple_of)
    options.check_output(output, overwrite or dry_run)

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
    # beside the checkpoint, which appears whole or not at all
    progress_folder = output.with_name(output.name + ".progress")
    with live_table(config, as_json) as on_step:
        result = prune(
            loaded,
            batches,
            replace(config, repair=None) if dry_run else config,  # a repair changes weights, and nothing of the plan
            progress=False,
            output=None if dry_run else progress_folder,
            on_step=on_step,
        )
    calibration = {
        "source": batches.source,
        "samples": batches.num_samples,
        "max_length": max_length,
        "seed": seed,
        "hash": result.history.calibration,
    }
    price = result.plan.price(loaded)
    saved = None
    if not dry_run:
        saved = _save(result, model, processor, calibration, output, overwrite)
        shutil.rmtree(progress_folder)
    if as_json:
        typer.echo(json.dumps(_summary(result, price, calibration, saved)))
        return
    typer.echo(f"\n{price}")
    typer.echo(
        f"removed {price.ratio:.2%} of all parameters, {price.non_embedding_ratio:.2%} of those outside embeddings"
    )
    share = result.history.scored_share
    if share is not None:
        typer.echo(f"scoring took {share:.0%} of the layer calls of scoring every candidate at every step")
    typer.echo(f"\n{result.plan.explain(loaded)}" if dry_run else f"\n{saved}")


def config_of(paper: str | None, given: dict[str, Any], widths: str | None, multiple_of: int | None) -> PruningConfig:
    """Return the config of the options that were given.

    Args:
        paper: whose settings to start from, if any.
        given: fields of the config.
        widths: which widths may go.
        multiple_of: what the units are rounded to.

    Raises:
        ValueError: as :class:`PruningConfig`.

    Example:
        >>> config_of("mop", {"ratio": 0.3}, "units", None).width.structures
        'units'
    """
    from hf_cka.lookup import lookup
    from hf_cka.pruning.config import PAPERS, PruningConfig
    from hf_cka.pruning.width_budgets import WidthSettings

    settings = dict(lookup(PAPERS, paper, "paper")) if paper is not None else {}
    settings |= given
    changes = {"structures": widths, "multiple_of": multiple_of}
    changes = {name: value for name, value in changes.items() if value is not None}
    if changes:
        settings["width"] = replace(settings.get("width", WidthSettings()), **changes)
    return PruningConfig(**settings)


@contextmanager
def live_table(config: PruningConfig, quiet: bool = False) -> Iterator[Callable[[PruningStep], None] | None]:
    """Show a table that grows with every step, and how far the run has come.

    Args:
        config: of the run.
        quiet: show nothing.

    Yields:
        What to call with every step.
    """
    if quiet:
        yield None
        return
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    table = Table(title=f"{config.method}, {config.criterion}")
    for name, justify in (("step", "right"), ("branch", "left"), ("removed", "left"), ("score", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name in ("parameters", "of all removed"):
        table.add_column(name, justify="right")
    percent = TextColumn("{task.percentage:>3.0f} %")
    bar = Progress(TextColumn("{task.description}"), BarColumn(), percent, TimeElapsedColumn())
    task = bar.add_task("scoring", total=1.0)

    def on_step(step: PruningStep) -> None:
        score = "" if step.score is None else f"{step.score:.4g}"
        table.add_row(
            str(step.step), step.branch, ", ".join(step.removed), score, f"{step.parameters:,}", f"{step.ratio:.2%}"
        )
        goal = config.ratio
        bar.update(task, completed=step.ratio / goal if goal else step.step / (config.steps or config.num_layers or 1))

    with Live(Group(table, bar), console=Console(), refresh_per_second=4):
        yield on_step
        bar.update(task, completed=1.0, description="done")


def _save(
    result: PruningResult, model: str, processor: Any, calibration: dict[str, Any], output: Path, overwrite: bool
) -> Any:
    from hf_cka.data import public_name
    from hf_cka.modeling import save_pruned

    config = result.history.config
    return save_pruned(
        result.model,
        output,
        tokenizer=processor,
        record={
            "method": config.method,
            "settings": config.to_dict(),
            "calibration": calibration,
            "base_model": public_name(model),
        },
        scores=json.loads(result.history.to_json()),
        overwrite=overwrite,
    )


def _summary(result: PruningResult, price: Any, calibration: dict[str, Any], saved: Any) -> dict[str, Any]:
    return {
        "plan": result.plan.to_dict(),
        "history": json.loads(result.history.to_json()),
        "parameters": [price.before.parameters, price.after.parameters],
        "ratio": price.ratio,
        "non_embedding_ratio": price.non_embedding_ratio,
        "calibration": calibration,
        "output": None if saved is None else str(saved.folder),
    }
