"""`hf-cka verify`: check a checkpoint folder in a fresh process."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hf_cka.cli import options


def verify_command(
    folder: Annotated[Path, typer.Argument(help="A checkpoint folder; any model that transformers loads.")],
    device: Annotated[str, typer.Option(help="cpu, cuda:0, or auto for device_map='auto'.")] = "cpu",
    as_json: options.Json = False,
) -> None:
    """Reload a checkpoint in a fresh process and check its tensors and caches.

    Example: hf-cka verify pruned
    """
    from hf_cka.modeling import verify

    result = verify(folder, device=device)
    typer.echo(json.dumps(asdict(result) | {"passed": result.passed}) if as_json else str(result))
    if not result.passed:
        raise typer.Exit(1)
