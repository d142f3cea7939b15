"""The ``hf-cka`` application: its commands, and how errors look."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

import hf_cka
from hf_cka.cli.anatomy import anatomy_command
from hf_cka.cli.card import card_command
from hf_cka.cli.compare import compare_command
from hf_cka.cli.demo import demo_command
from hf_cka.cli.evaluate import evaluate_command
from hf_cka.cli.prune import prune_command
from hf_cka.cli.push import push_command
from hf_cka.cli.recover import recover_command
from hf_cka.cli.select import select_command
from hf_cka.cli.verify import verify_command

app = typer.Typer(
    name="hf-cka",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


_settings = {"debug": False}


def _version(show: bool) -> None:
    if show:
        typer.echo(f"hf-cka {hf_cka.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Adapt and compress Hugging Face models by representation similarity (CKA).

    Example: hf-cka prune --model M --dataset data.jsonl --ratio 0.2
    """
    _settings["debug"] = debug


def _friendly(command: Callable[..., Any]) -> Callable[..., Any]:
    """Show an expected error as one message instead of a traceback, and leave with status 2."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort):  # both are RuntimeErrors
            raise
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            if _settings["debug"]:
                raise
            typer.secho(f"Error: {error}", err=True, fg="red")
            raise typer.Exit(2) from error

    return run


for _name, _command in (
    ("anatomy", anatomy_command),
    ("select", select_command),
    ("prune", prune_command),
    ("recover", recover_command),
    ("verify", verify_command),
    ("compare", compare_command),
    ("evaluate", evaluate_command),
    ("card", card_command),
    ("push", push_command),
    ("demo", demo_command),
):
    app.command(_name)(_friendly(_command))
