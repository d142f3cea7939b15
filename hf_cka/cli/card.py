"""``hf-cka card``: write or update the model card of a pruned checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hf_cka.cli import options


def card_command(
    model: Annotated[Path, typer.Option("--model", "-m", help="The folder that save_pruned wrote.")],
    base_model: Annotated[str | None, typer.Option(help="Hub id of the base model; default: of the record.")] = None,
    license: Annotated[str | None, typer.Option(help="Such as apache-2.0; default: that of the base's card.")] = None,
    results: Annotated[
        Path | None, typer.Option(help="JSON file with measured rows, one a model; default: none.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="The report.json of hf-cka compare; default: none.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Hub id of data, repeatable; default: none.")] = None,
    limit: Annotated[list[str] | None, typer.Option(help="A sentence on a limit, repeatable; default: none.")] = None,
    repo: Annotated[str | None, typer.Option(help="user/name in its examples; default: USER/NAME.")] = None,
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
