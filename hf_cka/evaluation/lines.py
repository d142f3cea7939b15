"""Charts with two numeric axes as inline SVG strings: quality over cost, and losses over steps.

Charts of layers are in ``plots``; what both share (width, page colours, the frame with its description) comes from
there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from hf_cka.evaluation.blocks import Curves, Frontier
from hf_cka.evaluation.plots import WIDTH, nice_step, svg

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 12, 210
_HEIGHT = _BOTTOM + 36
_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def frontier_svg(block: Frontier, name: str) -> str:
    """Draw one mark a model, and a line through those that no other beats in both.

    The vertical axis is logarithmic when the values span more than a factor of ten: one broken model would flatten
    the rest otherwise.

    Args:
        block: what to draw.
        name: unique in the page; prefix of the ids.

    Example:
        >>> from hf_cka.evaluation.blocks import Point
        >>> chart = frontier_svg(Frontier("Cost", (Point("dense", 10, 5.0), Point("small", 8, 6.0))), "a")
        >>> chart.count("<circle")
        2
    """
    across = Axis([point.x for point in block.points], _LEFT + 8, WIDTH - _RIGHT - 14)
    up = Axis([point.y for point in block.points], _BOTTOM - 10, _TOP + 12, allow_log=True)
    parts = _frame(across, up, block.x, block.y)
    best = block.best
    if len(best) > 1:
        path = " ".join(f"{across(point.x):.1f},{up(point.y):.1f}" for point in best)
        parts.append(f'<polyline class="best" points="{path}"/>')
    marks, texts = [], []
    taken: list[tuple[float, float, float]] = []  # left, right and baseline of the names so far
    for index, point in enumerate(block.points):
        x, y = across(point.x), up(point.y)
        told = escape(f"{point.name}: {short_number(point.x)} {block.x}, {block.y} {point.y:.4g}")
        marks.append(
            f'<g class="{"off" if index else "on"}"><title>{told}</title>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"/></g>'
        )
        texts.append(_name(point.name, x, y, taken))
    return svg(name, _HEIGHT, block.title, _describe_frontier(block), parts + marks + texts)


def curves_svg(block: Curves, name: str) -> str:
    """Draw lines over a common axis, told apart by colour and, in the page, by a legend below.

    Args:
        block: what to draw.
        name: unique in the page; prefix of the ids.

    Example:
        >>> from hf_cka.evaluation.blocks import Curve
        >>> "polyline" in curves_svg(Curves("Recovery", (Curve("training", ((0, 2.0), (10, 1.5))),)), "b")
        True
    """
    points = [point for curve in block.curves for point in curve.points if all(map(math.isfinite, point))]
    across = Axis([x for x, _ in points], _LEFT, WIDTH - _RIGHT)
    up = Axis([y for _, y in points], _BOTTOM, _TOP, allow_log=True)
    parts = _frame(across, up, block.x, block.y)
    for index, curve in enumerate(block.curves):
        finite = [point for point in curve.points if all(map(math.isfinite, point))]
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in finite)
        parts.append(
            f'<g><title>{escape(curve.name)}</title><polyline class="curve curve-{index}" points="{path}"/></g>'
        )
        if len(finite) < 12:
            parts += [
                f'<circle class="curve curve-{index}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="2"/>' for x, y in finite
            ]
    told = " ".join(
        f"{curve.name}: {block.y} {curve.points[0][1]:.4g} at {block.x} {curve.points[0][0]:g}, "
        f"{curve.points[-1][1]:.4g} at {curve.points[-1][0]:g}."
        for curve in block.curves
    )
    return svg(name, _HEIGHT, block.title, told, parts)


def short_number(value: float) -> str:
    """Return a number in few characters, with k, M, B or T.

    Example:
        >>> short_number(134515008), short_number(19.5), short_number(0.25)
        ('134.5M', '19.5', '0.25')
    """
    for size, unit in _UNITS:
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


class Axis:
    """Values to places between two ends, with ticks at round numbers; logarithmic where that was allowed and helps.

    Args:
        values: what must fit.
        start: place of the lowest value.
        end: place of the highest value.
        allow_log: use a logarithmic axis if all values are positive and span more than a factor of ten.

    Example:
        >>> axis = Axis([0, 10], 0, 100)
        >>> axis(5), axis.ticks[:3]
        (50.0, [0.0, 5.0, 10.0])
    """

    def __init__(self, values: Sequence[float], start: float, end: float, *, allow_log: bool = False) -> None:
        self.start, self.end = start, end
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        self.log = allow_log and low > 0 and high / low > 10
        if self.log:
            self.low, self.high = math.log10(low), math.log10(high)
            marks = [m * 10.0**e for e in range(-12, 15) for m in ((1, 2, 5) if high / low < 300 else (1,))]
            self.ticks = [m for m in marks if self.low - 1e-9 <= math.log10(m) <= self.high + 1e-9]
            return
        if high == low:
            low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
        self.low, self.high = low, high
        step = nice_step((high - low) / 4)
        self.ticks = [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _frame(across: Axis, up: Axis, x: str, y: str) -> list[str]:
    parts = []
    for value in up.ticks:
        at = up(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 5}" y="{at + 3.5:.1f}" text-anchor="end">{short_number(value)}</text>'
        )
    for value in across.ticks:
        parts.append(
            f'<text class="tick" x="{across(value):.1f}" y="{_BOTTOM + 14}" text-anchor="middle">'
            f"{short_number(value)}</text>"
        )
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{_BOTTOM}" y2="{_BOTTOM}"/>')
    parts.append(
        f'<text class="label" x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{_BOTTOM + 30}" text-anchor="middle">'
        f"{escape(x)}</text>"
    )
    parts.append(
        f'<text class="label" transform="translate(10 {(_TOP + _BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y)}{' (log scale)' if up.log else ''}</text>"
    )
    return parts


def _name(text: str, x: float, y: float, taken: list[tuple[float, float, float]]) -> str:
    """Place a name beside its mark, on the side with room, and off the names that are there."""
    shown = text if len(text) <= 24 else text[:23] + "…"
    width = 6.2 * len(shown)
    left_side = x + 9 + width > WIDTH
    left = max(x - 9 - width, 0.0) if left_side else x + 9
    options = [y + 4 + shift for shift in (0, -13, 13, -26, 26, -39, 39)]
    free = [
        base
        for base in options
        if _TOP <= base <= _BOTTOM - 2
        and not any(left < right and begin < left + width and abs(base - line) < 12 for begin, right, line in taken)
    ]
    base = free[0] if free else options[0]
    taken.append((left, left + width, base))
    anchor = f'x="{x - 9:.1f}" text-anchor="end"' if left_side else f'x="{x + 9:.1f}"'
    return f'<text class="halo" {anchor} y="{base:.1f}">{escape(shown)}</text>'


def _describe_frontier(block: Frontier) -> str:
    told = "; ".join(f"{p.name}: {short_number(p.x)} {block.x}, {block.y} {p.y:.4g}" for p in block.points)
    return f"{told}. {block.better.capitalize()} {block.y} is better."
