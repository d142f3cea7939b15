"""The help of every command fits a screen, gives an example, and says what an option is when it is not given."""

from __future__ import annotations

import re

import pytest
import typer.main
from typer.testing import CliRunner

from hf_cka.cli import app

COLUMNS, LINES = 100, 45
COMMANDS = typer.main.get_command(app).commands


def _help(*command: str) -> str:
    done = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": str(COLUMNS), "TERMINAL_WIDTH": str(COLUMNS)})
    assert done.exit_code == 0, done.output
    return done.output


def _rows(command: str) -> list[list[str]]:
    """The lines inside the boxes, as words, without the star of what is required."""
    inside = [line.strip("│ ").removeprefix("*") for line in _help(command).splitlines() if line.startswith("│")]
    return [line.split() for line in inside]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_screen_and_gives_an_example(command: str) -> None:
    text = _help(*filter(None, [command]))
    lines = text.strip().splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS
    assert re.search(rf"Example: hf-cka {command or '[a-z]+'}( |$)", text)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_takes_one_line_and_names_its_default(command: str) -> None:
    """A default that is worked out later is said in words; a flag is off by default."""
    rows = {row[0]: " ".join(row) for row in _rows(command)}
    params = COMMANDS[command].params
    names = {name for param in params for name in (*param.opts, f"{param.name}...")} | {"--help"}
    assert set(rows) <= names  # the second line of a wrapped option would begin with another word
    for option in params:
        if option.param_type_name == "option" and not option.required and not option.is_flag:
            expected = "default" if option.default is None else f"[default: {option.default}]"
            assert expected in rows[option.opts[0]]
