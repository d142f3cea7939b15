"""``hf-cka card``: write or update the model card of a pruned checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hf_cka.cli import options


def card_command(
    model: Annotated[Path, typer.Option("--model", "-m", help="The folder that save_pruned wrote.")],
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the base model; default: what the checkpoint's record names.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="Licence, such as apache-2.0; default: what the base's own card says.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help='JSON file with measured rows: [{"model": "dense", "perplexity": 19.5}].')
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="The report.json of hf-cka compare, instead of --results.")
    ] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Hub id of data that was used; may be repeated.")] = None,
    limit: Annotated[list[str] | None, typer.Option(help="A sentence on a limit; may be repeated.")] = None,
    repo: Annotated[str | None, typer.Option(help="Repository it is for (user/name), named in the examples.")] = None,
    as_json: options.Json = False,
) -> None:
    """Write the model card of a pruned checkpoint, or update the one that is there.

    Example: hf-cka card --model pruned --license apache-2.0 --report comparison/report.json
    """
    from hf_cka.hub import model_card

    if report is not None and results is not None:
        raise ValueError("Both --report and --results were given; the card has one table, so give one of them.")
    card = model_card(
        model,
        base_model=base_model,
        license=license,
        results=report or results,
        datasets=dataset,
        limits=limit,
        repo_id=repo,
    )
    target = model / "README.md"
    card.save(target)
    data = card.data.to_dict()
    if as_json:
        typer.echo(json.dumps({"file": str(target), "metadata": data}))
        return
    for name in ("base_model", "license"):
        if name not in data:
            flag = "--" + name.replace("_", "-")
            typer.echo(f"The card names no {name.replace('_', ' ')}: it could not be found. Give it with {flag}.")
    typer.echo(f"Wrote {target}")
