"""Plots: speed against fidelity, fronts of families, curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from leansd.evaluation.pareto import find_front
from leansd.plans.grid import add_key
from leansd.report.figures import LIGHT, TEXT, list_series, name_axes, open_axes, open_figure
from leansd.report.page import Drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 400.0, 270.0
MOST = 300
"""Points of a curve; more are averaged."""
FAST = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 15, 20)
"""Speed-ups that an axis names."""


@dataclass(frozen=True)
class PlotPoint:
    """A named place in a plot."""

    name: str
    x: float
    y: float
    span: tuple[float, float] | None = None
    """The range of `x`, where there is one."""
    is_rival: bool = False

    @property
    def ends(self) -> tuple[float, float]:
        """The range of `x`; without one `x` itself twice."""
        return self.span or (self.x, self.x)


@dataclass(frozen=True)
class Family:
    """Points `(x, y)` of one kind."""

    name: str
    points: Sequence[tuple[float, float]]
    is_ours: bool = False


@dataclass(frozen=True)
class Curve:
    """A line through `(x, y)`, in parts with gaps between them; the main one is drawn in ink."""

    name: str
    parts: Sequence[Sequence[tuple[float, float]]]
    is_main: bool = False


def plot_tradeoff(
    points: Sequence[PlotPoint],
    *,
    x_name: str,
    y_name: str = "PSNR to the full run, dB",
    name: str = "front",
    caption: str = "",
) -> Drawing:
    """Named points with a range, further right and further up being better."""
    figure = open_figure(WIDTH, HEIGHT)
    axes = open_axes(figure, left=46, right=14, top=10, bottom=38, rules="both")
    name_axes(axes, x_name, y_name)
    _set_range(axes, [end for p in points for end in p.ends], [p.y for p in points])
    for is_rival, colour, shape in ((True, "reuse", "D"), (False, "mark", "o")):
        own = [point for point in points if point.is_rival == is_rival]
        for point in own:
            axes.plot(point.ends, (point.y, point.y), color=LIGHT[colour], alpha=0.4, lw=2.5)
        axes.plot([p.x for p in own], [p.y for p in own], shape, color=LIGHT[colour], ms=6.5)
    axes.xaxis.set_major_formatter("{x:g}x")
    _label_points(axes, [(point.name, point.x, point.y) for point in points if point.name])
    told = "; ".join(f"{p.name}: {p.x:.2f} times faster, {p.y:.1f} dB" for p in points if p.name)
    return Drawing(name, figure, f"{y_name} over {x_name}. {told}", caption)


def plot_families(
    families: Sequence[Family], *, x_name: str, y_name: str, name: str, caption: str = ""
) -> Drawing:
    """Speed against fidelity, a line a family, ours drawn strongest; better is up and right."""
    rows = math.ceil(len(families) / 3)
    figure = open_figure(WIDTH, HEIGHT + 14 * rows)
    axes = open_axes(figure, left=46, right=14, top=10, bottom=44 + 14 * rows, rules="both")
    name_axes(axes, x_name, y_name)
    axes.set_xscale("log")
    # Ours is mark and dot; rivals have what is left.
    looks = (look for look in list_series() if look[0] != LIGHT["series-1"])
    for family in sorted(families, key=lambda each: each.is_ours):
        colour, shape = (LIGHT["mark"], "o") if family.is_ours else next(looks)
        front = find_front(family.points, rate=lambda point: point)
        axes.plot(*_split(front), color=colour, lw=2.2 if family.is_ours else 1.1)
        axes.plot(
            *_split(family.points), shape, color=colour, ms=6 if family.is_ours else 4.5,
            label=family.name,
        )  # fmt: skip
    speeds = [x for family in families for x, _ in family.points]
    low, high = min([1.0, *speeds]), max([1.5, *speeds])
    axes.set_xlim(low * 0.97, high * 1.05)
    ticks = [tick for tick in FAST if low <= tick <= high * 1.05]
    while len(ticks) > 7:
        ticks = ticks[::2]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    add_key(axes, y=42, columns=3, handlelength=1.4, labelcolor=LIGHT["ink"])
    best = "; ".join(
        f"{each.name}: {max(y for _, y in each.points):.1f} at most" for each in families
    )
    return Drawing(name, figure, f"{y_name} over {x_name}. {best}.", caption)


def plot_curves(
    curves: Sequence[Curve],
    *,
    x_name: str,
    y_name: str,
    name: str,
    caption: str = "",
    points: Mapping[str, tuple[float, float]] | None = None,
    borders: Mapping[str, float] | None = None,
    is_log: bool = False,
) -> Drawing:
    """Lines over one axis.

    Args:
        points: named places beside the lines.
        borders: where along the axis something named begins: the stages of a training.
        is_log: whether `y` is drawn by its logarithm.
    """
    rows = math.ceil(len(curves) / 3) if len(curves) > 1 else 0
    figure = open_figure(WIDTH, HEIGHT - 30 + 14 * rows)
    axes = open_axes(figure, left=58, right=14, top=20, bottom=44 + 14 * rows, rules="both")
    name_axes(axes, x_name, y_name)
    if is_log:
        axes.set_yscale("log")
    series = list_series()
    for curve in curves:
        colour = LIGHT["ink"] if curve.is_main or len(curves) == 1 else next(series)[0]
        for place, part in enumerate(curve.parts):
            seen = [(x, y) for x, y in part if math.isfinite(y) and (y > 0 or not is_log)]
            axes.plot(
                *_split(average_points(seen, MOST)), color=colour, lw=1.9 if curve.is_main else 1.3,
                marker="o" if len(seen) == 1 else "", ms=3.5, zorder=3 if curve.is_main else 2,
                label="" if place else curve.name,
            )  # fmt: skip
    for place in points or {}:
        axes.plot(*[[each] for each in (points or {})[place]], "o", color=LIGHT["mark"], ms=6.5)
    axes.margins(x=0.02)
    _mark_values(axes, is_log=is_log)
    _mark_borders(axes, borders or {})
    if points:
        _label_points(axes, [(place, *xy) for place, xy in points.items()])
    if rows:
        add_key(axes, y=42, columns=3, handlelength=1.4, labelcolor=LIGHT["ink"])
    return Drawing(name, figure, _describe(curves, x_name, y_name, points or {}), caption)


def average_points(
    points: Sequence[tuple[float, float]], most: int
) -> Sequence[tuple[float, float]]:
    """At most so many points: means of neighbours where there are more."""
    width = math.ceil(len(points) / most)
    if width <= 1:
        return points
    groups = [points[begin : begin + width] for begin in range(0, len(points), width)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _describe(
    curves: Sequence[Curve], x_name: str, y_name: str, points: Mapping[str, tuple[float, float]]
) -> str:
    told = [
        f"{curve.name} from {curve.parts[0][0][1]:.3g} to {curve.parts[-1][-1][1]:.3g}"
        for curve in curves
        if curve.parts and curve.parts[0] and curve.parts[-1]
    ]
    told += [f"{place}: {y:.3g} at {x:.3g}" for place, (x, y) in points.items()]
    return f"{y_name} over {x_name}. {'; '.join(told)}."


def _split(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    pairs = list(points)
    return [x for x, _ in pairs], [y for _, y in pairs]


def _set_range(axes: Axes, xs: Sequence[float], ys: Sequence[float]) -> None:
    """A little more than what is shown, with room for names above."""
    low, high = min([1.0, *xs]), max(xs, default=1.0)
    room = max(high - low, 0.1)
    axes.set_xlim(low - 0.03 * room, high + 0.05 * room)
    low, high = min(ys, default=0.0), max(ys, default=1.0)
    room = max(high - low, abs(high) * 0.05, 1e-6)
    axes.set_ylim(low - 0.08 * room, high + 0.14 * room)


def _label_points(axes: Axes, named: Sequence[tuple[str, float, float]]) -> None:
    """Names beside their points, where no other name is: right of it, left, or further down."""
    from matplotlib.transforms import Bbox

    box = axes.get_window_extent()
    places: Any = axes.transData.transform([(x, y) for _, x, y in named]) if named else []
    taken: list[Bbox] = []
    for (name, x, y), (at, up) in zip(named, places, strict=True):
        length, tall = 0.56 * TEXT * len(name), TEXT + 2
        is_left = at + 9 + length > box.x1
        begin = at - 9 - length if is_left else at + 9
        offsets = [5, -tall - 2, *(step * tall for step in (1.6, -2.4, 2.7, -3.5, 3.8, -4.6))]
        boxes = {each: Bbox.from_bounds(begin, up + each, length, tall) for each in offsets}
        free = next(
            (
                offset
                for offset, own in boxes.items()
                if box.y0 <= up + offset <= box.y1 and not any(map(own.fully_overlaps, taken))
            ),
            5,
        )
        taken.append(boxes[free])
        axes.annotate(
            name, (x, y), xytext=(-9 if is_left else 9, free), textcoords="offset points",
            ha="right" if is_left else "left", va="bottom", fontsize=TEXT, color=LIGHT["ink"],
        )  # fmt: skip


def _mark_borders(axes: Axes, borders: Mapping[str, float]) -> None:
    for name, x in borders.items():
        axes.axvline(x, color=LIGHT["soft"], lw=0.8, ls=(0, (2, 2)), zorder=1)
        axes.annotate(
            name, (x, 1), xycoords=("data", "axes fraction"), xytext=(2, 4),
            textcoords="offset points", fontsize=TEXT - 0.5, color=LIGHT["soft"],
        )  # fmt: skip


def _mark_values(axes: Axes, *, is_log: bool) -> None:
    """Short numbers at the left, 1, 2 and 5 of every power of ten where it is a logarithm's."""
    from matplotlib.ticker import LogLocator, NullLocator

    if is_log:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:.3g}")
