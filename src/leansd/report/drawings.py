"""Drawings by unit: plans, heat maps by step, bars, a UNet as a U."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from leansd.plans.address import get_layer
from leansd.plans.anatomy import Anatomy, Unit
from leansd.plans.grid import Cell, add_colours, draw_picture, fill_cells
from leansd.plans.plan import Plan
from leansd.report.figures import LIGHT, TEXT, name_axes, open_axes, open_figure
from leansd.report.page import Drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 400.0
"""Width of drawings, in points: what a phone shows without scrolling."""
LEVELS = 12
"""Strengths of a heat map's colour."""
KINDS = {"resnet": "compute", "transformer": "reuse", "": "soft"}
"""Colours of ResNets, attentions and everything else."""


# -- a row a unit, a column a step ---------------------------------------------------------------


def draw_plan(plan: Plan, anatomy: Anatomy, caption: str = "", *, name: str = "plan") -> Drawing:
    """A plan as a grid: a line a unit, a column a step."""
    keys = ", ".join(map(str, plan.keys))
    told = f"{len(plan.keys)} of {plan.steps} steps run the whole UNet, steps {keys}."
    return Drawing(name, draw_picture(plan, anatomy), f"Plan {plan.name}: {told}", caption)


def draw_heat(rows: Mapping[str, Mapping[int, float]], caption: str, *, name: str) -> Drawing:
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
    _add_scale(axes, low, high)
    most = max(rows, key=lambda each: max(rows[each].values(), default=0.0), default="")
    alt = f"{caption}: from {low:.2g} to {high:.2g}, most at {most}."
    return Drawing(name, figure, alt, caption)


def _find_level(value: float, low: float, high: float) -> int:
    """1 for the least, `LEVELS` for the most."""
    if not 0 < low < high or value <= 0:
        return 1
    share = math.log(value / low) / math.log(high / low)
    return 1 + round(share * (LEVELS - 1))


def _add_scale(axes: Axes, low: float, high: float) -> None:
    """All strengths below the axes, between the least and the most."""
    box = axes.get_window_extent()
    place = (60 / box.width, -46 / box.height, 120 / box.width, 9 / box.height)
    scale = axes.inset_axes(place)
    scale.set_axis_off()
    scale.set(xlim=(0, LEVELS), ylim=(1, 0))
    for level in range(LEVELS):
        strength = (level + 1) / LEVELS
        fill_cells(scale, [(0, level, 1)], LIGHT["mark"], thick=1, gap=0, strength=strength)
    for x, align, value in ((-0.5, "right", low), (LEVELS + 0.5, "left", high)):
        scale.text(
            x, 0.5, f"{value:.2g}", ha=align, va="center", size=TEXT - 0.5, color=LIGHT["soft"]
        )


def _mark_steps(axes: Axes, steps: int) -> None:
    every = next(count for count in (1, 2, 5, 10, 25, 50, 100, 250) if steps / count <= 12)
    marked = range(0, steps, every)
    axes.set_xticks([step + 0.5 for step in marked], list(map(str, marked)))
    name_axes(axes, "step of the sampler")


# -- bars ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A named row of bars, one for each of a chart's `names`, with a remark behind them."""

    name: str
    lengths: tuple[float, ...]
    remark: str = ""


def draw_bars(
    bars: Sequence[Bar],
    *,
    names: Sequence[str],
    name: str = "bars",
    alt: str = "",
    caption: str = "",
) -> Drawing:
    """Rows of bars to one scale, with the remark behind each.

    Args:
        alt: what it shows; by default the remarks of all rows.
    """
    colours = [LIGHT[each] for each in ("compute", "reuse", "forecast")]
    line = 5.0 * len(names) + 6
    figure = open_figure(WIDTH, len(bars) * line + 30)
    axes = open_axes(figure, left=82, right=84, top=4, bottom=24)
    longest = max((length for bar in bars for length in bar.lengths), default=1.0) or 1.0
    axes.set(xlim=(0, longest), ylim=(max(1, len(bars)), 0))
    thick = 0.84 / len(names)
    for place, colour in enumerate(colours[: len(names)]):
        cells = [(row + place * thick, 0.0, bar.lengths[place]) for row, bar in enumerate(bars)]
        fill_cells(axes, cells, colour, thick=thick * 0.94, gap=0)
    axes.set_xticks([])
    axes.set_yticks([row + 0.42 for row in range(len(bars))], [bar.name for bar in bars])
    for row, bar in enumerate(bars):
        axes.annotate(
            bar.remark, (max(bar.lengths), row + 0.42), xytext=(5, 0), va="center",
            textcoords="offset points", fontsize=TEXT - 0.5, color=LIGHT["soft"],
        )  # fmt: skip
    add_colours(axes, dict(zip(names, colours, strict=False)), y=10, columns=len(names))
    alt = alt or "; ".join(f"{bar.name}: {bar.remark}" for bar in bars) + "."
    return Drawing(name, figure, alt, caption)


