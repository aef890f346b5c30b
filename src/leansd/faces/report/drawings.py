"""SVG drawings that take their colours from the page, so that they suit light, dark and paper."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import escape

from leansd.faces.report.sections import Drawing
from leansd.plans.address import get_block
from leansd.plans.anatomy import Anatomy
from leansd.plans.drawing import list_states
from leansd.plans.plan import Plan

STATES = {
    "compute": "computed",
    "reuse": "reused",
    "residual": "residual",
    "forecast": "forecast",
    "forecast2": "parabola",
    "chebyshev": "Chebyshev",
    "chebyshev-line": "Chebyshev, line",
    "idle": "idle",
    "gri": "GRI",
    "full-attention": "full attention",
}


@dataclass(frozen=True)
class Point:
    """A named place in a plot; `low` and `high` are the range of `x`."""

    name: str
    x: float
    y: float
    low: float
    high: float
    is_rival: bool = False


@dataclass(frozen=True)
class Bar:
    """A named row of bars, one for each of a chart's `names`; all are shares of 1."""

    name: str
    shares: tuple[float, ...]
    remark: str = ""


def draw_bars(bars: Sequence[Bar], *, names: Sequence[str], alt: str) -> Drawing:
    """Rows of bars to one scale, with the remark behind each."""
    colours = ("var(--compute)", "var(--reuse)")
    left, right, top, thick = 74, 62, 18, 4.2
    line = thick * len(names) + 3.4
    width, height = 520, top + len(bars) * line + 4
    scale = (width - left - right) / max(max(bar.shares) for bar in bars)
    parts = [open_svg(width, height)]
    for place, (name, colour) in enumerate(zip(names, colours, strict=False)):
        x = left + place * 120
        parts.append(f'<rect x="{x}" y="2" width="9" height="9" fill="{colour}"/>')
        parts.append(place_text(x + 13, 10, name, anchor="start", size=9.5))
    for row, bar in enumerate(bars):
        y = top + row * line
        middle = y + thick * len(names) / 2 + 3
        parts.append(place_text(left - 6, middle, bar.name, anchor="end", size=8.5))
        for place, (share, colour) in enumerate(zip(bar.shares, colours, strict=False)):
            parts.append(
                f'<rect x="{left}" y="{y + place * thick:.1f}" width="{share * scale:.1f}" '
                f'height="{thick - 0.4:.1f}" fill="{colour}"/>'
            )
        end = left + max(bar.shares) * scale + 5
        parts.append(place_text(end, middle, bar.remark, anchor="start", size=8.5))
    return Drawing("".join(parts) + "</svg>", alt)


def draw_plan(plan: Plan, anatomy: Anatomy, caption: str = "") -> Drawing:
    """A plan as a grid: a line a unit, a column a step."""
    states = list_states(plan, anatomy)
    left, top, line = 46, 4, 6.4
    cell = 360 / plan.steps
    width, height = left + 362, top + len(states) * line + 34
    parts = [open_svg(width, height)]
    blocks = [(block, len(list(rows))) for block, rows in groupby(states, key=get_block)]
    row = 0
    for block, count in blocks:
        middle = top + (row + count / 2) * line
        parts.append(place_text(left - 6, middle + 3, block, anchor="end", size=8.5))
        row += count
    for index, marks in enumerate(states.values()):
        y, x = top + index * line, 0
        for state, run in groupby(marks):
            length = len(list(run))
            parts.append(
                f'<rect x="{left + x * cell:.1f}" y="{y:.1f}" width="{length * cell - 0.8:.1f}" '
                f'height="{line - 0.8:.1f}" fill="var(--{state})"/>'
            )
            x += length
    base = top + len(states) * line
    parts += [
        place_text(left + (step + 0.5) * cell, base + 11, str(step), size=8.5)
        for step in range(0, plan.steps, max(1, 5 * round(plan.steps / 30)))
    ]
    used = [state for state in STATES if any(state in marks for marks in states.values())]
    x = float(left)
    for state in used:
        parts.append(
            f'<rect x="{x:.0f}" y="{base + 19:.1f}" width="9" height="9" fill="var(--{state})"/>'
        )
        parts.append(place_text(x + 13, base + 27, STATES[state], anchor="start", size=9.5))
        x += 26 + 5.4 * len(STATES[state])
    alt = (
        f"Plan {plan.name}: {len(plan.keys)} of {plan.steps} steps run the whole UNet, "
        f"steps {', '.join(map(str, plan.keys))}."
    )
    return Drawing("".join(parts) + "</svg>", alt, caption)


def draw_heat(rows: Mapping[str, Mapping[int, float]], *, caption: str) -> Drawing:
    """A heat map: a line a name, a column a step, darker for more, on a logarithmic scale."""
    steps = 1 + max((step for row in rows.values() for step in row), default=0)
    values = [value for row in rows.values() for value in row.values() if value > 0]
    low, high = (min(values), max(values)) if values else (1.0, 1.0)
    left, top = 74, 4
    line = 6.4 if len(rows) > 12 else 12.0
    cell = 360 / steps
    width, height = left + 362, top + len(rows) * line + 30
    parts = [open_svg(width, height)]
    for index, (name, row) in enumerate(rows.items()):
        y = top + index * line
        parts.append(place_text(left - 6, y + line - 1, name, anchor="end", size=min(8.5, line)))
        for step, value in row.items():
            share = math.log(value / low) / math.log(high / low) if 0 < low < high and value else 0
            parts.append(
                f'<rect x="{left + step * cell:.1f}" y="{y:.1f}" width="{cell:.1f}" '
                f'height="{line - 0.4:.1f}" fill="var(--mark)" fill-opacity="{share:.2f}"/>'
            )
    base = top + len(rows) * line
    parts += [
        place_text(left + (step + 0.5) * cell, base + 11, str(step), size=8.5)
        for step in range(0, steps, max(1, 5 * round(steps / 30)))
    ]
    scale = f"{low:.2g} (light) to {high:.2g} (dark)"
    parts.append(place_text(left, base + 25, scale, anchor="start", size=9.5))
    highest = max(rows, key=lambda name: max(rows[name].values(), default=0.0), default="")
    alt = f"{caption}: from {low:.2g} to {high:.2g}, most at {highest}."
    return Drawing("".join(parts) + "</svg>", alt, caption)


