"""Drawings by unit: plans, heat maps by step, bars."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from leansd.plans.address import get_block
from leansd.plans.anatomy import Anatomy
from leansd.plans.drawing import list_states
from leansd.plans.plan import Plan
from leansd.report.figures import (
    TEXT,
    Cell,
    add_colours,
    fill_cells,
    name_axes,
    open_axes,
    open_figure,
)
from leansd.report.palette import LIGHT
from leansd.report.sections import Drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    "elsewhere": "another net runs",
}
WIDTH = 400.0
"""Of drawings, in points: what a phone shows without scrolling."""
LEVELS = 12
"""Strengths of a heat map's colour."""


@dataclass(frozen=True)
class Bar:
    """A named row of bars, one for each of a chart's `names`, with a remark behind them."""

    name: str
    lengths: tuple[float, ...]
    remark: str = ""


def draw_plan(plan: Plan, anatomy: Anatomy, caption: str = "", *, name: str = "plan") -> Drawing:
    """A plan as a grid: a line a unit, a column a step."""
    states = list_states(plan, anatomy)
    figure = open_figure(WIDTH, len(states) * 6.6 + 62)
    axes = open_axes(figure, left=52, right=6, top=4, bottom=58)
    axes.set(xlim=(0, plan.steps), ylim=(len(states), 0))
    used = [state for state in STATES if any(state in marks for marks in states.values())]
    for state in used:
        fill_cells(axes, _list_runs(states, state), LIGHT[state])
    _mark_steps(axes, plan.steps)
    blocks = [(block, len(list(rows))) for block, rows in groupby(states, key=get_block)]
    _mark_rows(axes, blocks)
    add_colours(axes, {STATES[state]: LIGHT[state] for state in used}, y=34, columns=4)
    keys = ", ".join(map(str, plan.keys))
    alt = (
        f"Plan {plan.name}: {len(plan.keys)} of {plan.steps} steps run the whole UNet, steps {keys}"
    )
    return Drawing(name, figure, f"{alt}.", caption)


def _list_runs(states: Mapping[str, Sequence[str]], state: str) -> list[Cell]:
    """Neighbouring steps in one state as one cell."""
    cells: list[Cell] = []
    for row, marks in enumerate(states.values()):
        begin = 0
        for each, run in groupby(marks):
            length = len(list(run))
            if each == state:
                cells.append((row, begin, length))
            begin += length
    return cells


def draw_heat(
    rows: Mapping[str, Mapping[int, float]], caption: str, *, name: str, unit: str = ""
) -> Drawing:
    """A heat map: a line a name, a column a step, stronger for more, on a logarithmic scale."""
    steps = 1 + max((step for row in rows.values() for step in row), default=0)
    values = [value for row in rows.values() for value in row.values() if value > 0]
    low, high = (min(values), max(values)) if values else (1.0, 1.0)
    line = 7.4 if len(rows) > 8 else 13.0
    figure = open_figure(WIDTH, len(rows) * line + 62)
    axes = open_axes(figure, left=74, right=6, top=4, bottom=58)
    axes.set(xlim=(0, steps), ylim=(max(1, len(rows)), 0))
    levels: dict[int, list[Cell]] = {}
    for place, row in enumerate(rows.values()):
        for step, value in row.items():
            levels.setdefault(_find_level(value, low, high), []).append((place, step, 1.0))
    for level, cells in sorted(levels.items()):
        fill_cells(axes, cells, LIGHT["mark"], thick=0.94, gap=0, strength=level / LEVELS)
    _mark_steps(axes, steps)
    axes.set_yticks([place + 0.5 for place in range(len(rows))], list(rows))
    axes.tick_params(axis="y", labelsize=min(TEXT - 0.5, line - 0.6))
    _add_scale(axes, low, high, unit)
    most = max(rows, key=lambda each: max(rows[each].values(), default=0.0), default="")
    alt = f"{caption}: from {low:.2g} to {high:.2g}{unit}, most at {most}."
    return Drawing(name, figure, alt, caption)


def _find_level(value: float, low: float, high: float) -> int:
    """1 for the least, `LEVELS` for the most."""
    if not 0 < low < high or value <= 0:
        return 1
    share = math.log(value / low) / math.log(high / low)
    return 1 + round(share * (LEVELS - 1))


def _add_scale(axes: Axes, low: float, high: float, unit: str) -> None:
    """All strengths below the axes, between the least and the most."""
    box = axes.get_window_extent()
    place = (60 / box.width, -46 / box.height, 120 / box.width, 9 / box.height)
    scale = axes.inset_axes(place)
    scale.set_axis_off()
    scale.set(xlim=(0, LEVELS), ylim=(1, 0))
    for level in range(LEVELS):
        fill_cells(
            scale, [(0, level, 1)], LIGHT["mark"], thick=1, gap=0, strength=(level + 1) / LEVELS
        )
    for x, align, value in ((-0.5, "right", low), (LEVELS + 0.5, "left", high)):
        scale.text(
            x,
            0.5,
            f"{value:.2g}{unit}",
            ha=align,
            va="center",
            size=TEXT - 0.5,
            color=LIGHT["soft"],
        )


def _mark_steps(axes: Axes, steps: int) -> None:
    every = next(count for count in (1, 2, 5, 10, 25, 50, 100, 250) if steps / count <= 12)
    marked = range(0, steps, every)
    axes.set_xticks([step + 0.5 for step in marked], list(map(str, marked)))
    name_axes(axes, "step of the sampler")


def _mark_rows(axes: Axes, groups: Sequence[tuple[str, int]]) -> None:
    """A name in the middle of as many rows as it has."""
    places: list[float] = []
    row = 0
    for _, count in groups:
        places.append(row + count / 2)
        row += count
    axes.set_yticks(places, [name for name, _ in groups])


def draw_bars(
    bars: Sequence[Bar], *, names: Sequence[str], alt: str, name: str = "bars", caption: str = ""
) -> Drawing:
    """Rows of bars to one scale, with the remark behind each."""
    colours = [LIGHT[each] for each in ("compute", "reuse", "forecast")]
    count = len(names)
    line = 5.0 * count + 6
    figure = open_figure(WIDTH, len(bars) * line + 30)
    axes = open_axes(figure, left=82, right=84, top=4, bottom=24)
    longest = max((length for bar in bars for length in bar.lengths), default=1.0) or 1.0
    axes.set(xlim=(0, longest), ylim=(max(1, len(bars)), 0))
    thick = 0.84 / count
    for place, colour in enumerate(colours[:count]):
        cells = [(row + place * thick, 0.0, bar.lengths[place]) for row, bar in enumerate(bars)]
        fill_cells(axes, cells, colour, thick=thick * 0.94, gap=0)
    axes.set_xticks([])
    axes.set_yticks([row + 0.42 for row in range(len(bars))], [bar.name for bar in bars])
    for row, bar in enumerate(bars):
        axes.annotate(
            bar.remark,
            (max(bar.lengths), row + 0.42),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=TEXT - 0.5,
            color=LIGHT["soft"],
        )
    add_colours(axes, dict(zip(names, colours, strict=False)), y=10, columns=count)
    return Drawing(name, figure, alt, caption)
