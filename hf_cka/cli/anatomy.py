"""`hf-cka anatomy`: what a model is made of, and what of it can be removed."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from hf_cka.cli import options


def anatomy_command(
    model: Annotated[str, typer.Argument(help="A Hub id or a folder; only its config is read.")],
    stack: options.Stack = None,
    as_json: options.Json = False,
) -> None:
    """Show stacks, layers, branches and widths of a model, what can be removed, and why not where not.

    In brackets: who can load a checkpoint without that part (or, for widths, with one member less in every layer):
    [stock] transformers alone, [relabel] transformers alone as another family, [hf_cka] this package or the file that
    travels with the checkpoint.

    Example: hf-cka anatomy HuggingFaceTB/SmolLM2-135M
    """
    from hf_cka.anatomy import find_anatomy
    from hf_cka.modeling.loading import skeleton
    from hf_cka.modeling.rungs import rungs_of

    anatomy = find_anatomy(skeleton(model), stack)
    rungs = rungs_of(anatomy)
    if as_json:
        about = {"default": anatomy.layers_path, "model_type": anatomy.model_type, "rungs": rungs}
        typer.echo(json.dumps(asdict(anatomy.findings) | about))
    else:
        typer.echo(anatomy.table(rungs))
