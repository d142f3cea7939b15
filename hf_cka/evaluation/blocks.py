"""The parts a report is made of, as plain frozen data with a JSON round trip. How they are drawn is in ``plots``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from hf_cka.lookup import lookup

Cell = str | int | float | bool | None

# how numbers that JSON does not know are written in it
NOT_IN_JSON = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


@dataclass(frozen=True)
class LayerScores:
    """One score a layer, with its standard error, and which layers were chosen from them.

    Args:
        title: of the chart.
        scores: one a layer; None where it is undefined.
        errors: standard errors, one a layer; None where there is none; empty if there are none at all.
        selected: the chosen layers.
        status: one a layer, ``"ok"`` or what is wrong; empty if all are ok.
        controls: other choices drawn below, by name ("random": (1, 4, ...)).
        label: of the score axis.
        note: a sentence below the chart.

    Raises:
        ValueError: if lengths differ or a layer does not exist.

    Example:
        >>> LayerScores("Scores", scores=(0.3, 0.1), selected=(0,)).num_layers
        2
    """

    title: str
    scores: tuple[float | None, ...]
    selected: tuple[int, ...]
    errors: tuple[float | None, ...] = ()
    status: tuple[str, ...] = ()
    controls: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    label: str = "1 - CKA(input, output)"
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("errors", "status"):
            given = getattr(self, name)
            if given and len(given) != len(self.scores):
                raise ValueError(f"{name} has {len(given)} entries, but there are {len(self.scores)} scores.")
        for name, layers in {"selected": self.selected, **self.controls}.items():
            _check_layers(name, layers, len(self.scores))

    @property
    def num_layers(self) -> int:
        """How many layers were scored."""
        return len(self.scores)

    @property
    def doubtful(self) -> tuple[int, ...]:
        """Layers that have a score in spite of something being wrong."""
        return tuple(i for i, what in enumerate(self.status) if what != "ok" and self.scores[i] is not None)


@dataclass(frozen=True)
class Heatmap:
    """A matrix of similarities, rows from top to bottom.

    Args:
        title: of the chart.
        values: rows of equal length; None where a value is undefined.
        rows: what a row is ("dense layer").
        columns: what a column is.
        label: of the colour scale.
        note: a sentence below the chart.
        row_labels: one a row, where counting from 0 would mislead (layers by original index); empty to count.
        column_labels: one a column, likewise.

    Raises:
        ValueError: if it is empty, its rows differ in length, or there are not as many labels as rows or columns.

    Example:
        >>> Heatmap("CKA", ((1.0, 0.4), (0.4, 1.0))).rows
        'layer'
    """

    title: str
    values: tuple[tuple[float | None, ...], ...]
    rows: str = "layer"
    columns: str = "layer"
    label: str = "CKA"
    note: str = ""
    row_labels: tuple[str, ...] = ()
    column_labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        widths = {len(row) for row in self.values}
        if len(widths) != 1 or 0 in widths:
            raise ValueError(f"A heatmap needs rows of one length of at least 1, but their lengths are {widths or 0}.")
        for name, labels, count in (
            ("row_labels", self.row_labels, len(self.values)),
            ("column_labels", self.column_labels, len(self.values[0])),
        ):
            if labels and len(labels) != count:
                raise ValueError(f"{name} has {len(labels)} entries for {count}; give one each, or none.")


@dataclass(frozen=True)
class Strip:
    """The layers of one model, and what was removed from them.

    Args:
        name: of the model.
        num_layers: before anything was removed.
        removed: whole layers, by original index.
        removed_attention: layers without their attention.
        removed_mlp: layers without their MLP.
        attention_share: width of each layer's attention that is left, 0 to 1; empty if no width changed.
        mlp_share: of each layer's MLP, likewise.

    Raises:
        ValueError: if a layer does not exist, or a share is missing or outside [0, 1].

    Example:
        >>> Strip("pruned", 4, removed=(2,)).kept
        3
    """

    name: str
    num_layers: int
    removed: tuple[int, ...] = ()
    removed_attention: tuple[int, ...] = ()
    removed_mlp: tuple[int, ...] = ()
    attention_share: tuple[float, ...] = ()
    mlp_share: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("removed", "removed_attention", "removed_mlp"):
            _check_layers(name, getattr(self, name), self.num_layers)
        for name in ("attention_share", "mlp_share"):
            shares = getattr(self, name)
            if shares and (len(shares) != self.num_layers or not all(0 <= share <= 1 for share in shares)):
                raise ValueError(f"{name} must hold one share from 0 to 1 for each of {self.num_layers} layers.")

    @property
    def narrowed(self) -> bool:
        """Whether something is left of a layer, but not all of its width."""
        return any(0 < share < 1 for share in (*self.attention_share, *self.mlp_share))

    @property
    def kept(self) -> int:
        """Layers that are still there, whole or in part."""
        return self.num_layers - len(set(self.removed))


@dataclass(frozen=True)
class LayerStack:
    """The layers of several models drawn below each other, kept and removed."""

    title: str
    strips: tuple[Strip, ...]
    note: str = ""


@dataclass(frozen=True)
class Point:
    """One model in a frontier: its name, and where it stands."""

    name: str
    x: float
    y: float


@dataclass(frozen=True)
class Frontier:
    """Quality over cost, one point a model; the models that no other beats in both are joined.

    Args:
        title: of the chart.
        points: the models; the first one is the reference and drawn so.
        x: name of the cost (less is better).
        y: name of the quality.
        better: "lower" or "higher" y.
        note: a sentence below the chart.

    Raises:
        ValueError: if there is no point, a value is not finite, or ``better`` is another word.

    Example:
        >>> frontier = Frontier("Cost", (Point("dense", 10, 5.0), Point("good", 8, 6.0), Point("bad", 9, 7.0)))
        >>> [point.name for point in frontier.best]
        ['good', 'dense']
    """

    title: str
    points: tuple[Point, ...]
    x: str = "parameters"
    y: str = "perplexity"
    better: str = "lower"
    note: str = ""

    def __post_init__(self) -> None:
        if not self.points:
            raise ValueError(f"The frontier {self.title!r} has no point; leave the chart out.")
        for point in self.points:
            if not (math.isfinite(point.x) and math.isfinite(point.y)):
                raise ValueError(f"{point.name!r} is at ({point.x}, {point.y}), which cannot be drawn; leave it out.")
        if self.better not in ("lower", "higher"):
            raise ValueError(f"better={self.better!r} must be 'lower' or 'higher'.")

    @property
    def best(self) -> tuple[Point, ...]:
        """The points that no other one beats, by rising x."""
        sign = 1 if self.better == "lower" else -1
        found: list[Point] = []
        for point in sorted(self.points, key=lambda point: (point.x, sign * point.y)):
            if not found or sign * point.y < sign * found[-1].y:
                found.append(point)
        return tuple(found)


@dataclass(frozen=True)
class Curve:
    """One line of a chart: a name, and its points as ``(x, y)``."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Curves:
    """Lines over a common axis, such as the losses of a training run over its steps.

    Args:
        title: of the chart.
        curves: the lines, at most six (more cannot be told apart).
        x: name of the horizontal axis.
        y: name of the vertical axis.
        note: a sentence below the chart.

    Raises:
        ValueError: if there is no line or are too many, or one has no point.

    Example:
        >>> Curves("Recovery", (Curve("training", ((0, 2.0), (10, 1.5))),)).x
        'step'
    """

    title: str
    curves: tuple[Curve, ...]
    x: str = "step"
    y: str = "loss"
    note: str = ""

    def __post_init__(self) -> None:
        if not 1 <= len(self.curves) <= 6:
            raise ValueError(f"{self.title!r} has {len(self.curves)} curves; a chart shows 1 to 6.")
        empty = [curve.name for curve in self.curves if not curve.points]
        if empty:
            raise ValueError(f"The curve {empty[0]!r} of {self.title!r} has no point; leave it out.")


