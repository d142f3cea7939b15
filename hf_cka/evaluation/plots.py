"""Charts of a report as inline SVG strings: no script, no image file, colours from the page's style sheet.

They are written by hand rather than by a plotting library so that they follow light and dark, stay small, and are
readable on a phone: every chart is 380 units wide. What they show is plain data from ``blocks``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from html import escape

from hf_cka.evaluation.blocks import Heatmap, LayerScores, LayerStack, Strip

WIDTH = 380
_LEFT, _RIGHT = 46, 6
_STRIP = 26  # height of a row of layer marks with its name above
_CELL = 36  # a small matrix is not blown up beyond this

# Anchors of the viridis colour map, from low to high (matplotlib; CC0).
_VIRIDIS = (
    (68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142),
    (31, 158, 137), (53, 183, 121), (109, 205, 89), (180, 222, 44), (253, 231, 37),
)  # fmt: skip


def layer_scores_svg(block: LayerScores, name: str) -> str:
    """Draw scores with standard errors, the chosen layers filled, and the controls as rows of marks below.

    The axis is logarithmic when a few layers would flatten all others (largest above 8 times the median).

    Args:
        block: what to draw.
        name: unique in the page; prefix of the ids.

    Example:
        >>> layer_scores_svg(LayerScores("Scores", (0.3, 0.1), (0,)), "a")[:4]
        '<svg'
    """
    chosen = [("chosen", block.selected)] if block.selected or block.controls else []
    rows = [*chosen, *block.controls.items()]
    top, bottom = 10, 190
    height = bottom + 22 + _STRIP * len(rows)
    scale = _Scale(block, top, bottom)
    step = (WIDTH - _LEFT - _RIGHT) / max(block.num_layers, 1)

    parts = []
    for value, text in scale.ticks:
        y = scale(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
    for layer, score in enumerate(block.scores):
        parts.append(_score_mark(block, layer, score, _LEFT + step * (layer + 0.5), scale, bottom))
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    parts += _layer_ticks(block.num_layers, step, bottom + 12)
    middle = (top + bottom) / 2
    parts.append(
        f'<text class="label" transform="translate(10 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(block.label)}{' (log scale)' if scale.log else ''}</text>"
    )
    for index, (row, layers) in enumerate(rows):
        y = bottom + 31 + _STRIP * index
        parts.append(f'<text class="tick" x="{_LEFT}" y="{y}">{escape(row)}</text>')
        for layer in range(block.num_layers):
            kind = "mark on" if layer in layers else "mark"
            x = _LEFT + step * layer
            parts.append(
                f'<rect class="{kind}" x="{x + step * 0.12:.1f}" y="{y + 3}" width="{step * 0.76:.1f}" '
                'height="9" rx="1.5"/>'
            )
    return svg(name, height, block.title, _describe_scores(block), parts)


def heatmap_svg(block: Heatmap, name: str) -> str:
    """Draw a similarity matrix with its colour scale.

    The colours span the values without low outliers (below the first quartile by more than 1.5 times the spread of
    the middle half: Tukey's rule), which get a colour of their own: so one odd layer neither hides nor flattens the
    rest.

    Args:
        block: what to draw.
        name: unique in the page; prefix of the ids.

    Example:
        >>> "CKA" in heatmap_svg(Heatmap("Similarity", ((1.0, 0.4), (0.4, 1.0))), "b")
        True
    """
    values = [value for row in block.values for value in row if value is not None and math.isfinite(value)]
    low, high = colour_range(values)
    columns, lines = len(block.values[0]), len(block.values)
    above = block.column_labels or tuple(map(str, range(columns)))
    beside = block.row_labels or tuple(map(str, range(lines)))
    top = 6
    size = min((WIDTH - _LEFT - _RIGHT) / columns, 340 / lines, _CELL)
    bottom = top + size * lines

    parts = ['<g shape-rendering="crispEdges">']  # no seams between cells
    for i, row in enumerate(block.values):
        for j, value in enumerate(row):
            defined = value is not None and math.isfinite(value)
            shown = f"{value:.3f}" if defined else "undefined"
            outside = defined and value is not None and value < low
            fill = "" if not defined or outside or value is None else f' fill="{_colour(value, low, high)}"'
            told = escape(f"{block.rows} {beside[i]}, {block.columns} {above[j]}: {shown}")
            kind = ' class="under"' if outside else "" if defined else ' class="undefined"'
            parts.append(
                f'<rect{kind}{fill} x="{_LEFT + size * j:.2f}" y="{top + size * i:.2f}" width="{size + 0.3:.2f}" '
                f'height="{size + 0.3:.2f}"><title>{told}</title></rect>'
            )
    parts.append("</g>")
    parts += _layer_ticks(columns, size, bottom + 12, labels=above)
    every = _every(lines)
    for i in range(0, lines, every):
        parts.append(
            f'<text class="tick" x="{_LEFT - 5}" y="{top + size * (i + 0.5) + 3.5:.1f}" text-anchor="end">'
            f"{escape(beside[i])}</text>"
        )
    parts.append(
        f'<text class="label" transform="translate(10 {(top + bottom) / 2:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(block.rows)}</text>"
    )
    parts.append(
        f'<text class="label" x="{_LEFT + size * columns / 2:.1f}" y="{bottom + 27:.1f}" text-anchor="middle">'
        f"{escape(block.columns)}</text>"
    )
    below = any(value < low for value in values)
    missing = len(values) < lines * columns
    parts += _legend(block.label, low, high, below, missing, bottom + 38)
    height = bottom + 66
    described = f"{lines} by {columns} matrix, values from {min(values):.3f} to {max(values):.3f}." if values else ""
    return svg(name, height, block.title, described, parts)


def layer_stack_svg(block: LayerStack, name: str) -> str:
    """Draw the layers of each model as a row of blocks: attention above, MLP below, removed ones crossed out.

    Args:
        block: what to draw.
        name: unique in the page; prefix of the ids.

    Example:
        >>> layer_stack_svg(LayerStack("Stack", (Strip("pruned", 4, removed=(2,)),)), "c").count("removed</title>")
        2
    """
    row_height, top = 60, 4
    parts = []
    for index, strip in enumerate(block.strips):
        y = top + row_height * index
        step = (WIDTH - 2 * _RIGHT) / max(strip.num_layers, 1)
        kept = f"{strip.kept} of {strip.num_layers} layers"
        parts.append(f'<text class="name" x="{_RIGHT}" y="{y + 11}">{escape(strip.name)}</text>')
        parts.append(f'<text class="tick" x="{WIDTH - _RIGHT}" y="{y + 11}" text-anchor="end">{kept}</text>')
        for layer in range(strip.num_layers):
            x = _RIGHT + step * layer
            for part, gone, shares, at in (
                ("attention", strip.removed_attention, strip.attention_share, y + 17),
                ("MLP", strip.removed_mlp, strip.mlp_share, y + 29),
            ):
                removed = layer in gone or layer in strip.removed
                share = 0.0 if removed else shares[layer] if shares else 1.0
                parts.append(_cell(x, at, step, part, layer, share))
        parts += _layer_ticks(strip.num_layers, step, y + 51, left=_RIGHT)
    height = top + row_height * len(block.strips)
    described = " ".join(_describe_strip(strip) for strip in block.strips)
    return svg(name, height, block.title, described, parts)


def colour_range(values: Sequence[float]) -> tuple[float, float]:
    """Return the (low, high) that the colours span: all values but low outliers.

    Example:
        >>> colour_range([0.9, 0.92, 0.94, 0.96, 0.98, 0.1])
        (0.9, 0.98)
    """
    if not values:
        return 0.0, 1.0
    fence = -math.inf
    if len(values) >= 4:
        first, _, third = statistics.quantiles(values, n=4, method="inclusive")
        fence = first - 1.5 * (third - first)
    inside = [value for value in values if value >= fence]
    low, high = min(inside), max(inside)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


class _Scale:
    """Score to height, linear or logarithmic, with its ticks."""

    def __init__(self, block: LayerScores, top: float, bottom: float) -> None:
        self.top, self.bottom = top, bottom
        scores = [score for score in block.scores if score is not None]
        errors = [error or 0.0 for error in block.errors] or [0.0] * len(block.scores)
        ends = [
            end
            for score, error in zip(block.scores, errors, strict=True)
            if score is not None
            for end in (score - error, score + error)
        ]
        self.log = bool(scores) and min(scores) > 0 and max(scores) > 8 * statistics.median(scores)
        if self.log:
            # down to the lowest score, not to the lowest whisker: that may reach zero
            self.low = math.floor(math.log10(min(scores)) * 3) / 3
            self.high = math.log10(max(ends)) + 0.03
            marks = [m * 10.0**e for e in range(-12, 13) for m in (1, 2, 5)]
            self.ticks = [(m, f"{m:g}") for m in marks if self.low - 1e-9 <= math.log10(m) <= self.high]
        else:
            self.low, high = min([0.0, *ends]), max([0.0, *ends])
            step = nice_step((high - self.low) / 4)
            self.high = high + 0.04 * (high - self.low) if high > self.low else self.low + 1.0
            first = math.ceil(self.low / step)
            self.ticks = [(i * step, f"{i * step:g}") for i in range(first, math.floor(self.high / step) + 1)]

    def __call__(self, value: float) -> float:
        if self.log:
            value = math.log10(value) if value > 0 else self.low
        share = (value - self.low) / (self.high - self.low)
        return self.bottom - min(max(share, 0.0), 1.0) * (self.bottom - self.top)


def _score_mark(block: LayerScores, layer: int, score: float | None, x: float, scale: _Scale, bottom: float) -> str:
    status = block.status[layer] if block.status else "ok"
    if score is None:
        return (
            f"<g><title>layer {layer}: {escape(status)}, no score</title>"
            f'<text class="bad" x="{x:.1f}" y="{bottom - 4}" text-anchor="middle">×</text></g>'
        )
    chosen = layer in block.selected
    error = block.errors[layer] if block.errors else None
    text = f"layer {layer}: {score:.4g}" + (f" ± {error:.2g}" if error is not None else "")
    text += (", chosen" if chosen else "") + (f", {status.replace('_', ' ')}" if status != "ok" else "")
    y = highest = scale(score)
    zero = bottom if scale.log else scale(0.0)
    kind = "on" if chosen else "off"
    out = [f'<g class="{kind}"><title>{escape(text)}</title>']
    out.append(f'<line class="stem" x1="{x:.1f}" x2="{x:.1f}" y1="{zero:.1f}" y2="{y:.1f}"/>')
    if error is not None:
        lowest, highest = scale(score - error), scale(score + error)
        out.append(f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{lowest:.1f}" y2="{highest:.1f}"/>')
    out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.4"/>')
    if status != "ok":
        at = max(min(highest, y - 3.4) - 3, 9)
        out.append(f'<text class="bad" x="{x:.1f}" y="{at:.1f}" text-anchor="middle">!</text>')
    return "".join(out) + "</g>"


def _cell(x: float, y: float, step: float, part: str, layer: int, share: float) -> str:
    left, width, tall = x + step * 0.1, step * 0.8, 10
    kind = "gone" if share == 0 else "kept" if share == 1 else "narrow"
    said = {"gone": "removed", "kept": "kept", "narrow": f"{share:.0%} of its width kept"}[kind]
    out = (
        f'<g class="{kind}"><title>layer {layer}, {part}: {said}</title>'
        f'<rect x="{left:.1f}" y="{y}" width="{width:.1f}" height="{tall}" rx="1.5"/>'
    )
    if kind == "narrow":
        high = tall * share
        out += f'<path d="M{left:.1f} {y + tall}h{width:.1f}v-{high:.1f}h-{width:.1f}z"/>'
    if kind == "gone":
        out += f'<path d="M{left:.1f} {y}l{width:.1f} {tall}m0 -{tall}l-{width:.1f} {tall}"/>'
    return out + "</g>"


def _legend(label: str, low: float, high: float, below: bool, missing: bool, y: float) -> list[str]:
    left, width, steps = _LEFT + 60, 150, 30
    parts = [f'<text class="label" x="{left - 8}" y="{y + 9:.1f}" text-anchor="end">{escape(label)}</text>']
    for i in range(steps):
        value = low + (high - low) * i / (steps - 1)
        parts.append(
            f'<rect fill="{_colour(value, low, high)}" x="{left + width * i / steps:.2f}" y="{y:.1f}" '
            f'width="{width / steps + 0.3:.2f}" height="11"/>'
        )
    for value, x, anchor in ((low, left, "start"), (high, left + width, "end")):
        parts.append(f'<text class="tick" x="{x}" y="{y + 23:.1f}" text-anchor="{anchor}">{value:.3g}</text>')
    x = left + width + 12
    for wanted, kind, text in ((below, "under", f"below {low:.3g}"), (missing, "undefined", "undefined")):
        if wanted:
            parts.append(f'<rect class="{kind}" x="{x}" y="{y:.1f}" width="11" height="11"/>')
            parts.append(f'<text class="tick" x="{x + 15}" y="{y + 9.5:.1f}">{text}</text>')
            y += 16
    return parts


def _layer_ticks(
    count: int, step: float, y: float, left: float = _LEFT, labels: Sequence[str] | None = None
) -> list[str]:
    return [
        f'<text class="tick" x="{left + step * (i + 0.5):.1f}" y="{y:.1f}" text-anchor="middle">'
        f"{escape(labels[i] if labels else str(i))}</text>"
        for i in range(0, count, _every(count))
    ]


def _every(count: int) -> int:
    return next(step for step in (1, 2, 5, 10, 20, 50, count + 1) if count <= 14 * step or step > count)


def nice_step(rough: float) -> float:
    """Return a round step of at least the given size: 1, 2 or 5 times a power of ten.

    Example:
        >>> nice_step(0.3), nice_step(7)
        (0.5, 10.0)
    """
    if rough <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough)


def _colour(value: float, low: float, high: float) -> str:
    place = min(max((value - low) / (high - low), 0.0), 1.0) * (len(_VIRIDIS) - 1)
    index = min(int(place), len(_VIRIDIS) - 2)
    share = place - index
    mixed = (round(a + (b - a) * share) for a, b in zip(_VIRIDIS[index], _VIRIDIS[index + 1], strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _describe_scores(block: LayerScores) -> str:
    known = {layer: score for layer, score in enumerate(block.scores) if score is not None}
    if not known:
        return "No layer has a defined score."
    best = max(known, key=lambda layer: known[layer])
    chosen = ", ".join(map(str, block.selected)) or "none"
    return f"Highest: layer {best} with {known[best]:.3g}. Chosen layers: {chosen}."


def _describe_strip(strip: Strip) -> str:
    gone = [
        f"{what} {', '.join(map(str, layers))}"
        for what, layers in (
            ("layers", strip.removed),
            ("attention of", strip.removed_attention),
            ("MLP of", strip.removed_mlp),
        )
        if layers
    ]
    narrow = [
        f"{what} keeps {sum(shares) / len(shares):.0%} of its width"
        for what, shares in (("attention", strip.attention_share), ("the MLP", strip.mlp_share))
        if any(0 < share < 1 for share in shares)
    ]
    told = [*(["removed " + "; ".join(gone)] if gone else []), *narrow]
    return f"{strip.name}: {', '.join(told) or 'nothing removed'}."


def svg(name: str, height: float, title: str, described: str, parts: Sequence[str]) -> str:
    """Return a chart of the common width with its title and a description in words, for those who cannot see it."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-labelledby="{name}-t {name}-d"><title id="{name}-t">{escape(title)}</title>'
        f'<desc id="{name}-d">{escape(described)}</desc>{"".join(parts)}</svg>'
    )
