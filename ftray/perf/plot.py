"""A plot with two logarithmic axes, as SVG.

Role: pure. Written by hand: a plotting library would be the largest dependency that we have, for one picture. Colours
follow the reader's light or dark preference, series differ by dash and mark too, and each is labelled at its end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 46, 52
LABEL_GAP = 15
"""Labels are at least so far apart."""

STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #24292f }
  .title { font-size: 15px; font-weight: 600 }
  .frame, .grid { stroke: #d0d7de; fill: none }
  .grid { stroke-width: 0.6 }
  .s0 { --c: #0969da } .s1 { --c: #bc4c00 } .s2 { --c: #1a7f37 } .s3 { --c: #8250df } .s4 { --c: #9a6700 }
  .line { stroke: var(--c); stroke-width: 2; fill: none } .other { stroke-dasharray: 5 4 }
  .mark { fill: var(--c) } .label { fill: var(--c) }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .frame, .grid { stroke: #3d444d }
    .s0 { --c: #58a6ff } .s1 { --c: #ffa657 } .s2 { --c: #56d364 } .s3 { --c: #d2a8ff } .s4 { --c: #e3b341 }
  }
"""


@dataclass(frozen=True, slots=True)
class Series:
    """Points (x, y), all positive, from left to right. Series of the same `colour` (an index) belong together."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int
    dashed: bool = False


def log_log(title: str, x_title: str, y_title: str, series: Sequence[Series]) -> str:
    """An SVG document. Raises ValueError without a point, or with one that has no logarithm."""
    points = [point for each in series for point in each.points]
    if not points or any(x <= 0 or y <= 0 for x, y in points):
        raise ValueError("a logarithmic plot needs points, all of them positive")
    x_axis = _Axis([x for x, _ in points], LEFT, WIDTH - RIGHT)
    y_axis = _Axis([y for _, y in points], HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<text class="title" x="{LEFT}" y="24">{escape(title)}</text>',
    ]
    for exponent in x_axis.exponents:
        at = x_axis.at(10**exponent)
        parts.append(f'<line class="grid" x1="{at:.1f}" y1="{TOP}" x2="{at:.1f}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_power(exponent)}</text>')
    for exponent in y_axis.exponents:
        at = y_axis.at(10**exponent)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{at:.1f}" x2="{WIDTH - RIGHT}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{_power(exponent)}</text>')
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    parts.append(f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{width}" height="{height}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x_title)}</text>')
    across = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text transform="translate(18 {across:.1f}) rotate(-90)" text-anchor="middle">{escape(y_title)}</text>'
    )
    shown = [each for each in series if each.points]
    heights = _apart([y_axis.at(each.points[-1][1]) for each in shown])
    for each, height_of_label in zip(shown, heights):
        placed = [(x_axis.at(x), y_axis.at(y)) for x, y in each.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<g class="s{each.colour}">')
        parts.append(f'<polyline class="line{" other" if each.dashed else ""}" points="{path}"/>')
        parts += [f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="{3 if each.dashed else 4}"/>' for x, y in placed]
        x, _ = placed[-1]
        place = f'x="{x + 9:.1f}" y="{height_of_label + 4:.1f}"'
        parts.append(f'<text class="label" {place}>{escape(each.label)}</text></g>')
    return "\n".join([*parts, "</svg>\n"])


class _Axis:
    """Whole powers of ten around all values, between two ends in pixels."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        self.exponents = range(low, max(high, low + 1) + 1)
        self._start, self._per_decade = start, (end - start) / (self.exponents[-1] - low)

    def at(self, value: float) -> float:
        return self._start + (math.log10(value) - self.exponents[0]) * self._per_decade


def _apart(heights: Sequence[float]) -> list[float]:
    """Moves labels down so that none lies on another."""
    moved = list(heights)
    order = sorted(range(len(moved)), key=lambda index: moved[index])
    for above, below in pairwise(order):
        moved[below] = max(moved[below], moved[above] + LABEL_GAP)
    return moved


def _power(exponent: int) -> str:
    return f"{10**exponent:,}" if exponent >= 0 else f"{10.0**exponent:.{-exponent}f}"