@dataclass(frozen=True)
class Excerpt:
    """A piece of text, and what was measured on it, by name."""

    text: str
    facts: Mapping[str, Cell]


@dataclass(frozen=True)
class Excerpts:
    """Texts with what was measured on them, in order."""

    title: str
    excerpts: tuple[Excerpt, ...]
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first column names the row.

    Args:
        title: of the table.
        columns: headers.
        rows: cells; numbers are formatted and set on the right, None is a dash.
        note: a sentence below it.

    Raises:
        ValueError: if a row has another number of cells than there are columns.

    Example:
        >>> Table("Sizes", ("model", "parameters"), (("dense", 134515008),)).columns
        ('model', 'parameters')
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"Row {index} of {self.title!r} has {len(row)} cells for {len(self.columns)} columns.")


@dataclass(frozen=True)
class Check:
    """Something that was verified: what, whether it held, and the detail."""

    name: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class Checks:
    """A list of checks."""

    title: str
    checks: tuple[Check, ...]
    note: str = ""


Block = LayerScores | Heatmap | LayerStack | Frontier | Curves | Excerpts | Table | Checks

# kind in the JSON -> class; a new kind of block is one entry here and one macro in report.html
BLOCKS: dict[str, type[Block]] = {
    "layer_scores": LayerScores,
    "heatmap": Heatmap,
    "layer_stack": LayerStack,
    "frontier": Frontier,
    "curves": Curves,
    "excerpts": Excerpts,
    "table": Table,
    "checks": Checks,
}
# blocks without a picture, which take the whole width of the page
TEXT_BLOCKS = ("table", "checks", "excerpts")
# fields that hold data of their own
_INNER = {"strips": Strip, "checks": Check, "points": Point, "curves": Curve, "excerpts": Excerpt}
_KINDS = {cls: kind for kind, cls in BLOCKS.items()}


