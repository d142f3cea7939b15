"""``hf-cka compare``: a model and others made from it, side by side, as one page."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from hf_cka.cli import options


def compare_command(
    base: Annotated[str, typer.Argument(help="The reference: a Hub id or a folder.")],
    others: Annotated[list[str], typer.Argument(help="Models made from it: Hub ids or folders.")],
    dataset: options.Dataset,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of report.html and report.json.")] = Path(
        "comparison"
    ),
    parts: Annotated[str, typer.Option(help="What to measure, such as quality,speed.")] = "all",
    tasks: Annotated[str | None, typer.Option(help="Further tasks, as of hf-cka evaluate; default: none.")] = None,
    limit: Annotated[int | None, typer.Option(help="Rows of each task; default: all.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of text for perplexity.")] = 4096,
    context: Annotated[int, typer.Option(help="Window of perplexity, in tokens.")] = 512,
    rows: Annotated[int, typer.Option(help="Rows, questions, and texts for robustness.")] = 32,
    rates: Annotated[str, typer.Option(help="Shares of letters or words that are damaged.")] = "0.1",
    top: Annotated[int, typer.Option(help="Samples of largest disagreement to show.")] = 5,
    num_samples: Annotated[int, typer.Option(help="Samples for similarity and disagreement.")] = 64,
    max_length: options.MaxLength = 128,
    split: options.Split = "test",
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.Json = False,
) -> None:
    """Compare models made from one base on the same data, as one page.

    The parts are quality, speed, similarity, disagreement and robustness.

    Example: hf-cka compare BASE pruned recovered --dataset test.jsonl --output comparison
    """
    from hf_cka.data import load_rows, public_name
    from hf_cka.evaluation import write_report
    from hf_cka.evaluation.compare import compare
    from hf_cka.evaluation.comparison import PARTS, ComparisonSettings

    try:
        shares = tuple(float(rate) for rate in rates.split(","))
    except ValueError as error:
        raise ValueError(f"--rates {rates!r} must be numbers separated by commas, such as 0.05,0.2.") from error
    settings = ComparisonSettings(
        parts=PARTS if parts == "all" else tuple(part.strip() for part in parts.split(",")),
        tasks=tuple(task.strip() for task in tasks.split(",")) if tasks else (),
        limit=limit,
        context=context,
        max_tokens=max_tokens,
        rows=rows,
        num_samples=num_samples,
        max_length=max_length,
        rates=shares,
        top=top,
        seed=seed,
    )
    started = time.perf_counter()

    def say(text: str) -> None:
        typer.secho(f"[{time.perf_counter() - started:5.0f} s] {text}", err=True, fg="cyan")

    data = list(load_rows(dataset, split))
    result = compare(
        base, others, data, settings=settings, source=public_name(dataset) or "", device=device, dtype=dtype, say=say
    )
    command = "hf-cka " + " ".join(shlex.quote(public_name(word) or word) for word in sys.argv[1:])
    report = result.report(command=command)
    page = write_report(report, output / "report.html")
    if as_json:
        typer.echo(json.dumps(report.to_dict()["results"]))
        return
    from hf_cka.evaluation.comparison_report import results_table
    from hf_cka.evaluation.report import table_text

    typer.echo(table_text(results_table(result)))
    typer.echo(f"Wrote {page} and {page.with_suffix('.json')}")
