"""Bars and curves as SVG, by hand: two kinds of picture need no library."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

FONT = 'font-family="system-ui, sans-serif" font-size="12"'
COLOURS = ("#2f6fde", "#9db9ee", "#d9822b", "#e8c08f", "#6b7280")
INK, FAINT = "#374151", "#e5e7eb"
LABELS, BARS, ROW = 150, 460, 18  # pixels


def bars(groups: Mapping[str, Mapping[str, float]], unit: str = "s") -> str:
    """Horizontal bars in groups that share a title; each group has a scale of its own.

    Args:
        groups: values by name, by title.
        unit: behind the values.
    """
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    parts, y = [], 8
    for title, group in groups.items():
        largest = max(group.values(), default=0) or 1
        parts.append(_text(8, y + 12, title, weight="bold"))
        y += 20
        for name, value in group.items():
            width = BARS * value / largest
            colour = COLOURS[names.index(name) % len(COLOURS)]
            parts.append(_text(LABELS - 6, y + 12, name, anchor="end"))
            parts.append(
                f'<rect x="{LABELS}" y="{y}" width="{width:.1f}" height="{ROW - 4}" '
                f'fill="{colour}"/>'
            )
            parts.append(_text(LABELS + width + 6, y + 12, f"{value:.3g} {unit}"))
            y += ROW
        y += 10
    return _svg(LABELS + BARS + 80, y, parts)


@dataclass(frozen=True)
class Curve:
    """Measured points and the law that they are expected to follow, over one axis.

    Attributes:
        title: above the panel.
        axis: what grows.
        values: of the axis.
        measured: one each.
        expected: one each.
    """

    title: str
    axis: str
    values: Sequence[float]
    measured: Sequence[float]
    expected: Sequence[float]


def curves(panels: Sequence[Curve]) -> str:
    """Panels side by side, three a row, both axes logarithmic: points measured, lines expected."""
    side, gap, top = 200, 60, 30
    parts = []
    for number, panel in enumerate(panels):
        x = gap + number % 3 * (side + gap)
        y = top + number // 3 * (side + 2 * top + 10)
        parts += _panel(panel, x, y, side)
    rows = -(-len(panels) // 3)
    return _svg(gap + 3 * (side + gap), rows * (side + 2 * top + 10) + 10, parts)


def _panel(panel: Curve, left: float, top: float, side: float) -> list[str]:
    xs, ys = panel.values, (*panel.measured, *panel.expected)

    def place(value: float, values: Sequence[float]) -> float:
        low, high = math.log(min(values)), math.log(max(values))
        return 0.5 if high == low else 0.05 + 0.9 * (math.log(value) - low) / (high - low)

    def point(x: float, y: float) -> tuple[float, float]:
        return left + side * place(x, xs), top + side * (1 - place(y, ys))

    line = " ".join(
        "{:.1f},{:.1f}".format(*point(x, y)) for x, y in zip(xs, panel.expected, strict=True)
    )
    parts = [
        f'<rect x="{left}" y="{top}" width="{side}" height="{side}" fill="none" stroke="{FAINT}"/>',
        _text(left, top - 8, panel.title, weight="bold"),
        _text(left + side, top + side + 32, panel.axis, anchor="end"),
        f'<polyline points="{line}" fill="none" stroke="{COLOURS[2]}"/>',
    ]
    for x, y in zip(xs, panel.measured, strict=True):
        across, down = point(x, y)
        parts.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="4" fill="{COLOURS[0]}"/>')
        parts.append(_text(across, top + side + 16, f"{x:g}", anchor="middle"))
    ends = min(panel.measured), max(panel.measured)
    heights = [point(xs[0], y)[1] + 4 for y in ends]
    labels = zip(heights, ends, strict=True)
    return parts + [_text(left - 6, at, f"{y:.3g}", anchor="end") for at, y in labels]


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" '
        f'fill="{INK}">{escape(text)}</text>'
    )


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" {FONT}>'
        f'\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )
