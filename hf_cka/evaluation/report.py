"""Write what was measured as one self-contained HTML page, and as JSON beside it.

The page asks for nothing from outside, has no script, follows light and dark, and reads on a phone. What its parts
are is in ``blocks``, how charts are drawn in ``plots``, how the page looks in ``report.html``.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import hf_cka
from hf_cka.evaluation import blocks, lines, plots
from hf_cka.evaluation.blocks import Block, Cell, Curves, Frontier, Heatmap, LayerScores, LayerStack, Table

_CHARTS: dict[type, Callable[[Any, str], str]] = {
    LayerScores: plots.layer_scores_svg,
    Heatmap: plots.heatmap_svg,
    LayerStack: plots.layer_stack_svg,
    Frontier: lines.frontier_svg,
    Curves: lines.curves_svg,
}
_LIBRARIES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "numpy")


@dataclass(frozen=True)
class Highlight:
    """A number shown large at the top: what it is, the value as text, and a few words below."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A headed part of the report: some text, then its blocks in order."""

    title: str
    blocks: tuple[Block, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class ReportData:
    """Everything a report says; plain data that goes through JSON unchanged.

    Args:
        title: of the page.
        summary: one paragraph under it.
        sections: in order.
        highlights: numbers shown large at the top.
        settings: what decided the results (model, data, seeds, machine).
        versions: of the libraries; ``library_versions()`` gives them.
        command: that made this.
        created: date and time, as text.
        results: what was measured, one mapping of column to value a model, for other programs (model cards).
        notes: what the results were measured on, in a sentence.
        version: of this format.

    Example:
        >>> data = ReportData("Demo", "What was done.", (Section("Scores", (blocks.LayerScores("s", (0.1,), (0,)),)),))
        >>> ReportData.from_dict(json.loads(json.dumps(data.to_dict()))) == data
        True
    """

    title: str
    summary: str
    sections: tuple[Section, ...]
    highlights: tuple[Highlight, ...] = ()
    settings: Mapping[str, Cell] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    created: str = ""
    results: tuple[Mapping[str, Cell], ...] = ()
    notes: str = ""
    version: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; numbers that JSON does not know become ``"Infinity"``, ``"-Infinity"``, ``"NaN"``."""
        plain = {
            "version": self.version,
            "title": self.title,
            "summary": self.summary,
            "highlights": [vars(highlight) for highlight in self.highlights],
            "sections": [
                {"title": s.title, "text": s.text, "blocks": [blocks.to_dict(block) for block in s.blocks]}
                for s in self.sections
            ],
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "command": self.command,
            "created": self.created,
            "results": [dict(row) for row in self.results],
            "notes": self.notes,
        }
        return _finite(plain)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ReportData:
        """Read what ``to_dict`` wrote.

        Raises:
            ValueError: if it was written by a newer hf_cka, or holds an unknown kind of block.
        """
        if data["version"] > cls.version:
            raise ValueError(
                f"This report has format version {data['version']}; hf_cka {hf_cka.__version__} reads up to "
                f"{cls.version}. Upgrade hf_cka."
            )
        sections = tuple(
            Section(s["title"], tuple(blocks.from_dict(block) for block in s["blocks"]), s["text"])
            for s in data["sections"]
        )
        highlights = tuple(Highlight(**highlight) for highlight in data["highlights"])
        results = tuple(blocks.numbers(row) for row in data.get("results", ()))
        return cls(**{**data, "sections": sections, "highlights": highlights, "results": results})


def library_versions() -> dict[str, str]:
    """Return the versions of Python, hf_cka and the libraries around it that are installed.

    Example:
        >>> "torch" in library_versions()
        True
    """
    found = {"python": platform.python_version(), "hf_cka": hf_cka.__version__}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_report(data: ReportData, path: str | os.PathLike[str]) -> Path:
    """Write the report as HTML, and its data as JSON under the same name ending in ``.json``.

    Args:
        data: what to say.
        path: of the HTML file; missing folders are made, an old report is replaced.

    Returns:
        The path of the HTML file.

    Raises:
        ValueError: if the path does not end in ``.html``.
        ImportError: if jinja2 is not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = write_report(ReportData("Demo", "Nothing was done.", ()), f"{folder}/report.html")
        ...     sorted(file.name for file in page.parent.iterdir())
        ['report.html', 'report.json']
    """
    target = Path(path)
    if target.suffix != ".html":
        raise ValueError(f"The report's path must end in .html, but it is {str(target)!r}.")
    page = render(data)
    text = json.dumps(data.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    target.write_text(page, encoding="utf-8")
    return target


def render(data: ReportData) -> str:
    """Return the report as one HTML page.

    Raises:
        ImportError: if jinja2 is not installed.

    Example:
        >>> "<h1>Demo</h1>" in render(ReportData("Demo", "Nothing was done.", ()))
        True
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError('Writing a report needs jinja2: pip install "hf_cka[report]"') from error
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["cell"] = format_cell
    environment.filters["right"] = numeric_columns
    source = resources.files("hf_cka.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        report=data,
        kind=blocks.kind_of,
        text_blocks=blocks.TEXT_BLOCKS,
        chart=_chart,
        hf_cka_version=hf_cka.__version__,
    )


def format_cell(cell: Cell) -> str:
    """Return a table cell as text: four significant digits, thousands apart by a thin space, None as a dash.

    Example:
        >>> format_cell(19.5019), format_cell(True), format_cell(None), format_cell(1.7e6)
        ('19.50', 'yes', '–', '1.700e+06')
        >>> format_cell(54403.2) == "54\u2009400"
        True
        >>> format_cell(134515008) == "134\u2009515\u2009008"
        True
    """
    if cell is None:
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}".replace(",", "\u2009")
    if isinstance(cell, float):
        if not math.isfinite(cell):
            return {math.inf: "∞", -math.inf: "−∞"}.get(cell, "not a number")
        if 1e4 <= abs(cell) < 1e6:
            return f"{float(f'{cell:.4g}'):,.0f}".replace(",", "\u2009")
        return f"{cell:#.4g}".removesuffix(".")
    return cell


def table_text(table: Table) -> str:
    """Return a table for the terminal.

    Example:
        >>> print(table_text(Table("t", ("model", "loss"), (("dense", 0.5), ("pruned", None)))))
        model     loss
        dense   0.5000
        pruned       –
    """
    cells = [list(table.columns), *([format_cell(cell) for cell in row] for row in table.rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(table.columns))]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    )


def numeric_columns(table: Table) -> tuple[bool, ...]:
    """Return for each column whether it holds numbers, or text that begins like one, and so goes to the right.

    Example:
        >>> numeric_columns(Table("t", ("model", "loss", "match"), (("a", 1.0, "5 % ± 1"), ("b", None, "–"))))
        (False, True, True)
    """

    def like_number(cell: Cell) -> bool:
        if isinstance(cell, bool):
            return False
        text = "" if cell is None else str(cell).lstrip("+-−–±≈~<> ")
        return not text or isinstance(cell, float) or text[0].isdigit()

    columns = zip(*table.rows, strict=True) if table.rows else ((),) * len(table.columns)
    return tuple(bool(index) and all(map(like_number, cells)) for index, cells in enumerate(columns))


def _chart(block: Block, name: str) -> Any:
    import markupsafe  # comes with jinja2

    if type(block) not in _CHARTS:
        raise TypeError(f"{type(block).__name__} has no chart")
    return markupsafe.Markup(_CHARTS[type(block)](block, name))


def _finite(value: Any) -> Any:
    """Replace what JSON cannot say by its name."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
