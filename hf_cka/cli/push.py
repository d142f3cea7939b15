"""``hf-cka push``: check a pruned checkpoint and push it to the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hf_cka.cli import options


def push_command(
    model: Annotated[Path, typer.Option("--model", "-m", help="The folder that save_pruned wrote.")],
    repo: Annotated[str, typer.Option("--repo", "-r", help="user/name; made if it does not exist.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository; default: the account's setting.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, made if it is not there; default: main.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message; default: what was pruned.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Reload in a fresh process first.")] = True,
    as_json: options.Json = False,
) -> None:
    """Check a pruned checkpoint and push it to the Hub, with a model card.

    No path and no token of this machine goes with it. The Hub's token is that of `hf auth login`, or HF_TOKEN.

    Example: hf-cka push --model pruned --repo user/name --private
    """
    from hf_cka.hub import push_pruned

    if verify and not as_json:
        typer.echo("Reloading the checkpoint in a fresh process ...", err=True)
    commit = push_pruned(
        model,
        repo,
        private=private,
        revision=revision,
        commit_message=message,
        create_pr=create_pr,
        verify=verify,
    )
    if as_json:
        typer.echo(json.dumps({"commit_url": commit.commit_url, "oid": commit.oid, "pr_url": commit.pr_url}))
        return
    typer.echo(f"Pushed {commit.pr_url or commit.commit_url}")
