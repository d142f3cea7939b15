"""Run Python anew, so that nothing of this process can be seen or counted there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_SHOWN = 5  # lines of an error


def run_fresh(arguments: Sequence[str], what: str, environment: Mapping[str, str] | None = None) -> str:
    """Run a fresh Python in which this package can be imported, and return what it printed.

    Args:
        arguments: of ``python``.
        what: the process does, for the message: "reloads the checkpoint".
        environment: variables that are set for it beside those of this process.

    Raises:
        RuntimeError: if it ends with an error or is killed; the message holds the last lines of its error output.

    Example:
        >>> run_fresh(["-c", "print(1 + 1)"], "adds").strip()
        '2'
        >>> run_fresh(["-c", "raise SystemExit('no')"], "adds")
        Traceback (most recent call last):
        RuntimeError: the process that adds ended with 1: no
    """
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-P", *arguments],  # -P: no module is taken from the folder it happens to run in
        env={**os.environ, **(environment or {}), "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,  # a child never asks at the terminal
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-_SHOWN:])
        reason = "was killed, likely for want of memory" if done.returncode < 0 else f"ended with {done.returncode}"
        raise RuntimeError(f"the process that {what} {reason}: {last}")
    return done.stdout
