"""The two figures of the page, as SVG text that takes its colours from the page's style sheet."""

from collections.abc import Callable, Sequence
from html import escape

from .corpus import Domain
from .results import Result

ROW = 26
LABELS = 130
PANEL = 300
GAP = 40


def average_bars(results: Sequence[Result]) -> str:
    """Two panels of horizontal bars: the mean loss and the mean exact match of every model."""
    loss = [result.average.loss for result in results]
    exact = [result.average.exact for result in results]
    # The differences are small beside the values: each panel begins just outside the lowest value.
    parts = [names_column(results)]
    parts += bars(results, loss, LABELS, "mean loss, nats per token (lower is better)", lambda v: f"{v:.3f}")
    parts += bars(results, exact, LABELS + PANEL + GAP, "mean exact match (higher is better)", lambda v: f"{v:.1%}")
    return svg("Averages over the domains", parts, LABELS + 2 * PANEL + GAP, len(results))


def bars(
    results: Sequence[Result], values: Sequence[float], left: int, title: str, text: Callable[[float], str]
) -> list[str]:
    low, high = cropped(values)
    parts = [f'<text x="{left}" y="14" class="title">{title}</text>']
    for row, (result, value) in enumerate(zip(results, values, strict=True)):
        length = (PANEL - 60) * (value - low) / (high - low)
        top = ROW * (row + 1)
        parts.append(
            f'<rect x="{left}" y="{top + 5}" width="{length:.1f}" height="{ROW - 10}" rx="2" class="{result.kind}">'
            f"<title>{escape(result.model)}: {text(value)}</title></rect>"
            f'<text x="{left + length + 6:.1f}" y="{top + 17}">{text(value)}</text>'
        )
    parts.append(f'<text x="{left}" y="{ROW * (len(results) + 1) + 14}" class="axis">from {text(low)}</text>')
    return parts


def cropped(values: Sequence[float]) -> tuple[float, float]:
    """The range to draw: what the values span and a quarter of it below."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return low - span / 4, high


def gain_bars(results: Sequence[Result], domains: Sequence[Domain]) -> str:
    """How much loss each model lost or gained against the base, one panel for each domain."""
    base, others = results[0], results[1:]
    width = 150
    parts = [names_column(others)]
    for column, domain in enumerate(domains):
        gains = [base.scores[domain.name].loss - result.scores[domain.name].loss for result in others]
        parts += diverging(others, gains, LABELS + column * (width + 20), width, domain.title)
    return svg("Gain over the base, per domain", parts, LABELS + len(domains) * (width + 20), len(others))


def diverging(results: Sequence[Result], gains: Sequence[float], left: int, width: int, title: str) -> list[str]:
    middle, scale = left + width / 2, (width / 2 - 44) / (max(map(abs, gains)) or 1.0)
    parts = [f'<text x="{middle}" y="14" class="title" text-anchor="middle">{escape(title)}</text>']
    for row, (result, gain) in enumerate(zip(results, gains, strict=True)):
        top, length = ROW * (row + 1), abs(gain) * scale
        start, anchor, text = (middle, "start", middle + length + 4) if gain >= 0 else (
            middle - length, "end", middle - length - 4,
        )  # fmt: skip
        parts.append(
            f'<rect x="{start:.1f}" y="{top + 5}" width="{length:.1f}" height="{ROW - 10}" class="{result.kind}"/>'
            f'<text x="{text:.1f}" y="{top + 17}" text-anchor="{anchor}">{gain:+.3f}</text>'
        )
    foot = ROW * (len(results) + 1)
    parts.append(f'<line x1="{middle}" x2="{middle}" y1="{ROW}" y2="{foot}" class="zero"/>')
    return parts


def names_column(results: Sequence[Result]) -> str:
    return "".join(
        f'<text x="{LABELS - 8}" y="{ROW * (row + 1) + 17}" text-anchor="end">{escape(result.model)}</text>'
        for row, result in enumerate(results)
    )


def svg(label: str, parts: Sequence[str], width: int, rows: int) -> str:
    height = ROW * (rows + 1) + 20
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}" '
        f'style="max-width:{width}px">{"".join(parts)}</svg>'
    )
