"""The tables and the picture of a model card, as Markdown that renders anywhere.

The picture is text in a code block. The Hub does not show SVG files reliably (lfai/model_openness_tool issue 159), and
a PNG would be a second, binary file to keep in step with the card; text also renders on GitHub and in a terminal, and
is read by screen readers and by `git diff`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_cka.hub.facts import Facts
from hf_cka.modeling.plan import PruningPlan, as_ranges
from hf_cka.pruning.history import PruningHistory

_PER_ROW = 60  # layers in one row of the picture
_LEVELS = "▁▂▃▄▅▆▇"
_MAX_SCORES = 200
_BRANCHES = {"attention": "attention sub-layers", "mlp": "MLP sub-layers"}
_WIDTHS = {"heads": "KV groups", "units": "MLP units"}


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table; numbers are shown with four significant digits.

    Args:
        columns: headings.
        rows: cells; None is an empty one.

    Example:
        >>> print(markdown_table(["a", "b"], [[1.23456, "x|y"]]))
        | a | b |
        |---|---|
        | 1.235 | x\\|y |
    """
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        ("|" + "|".join(map(str, line)) + "|") if number == 1 else "| " + " | ".join(map(_cell, line)) + " |"
        for number, line in enumerate(lines)
    )


def removed_table(facts: Facts) -> str:
    """Return what was removed, by index in the original model.

    Args:
        facts: of the checkpoint.
    """
    rows = [row for plan in facts.plan.by_stack for row in _removed_rows(plan, facts)]
    return markdown_table(["removed", "how many", "original index"], rows) if rows else "Nothing."


def _removed_rows(plan: PruningPlan, facts: Facts) -> list[tuple[str, str, str]]:
    """The rows of one stack; it is named where others were pruned too."""
    of = f" of {plan.stack}" if facts.plan.others else ""
    known = {"heads": facts.kv_groups, "units": facts.units} if plan.stack == facts.plan.stack else {}
    removed = {"whole layers": plan.removed_layers}
    removed |= {_BRANCHES.get(name, f"{name} sub-layers"): gone for name, gone in plan.removed_branches.items()}
    rows = [
        (what + of, f"{len(indices)} of {plan.num_layers}", as_ranges(indices).replace(",", ", "))
        for what, indices in removed.items()
        if indices
    ]
    for name, table in plan.kept.items():
        widths = known.get(name, ())
        before, after = (sum(widths[i][n] for i in table) if widths else 0 for n in (0, 1))
        layers = as_ranges(list(table)).replace(",", ", ")
        count = f"{before - after:,} of {before:,}" if before else f"all but {sum(map(len, table.values())):,}"
        rows.append((_WIDTHS.get(name, name) + of, count, f"in layers {layers}"))
    return rows


def width_table(facts: Facts) -> str:
    """Return the widths before and after of the layers that became narrower, or "".

    Args:
        facts: of the checkpoint.
    """
    narrowed = sorted({*facts.plan.kept_groups, *facts.plan.kept_units})
    alike: dict[tuple[str, str], list[int]] = {}
    for index in narrowed:
        alike.setdefault((_change(*facts.kv_groups[index]), _change(*facts.units[index])), []).append(index)
    rows = [(as_ranges(layers).replace(",", ", "), *change) for change, layers in alike.items()]
    return markdown_table(["layers (original index)", "KV groups", "MLP units"], rows) if rows else ""


def layer_stack(facts: Facts) -> str:
    """Return a picture of the layers, the first one on the left: one row for attention, one for the MLP.

    Args:
        facts: of the checkpoint.
    """
    count = facts.plan.num_layers
    attention, mlp = (
        "".join("·" if i in {*facts.plan.removed_layers, *gone} else _mark(*width) for i, width in enumerate(widths))
        for widths, gone in ((facts.kv_groups, facts.plan.removed_attention), (facts.units, facts.plan.removed_mlp))
    )
    step = 10 if count > 20 else 5
    blocks = []
    for start in range(0, count, _PER_ROW):
        end = min(start + _PER_ROW, count)
        ruler = ""
        for index in range(start, end):
            if index % step == 0:
                ruler = ruler.ljust(index - start) + str(index)
        blocks.append(f"layer      {ruler}\nattention  {attention[start:end]}\nMLP        {mlp[start:end]}")
    legend = "█ kept   · removed"
    if any(before == 0 for before, _ in (*facts.kv_groups, *facts.units)):
        legend += "   blank: has none that are counted"
    if facts.plan.kept_groups or facts.plan.kept_units:
        legend += "   ▁ to ▇ narrowed, by the share of its width that is left"
    return "\n\n".join([*blocks, legend])


