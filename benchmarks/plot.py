"""A bar chart as plain SVG: one group of bars per merge, seconds on a logarithmic axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import ceil, floor, log10

WIDTH, LEFT, RIGHT, TOP = 820, 190, 70, 40
BAR, GAP = 13, 12
COLOURS = {"floor": "#9aa5b1", "smelt": "#c2410c", "mergekit": "#1d4ed8"}

Bars = Mapping[str, float]


def bar_chart(title: str, groups: Sequence[tuple[str, Bars]]) -> str:
    """An SVG document; every group is a label and the seconds of each entrant, all above zero."""
    seconds = [value for _, bars in groups for value in bars.values()]
    low, high = floor(log10(min(seconds))), max(ceil(log10(max(seconds))), floor(log10(min(seconds))) + 1)

    def across(value: float) -> float:
        return LEFT + (log10(value) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    parts: list[str] = []
    y = TOP + 16
    for label, bars in groups:
        middle = y + BAR * len(bars) / 2
        parts.append(_text(LEFT - 8, middle + 4, label, anchor="end"))
        for entrant, value in bars.items():
            parts.append(_bar(y, across(value), COLOURS[entrant]))
            parts.append(_text(across(value) + 4, y + BAR - 3, f"{value:.3g} s", size=10))
            y += BAR
        y += GAP
    grid = [_line(across(10.0**power), y, f"{10.0**power:g} s") for power in range(low, high + 1)]
    return _document(title, y + 10, [*_legend(groups), *grid, *parts])


def _bar(y: float, end: float, colour: str) -> str:
    return f'<rect x="{LEFT}" y="{y:.1f}" width="{end - LEFT:.1f}" height="{BAR - 2}" fill="{colour}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x: float, bottom: float, label: str) -> str:
    line = f'<line x1="{x:.1f}" y1="{TOP + 6}" x2="{x:.1f}" y2="{bottom:.1f}" stroke="#d7dce1"/>'
    return line + _text(x, TOP, label, anchor="middle", size=10)


def _legend(groups: Sequence[tuple[str, Bars]]) -> list[str]:
    present = [entrant for entrant in COLOURS if any(entrant in bars for _, bars in groups)]
    parts = []
    for position, entrant in enumerate(present):
        x = WIDTH - RIGHT - 90 * (len(present) - position)
        parts.append(f'<rect x="{x}" y="8" width="11" height="11" fill="{COLOURS[entrant]}"/>')
        parts.append(_text(x + 16, 18, entrant))
    return parts


def _document(title: str, height: float, parts: Sequence[str]) -> str:
    space = f'viewBox="0 0 {WIDTH} {height:.0f}" font-family="sans-serif"'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" {space}>'
    paper = '<rect width="100%" height="100%" fill="white"/>'
    heading = f'<text x="12" y="18" font-size="14" font-weight="bold">{escape(title)}</text>'
    return "\n".join([start, f"<title>{escape(title)}</title>", paper, heading, *parts, "</svg>"]) + "\n"