def kind_of(block: Block) -> str:
    """Return the name under which a block is written.

    Example:
        >>> kind_of(Table("t", ("a",), ()))
        'table'
    """
    return _KINDS[type(block)]


def to_dict(block: Block) -> dict[str, Any]:
    """Return a block as plain data, with its ``kind``.

    Example:
        >>> to_dict(Checks("c", (Check("reloads", True),)))["kind"]
        'checks'
    """
    return {"kind": kind_of(block), **asdict(block)}


def from_dict(data: Mapping[str, Any]) -> Block:
    """Make a block from what ``to_dict`` returned, after any trip through JSON.

    Raises:
        ValueError: if the kind is unknown.

    Example:
        >>> table = Table("t", ("a", "b"), (("x", 1),))
        >>> from_dict(to_dict(table)) == table
        True
    """
    cls = lookup(BLOCKS, data.get("kind", ""), "kind of report block")
    values = {}
    for entry in fields(cls):
        if entry.name not in data:
            continue
        value = data[entry.name]
        if entry.name in _INNER:
            value = tuple(_build(_INNER[entry.name], item) for item in value)
        values[entry.name] = _tuples(value)
    return cls(**values)


def numbers(row: Mapping[str, Cell]) -> dict[str, Cell]:
    """Return a row of JSON with names of numbers in it ("Infinity") turned back into the numbers.

    Example:
        >>> numbers({"model": "broken", "perplexity": "Infinity"})
        {'model': 'broken', 'perplexity': inf}
    """
    return {key: NOT_IN_JSON.get(value, value) if isinstance(value, str) else value for key, value in row.items()}


def _build(cls: Any, item: Mapping[str, Any]) -> Any:
    return cls(**{name: _tuples(value) for name, value in item.items()})


def _tuples(value: Any) -> Any:
    """Turn the lists of JSON back into the tuples of frozen data, and names of numbers in them into the numbers."""
    if is_dataclass(value):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(NOT_IN_JSON.get(item, item) if isinstance(item, str) else _tuples(item) for item in value)
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return value


def _check_layers(name: str, layers: tuple[int, ...], count: int) -> None:
    outside = [layer for layer in layers if not 0 <= layer < count]
    if outside:
        raise ValueError(f"{name} names layer {outside[0]}, but there are {count} layers (0 to {count - 1}).")