# -- a UNet as a U -------------------------------------------------------------------------------

SIDE, GAP, STEP = 17.0, 3.0, 46.0
"""Points of a unit, between layers, between levels."""
INDENT = 22.0
"""Points of each level."""


def draw_shape(
    anatomy: Anatomy,
    *,
    gone: Collection[str] = (),
    replaced: Collection[str] = (),
    alt: str,
    caption: str = "",
    name: str = "shape",
) -> Drawing:
    """Down on the left, up on the right, a level a row; units that go are outlined and crossed.

    Args:
        gone: addresses of units.
        replaced: addresses of units in whose place, or within which, something else stands.
    """
    blocks = {block: anatomy.select(block) for block in anatomy.blocks}
    downs = [block for block in blocks if block.startswith("dn")]
    ups = [block for block in reversed(blocks) if block.startswith("up")]
    levels = list(enumerate(zip(downs, ups, strict=False)))
    long = {block: _measure(units) for block, units in blocks.items()}
    needed = [long[down] + long[up] + 2 * INDENT * level + 60 for level, (down, up) in levels]
    width, height = max(400.0, *needed), STEP * (len(downs) + 1) + 40
    figure = open_figure(width, height)
    axes = open_axes(figure, left=0, right=0, top=0, bottom=0)
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    places: dict[str, tuple[float, float]] = {}
    for level, (down, up) in levels:
        y = 20 + level * STEP
        left, right = 10 + level * INDENT, width - 10 - level * INDENT - long[up]
        ends, middle = (left + long[down] + 6, right - 6), y + SIDE / 2
        axes.plot(ends, (middle, middle), color=LIGHT["soft"], lw=0.9, ls=(0, (2, 3)))
        places |= {down: (left, y), up: (right, y)}
    if "mid" in blocks:
        places["mid"] = (width - long["mid"]) / 2, 20 + len(downs) * STEP
    for block, (x, y) in places.items():
        _write(axes, x + long[block] / 2, y - 5, block, align="center")
        layer = get_layer(blocks[block][0].at)
        for unit in blocks[block]:
            if get_layer(unit.at) != layer:
                layer, x = get_layer(unit.at), x + GAP
            _draw_unit(axes, x, y, unit.kind, unit.at in gone, unit.at in replaced)
            x += SIDE + 1
    _draw_key(axes, height - 16, bool(gone), bool(replaced))
    return Drawing(name, figure, alt, caption)


def _draw_key(axes: Axes, y: float, has_gone: bool, has_replaced: bool) -> None:
    labels = {"ResNet": "resnet", "attention": "transformer", "sampler": ""}
    rows = [(label, kind, False, False) for label, kind in labels.items()]
    rows += [("goes", "resnet", True, False)] if has_gone else []
    rows += [("replaced", "resnet", False, True)] if has_replaced else []
    x = 10.0
    for label, kind, is_gone, is_replaced in rows:
        _draw_unit(axes, x, y - 4, kind, is_gone, is_replaced, side=12)
        _write(axes, x + 17, y + 5.5, label)
        x += 34 + 5.4 * len(label)


def _draw_unit(
    axes: Axes,
    x: float,
    y: float,
    kind: str,
    is_gone: bool,
    is_replaced: bool,
    *,
    side: float = SIDE,
) -> None:
    from matplotlib.patches import Rectangle

    colour = LIGHT[KINDS.get(kind, "soft")]
    face, style = ("none", (0, (2, 1.6))) if is_gone else (colour, "-")
    axes.add_patch(Rectangle((x, y), side, side, fc=face, ec=colour, lw=1, ls=style))
    if is_gone:
        for ends in ((y + 4, y + side - 4), (y + side - 4, y + 4)):
            axes.plot((x + 4, x + side - 4), ends, color=colour, lw=1.2)
    if is_replaced:
        axes.plot([x + side / 2], [y + side / 2], "D", color=LIGHT["card"], ms=side / 3)


def _write(axes: Axes, x: float, y: float, text: str, *, align: str = "left") -> None:
    axes.text(x, y, text, ha=align, va="baseline", fontsize=TEXT, color=LIGHT["soft"])


def _measure(units: Sequence[Unit] | Anatomy) -> float:
    places = [unit.at for unit in units]
    layers = len({get_layer(at) for at in places})
    return len(places) * (SIDE + 1) + (layers - 1) * GAP