def score_table(facts: Facts) -> tuple[str, str]:
    """Return what the scores file tells, as (title, table): the steps of a run, or one score for each structure.

    Args:
        facts: of the checkpoint.

    Returns:
        Two empty strings where there is no such file, or it holds something else or too much for a card.
    """
    scores = facts.scores
    if not isinstance(scores, Mapping) or not scores:
        return "", ""
    if isinstance(scores.get("steps"), list):
        try:
            history = PruningHistory.from_json(json.dumps(scores))
        except (KeyError, TypeError, ValueError):
            return "", ""  # of another version; the file is there for those who want it
        few = 0 < len(history.steps) <= _MAX_SCORES
        return ("The steps, and the score of what went", history.table()) if few else ("", "")
    plain = all(isinstance(value, int | float) and not isinstance(value, bool) for value in scores.values())
    if not plain or len(scores) > _MAX_SCORES:
        return "", ""
    rows = sorted(scores.items(), key=lambda item: item[1])
    return "Scores of the structures, least important first", markdown_table(["structure", "score"], rows)


def results_table(results: Any) -> tuple[str, str | None, str | None]:
    """Return measured results as (table, command that measured them, notes).

    Args:
        results: a list of rows (mappings of column to value), a mapping with such a list under "rows" and optionally
            a "command" and "notes"; the data of a report (`hf-cka compare` writes one); or the path of a JSON file
            with any of these.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else.

    Example:
        >>> table, command, _ = results_table({"rows": [{"model": "dense", "perplexity": 19.5}], "command": "run me"})
        >>> print(table.splitlines()[0], "by", command)
        | model | perplexity | by run me
    """
    where = "results"
    if isinstance(results, str | os.PathLike):
        path, where = Path(results), repr(str(results))
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {where}. Give the JSON file with the measured results.")
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error}.") from error
    whole = results if isinstance(results, Mapping) else {"rows": results}
    if "sections" in whole:  # a report, which holds its numbers once more as rows
        if not whole.get("results"):
            raise ValueError(f"{where} is a report without results. Give the report.json of `hf-cka compare`.")
        from hf_cka.evaluation.comparison_report import shown_cell

        shown = [{name: shown_cell(name, value) for name, value in row.items()} for row in whole["results"]]
        named = {"rows": shown, "command": whole.get("command"), "notes": whole.get("notes")}
        whole = {name: value for name, value in named.items() if value}
    unknown = sorted(set(whole) - {"rows", "command", "notes"})
    rows = whole.get("rows")
    if unknown or not isinstance(rows, list) or not rows or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(
            f'{where} must be a list of rows such as [{{"model": "dense", "perplexity": 19.5}}], or have such a '
            f'list under "rows" beside "command" and "notes"; got {json.dumps(results, default=str)[:120]}.'
        )
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return (
        markdown_table(columns, [[row.get(c) for c in columns] for row in rows]),
        whole.get("command"),
        whole.get("notes"),
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if not math.isfinite(value) or abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _change(before: int, after: int) -> str:
    if before == 0:
        return ""
    if after == 0:
        return "removed"
    return f"{before:,} → {after:,}" if after < before else f"{before:,}"


def _mark(before: int, after: int) -> str:
    if before == 0:
        return " "
    if after == 0:
        return "·"
    if after == before:
        return "█"
    return _LEVELS[min(max(round(8 * after / before), 1), 7) - 1]
