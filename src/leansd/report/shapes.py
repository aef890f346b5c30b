"""A UNet as it is drawn in papers, with what goes and what stands in another's place."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from leansd.plans.address import get_layer
from leansd.plans.anatomy import Anatomy, Unit
from leansd.report.figures import TEXT, open_axes, open_figure
from leansd.report.palette import LIGHT
from leansd.report.sections import Drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"resnet": "compute", "transformer": "reuse", "": "soft"}
LABELS = {"resnet": "ResNet", "transformer": "attention", "": "sampler"}
SIDE, GAP, STEP = 17.0, 3.0, 46.0
"""Of a unit, between layers, between levels; in points."""
INDENT = 22.0
"""Of each level."""


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
    downs = [block for block in anatomy.blocks if block.startswith("dn")]
    ups = [block for block in reversed(anatomy.blocks) if block.startswith("up")]
    widths = [
        _measure(anatomy.select(down)) + _measure(anatomy.select(up)) + 2 * INDENT * level
        for level, (down, up) in enumerate(zip(downs, ups, strict=False))
    ]
    width = max(400.0, *(each + 60 for each in widths))
    height = STEP * (len(downs) + 1) + 40
    figure = open_figure(width, height)
    axes = open_axes(figure, left=0, right=0, top=0, bottom=0)
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    for level, (down, up) in enumerate(zip(downs, ups, strict=False)):
        y = 20 + level * STEP
        left = 10 + level * INDENT
        right = width - 10 - level * INDENT - _measure(anatomy.select(up))
        ends = left + _measure(anatomy.select(down)) + 6, right - 6
        middle = y + SIDE / 2
        axes.plot(ends, (middle, middle), color=LIGHT["soft"], lw=0.9, ls=(0, (2, 3)))
        for block, x in ((down, left), (up, right)):
            _draw_block(axes, block, anatomy.select(block), x, y, gone, replaced)
    if "mid" in anatomy.blocks:
        units = anatomy.select("mid")
        x = (width - _measure(units)) / 2
        _draw_block(axes, "mid", units, x, 20 + len(downs) * STEP, gone, replaced)
    _draw_key(axes, height - 16, bool(gone), bool(replaced))
    return Drawing(name, figure, alt, caption)


def _draw_block(
    axes: Axes,
    block: str,
    units: Sequence[Unit],
    x: float,
    y: float,
    gone: Collection[str],
    replaced: Collection[str],
) -> None:
    _write(axes, x + _measure(units) / 2, y - 5, block, align="center")
    layer = get_layer(units[0].at)
    for unit in units:
        if get_layer(unit.at) != layer:
            layer, x = get_layer(unit.at), x + GAP
        _draw_unit(axes, x, y, unit.kind, unit.at in gone, unit.at in replaced)
        x += SIDE + 1


def _draw_key(axes: Axes, y: float, has_gone: bool, has_replaced: bool) -> None:
    rows = [(label, kind, False, False) for kind, label in LABELS.items()]
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

    colour = LIGHT[COLOURS.get(kind, "soft")]
    face = "none" if is_gone else colour
    style = (0, (2, 1.6)) if is_gone else "-"
    square = Rectangle((x, y), side, side, fc=face, ec=colour, lw=1, ls=style)
    axes.add_patch(square)
    if is_gone:
        for ends in ((y + 4, y + side - 4), (y + side - 4, y + 4)):
            axes.plot((x + 4, x + side - 4), ends, color=colour, lw=1.2)
    if is_replaced:
        middle = x + side / 2, y + side / 2
        axes.plot(*([each] for each in middle), "D", color=LIGHT["card"], ms=side / 3)


def _write(axes: Axes, x: float, y: float, text: str, *, align: str = "left") -> None:
    axes.text(x, y, text, ha=align, va="baseline", fontsize=TEXT, color=LIGHT["soft"])


def _measure(units: Sequence[Unit] | Anatomy) -> float:
    places = [unit.at for unit in units]
    layers = len({get_layer(at) for at in places})
    return len(places) * (SIDE + 1) + (layers - 1) * GAP
