"""Find an entry of a table by name, and name the near ones when it is not there.

Every set of interchangeable things (similarity measures, criteria, pooling rules, stacks of a model) is a
plain dict; this is the one place that turns a wrong name into a helpful error.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")
_SHOWN = 60  # names of a large table that a message lists


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """Return ``table[name]``.

    Args:
        table: the known entries.
        name: the one that is wanted.
        what: what the table holds, in the singular, for the message ("similarity measure").

    Raises:
        ValueError: if the name is unknown; the message lists near names, or what is known.

    Example:
        >>> lookup({"cka": 1, "rsa": 2}, "cka", "measure")
        1
        >>> lookup({"cka": 1, "rsa": 2}, "ckaa", "measure")
        Traceback (most recent call last):
        ValueError: Unknown measure 'ckaa'. Did you mean: 'cka'?
    """
    if name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), table, n=3, cutoff=0.6)
    if near:
        hint = "Did you mean: " + ", ".join(repr(n) for n in near) + "?"
    else:
        names = sorted(table)
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        hint = "Known: " + ", ".join(repr(n) for n in names[:_SHOWN]) + more + "."
    raise ValueError(f"Unknown {what} {name!r}. {hint}")