def plot_tradeoff(points: Sequence[Point], *, x_name: str, y_name: str, alt: str) -> Drawing:
    """Points with a range, further right and further up being better."""
    width, height, left, right, top, bottom = 520, 320, 50, 20, 16, 46
    x_ticks = _ticks(min(1.0, *(p.low for p in points)), max(p.high for p in points))
    y_ticks = _ticks(min(p.y for p in points), max(p.y for p in points))

    def place_x(x: float) -> float:
        return left + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (width - left - right)

    def place_y(y: float) -> float:
        share = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return height - bottom - share * (height - top - bottom)

    parts = [open_svg(width, height)]
    for tick in x_ticks:
        x = place_x(tick)
        parts.append(_rule(x, top, x, height - bottom))
        parts.append(place_text(x, height - bottom + 17, f"{tick:g}x"))
    for tick in y_ticks:
        y = place_y(tick)
        parts.append(_rule(left, y, width - right, y))
        parts.append(place_text(left - 8, y + 4, f"{tick:g}", anchor="end"))
    parts.append(place_text((left + width - right) / 2, height - 6, x_name))
    middle = (top + height - bottom) / 2
    parts.append(_turn(12, middle, y_name))
    taken: list[tuple[float, float]] = []
    for point in points:
        x, y = place_x(point.x), place_y(point.y)
        colour = "var(--reuse)" if point.is_rival else "var(--mark)"
        parts.append(
            f'<line x1="{place_x(point.low):.1f}" y1="{y:.1f}" x2="{place_x(point.high):.1f}" '
            f'y2="{y:.1f}" stroke="{colour}" stroke-opacity=".45" stroke-width="3"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{colour}"/>'
        )
    for point in points:
        x, y = place_x(point.x), place_y(point.y)
        leans_left = x > width - 120
        label = y - 9
        # Names of near points go below one another, not on top.
        while any(abs(label - other) < 15 and abs(x - at) < 90 for at, other in taken):
            label += 15 if label > y else 31
        taken.append((x, label))
        parts.append(
            place_text(
                x + (-11 if leans_left else 11),
                label,
                point.name,
                anchor="end" if leans_left else "start",
                size=13,
                fill="var(--ink)",
            )
        )
    return Drawing("".join(parts) + "</svg>", alt)


def plot_curve(
    curve: Sequence[tuple[float, float]],
    points: Mapping[str, tuple[float, float]],
    *,
    x_name: str,
    y_name: str,
    alt: str,
) -> Drawing:
    """A line through (x, y), and named points beside it."""
    width, height, left, right, top, bottom = 520, 300, 56, 20, 16, 46
    every = [*curve, *points.values()]
    x_ticks = _ticks(min(x for x, _ in every), max(x for x, _ in every))
    y_ticks = _ticks(min(0.0, *(y for _, y in every)), max(y for _, y in every))

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across = (point[0] - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (point[1] - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return left + across * (width - left - right), height - bottom - up * (
            height - top - bottom
        )

    parts = [open_svg(width, height)]
    for tick in x_ticks:
        x, y = place((tick, y_ticks[0]))
        parts += [_rule(x, top, x, y), place_text(x, y + 17, f"{tick:g}")]
    for tick in y_ticks:
        x, y = place((x_ticks[0], tick))
        parts.append(_rule(x, y, width - right, y))
        parts.append(place_text(x - 8, y + 4, f"{tick:g}", anchor="end"))
    parts.append(place_text((left + width - right) / 2, height - 6, x_name))
    parts.append(_turn(12, (top + height - bottom) / 2, y_name))
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, curve))
    parts.append(f'<polyline points="{line}" fill="none" stroke="var(--soft)" stroke-width="1.6"/>')
    for name, point in points.items():
        x, y = place(point)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="var(--mark)"/>')
        parts.append(place_text(x + 11, y - 9, name, anchor="start", size=13, fill="var(--ink)"))
    return Drawing("".join(parts) + "</svg>", alt)


def _turn(x: float, y: float, text: str) -> str:
    """Text that runs upwards."""
    return (
        f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="middle" font-size="12.5" fill="var(--soft)" '
        f'transform="rotate(-90 {x:.0f} {y:.0f})">{escape(text)}</text>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers that reach over both ends."""
    span = max(high - low, abs(high) * 0.05, 1e-6)
    power = 10 ** math.floor(math.log10(span / 4))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if span / (power * m) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    if first == last:
        last += 1
    return [round(step * count, 10) for count in range(first, last + 1)]


def open_svg(width: float, height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        'font-family="inherit" aria-hidden="true">'
    )


def place_text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "middle",
    size: float = 12,
    fill: str = "var(--soft)",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size:g}" '
        f'fill="{fill}">{escape(text)}</text>'
    )


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
        'stroke="var(--line)" stroke-width="1"/>'
    )
