"""`hf-cka anatomy`: what a model is made of, and what of it can be removed."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from hf_cka.cli import options


def anatomy_command(
    model: Annotated[str, typer.Argument(help="A Hub id or a folder; only its config is read, not its weights.")],
    stack: Annotated[str | None, typer.Option(help="The stack to look from: its path, or part of it.")] = None,
    as_json: options.Json = False,
) -> None:
    """Show stacks, layers, branches and widths of a model, what can be removed, and why not where not.

    Example: hf-cka anatomy HuggingFaceTB/SmolLM2-135M
    """
    from hf_cka.anatomy import find_anatomy
    from hf_cka.modeling.loading import skeleton

    anatomy = find_anatomy(skeleton(model), stack)
    if as_json:
        found = asdict(anatomy.findings) | {"default": anatomy.layers_path, "model_type": anatomy.model_type}
        typer.echo(json.dumps(found))
    else:
        typer.echo(anatomy.table())
