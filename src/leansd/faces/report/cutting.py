"""A cut as report sections: the UNet with what goes, error over cost, every candidate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from markupsafe import escape

from leansd.faces.report.drawings import open_svg, place_text, plot_curve
from leansd.faces.report.sections import Chart, Drawing, Listing, Prose, Section
from leansd.plans.address import get_layer
from leansd.plans.anatomy import Anatomy, Unit
from leansd.tuning.cutting import NAMES, Cut

COLOURS = {"resnet": "var(--compute)", "transformer": "var(--reuse)", "": "var(--soft)"}
LABELS = {"resnet": "ResNet", "transformer": "attention", "": "sampler"}

SIDE, GAP, STEP = 17.0, 3.0, 46.0
"""Of a unit, between units, between levels."""


def make_sections(cut: Cut, anatomy: Anatomy, facts: Mapping[str, str]) -> list[Section]:
    """The report of a cut."""
    return [
        Chart("What goes", [draw_cut(cut, anatomy)], [describe(cut)]),
        Chart(
            "Error over cost",
            [_plot(cut)],
            [
                "The line is the knapsack's front: at every cost the least sum of the errors of "
                "what goes. The point is the chosen cut, built and measured before any training.",
            ],
        ),
        Listing(
            "Everything that can go",
            cut.tabulate(),
            [
                "Error: squared error of the guided output over the output, with this removed "
                "alone. The least error for what it saves comes first.",
                "Pairs of a down and an up layer exclude others of their level, and so do a layer "
                "and the attention in it.",
            ],
        ),
        Prose(
            "How this was found",
            [
                "Full runs are drawn and the UNet's calls at evenly spread time steps kept. What "
                "can go is taken out alone, and the output of the UNet without it compared on "
                "these calls; guided, as the scheduler gets it. Errors are taken to add up "
                "(LAPTOP-Diff, arXiv 2404.11098), the knapsack is solved exactly, and neighbours "
                "of its answer are built and measured.",
                f"{facts['device']}; leansd {facts['leansd']}, torch {facts['torch']}, "
                f"diffusers {facts['diffusers']}, Python {facts['python']}; {facts['time']}.",
            ],
        ),
    ]


def describe(cut: Cut) -> str:
    """What comes of it, in a sentence."""
    return (
        f"{cut.cost:.1%} of the {NAMES[cut.of]} are left for a budget of {cut.budget:.1%}; the "
        f"output's squared error is {cut.measured_error:.2%} of the output, where the sum of what "
        f"goes is {cut.predicted_error:.2%}."
    )


def draw_cut(cut: Cut, anatomy: Anatomy) -> Drawing:
    """A UNet as it is drawn in papers: down on the left, up on the right, a level a row."""
    gone = {unit.at for unit in anatomy for each in cut.removals if each.takes(unit.at)}
    downs = [block for block in anatomy.blocks if block.startswith("dn")]
    ups = [block for block in reversed(anatomy.blocks) if block.startswith("up")]
    width = 560.0
    height = STEP * (len(downs) + 1) + 52
    parts = [open_svg(width, height)]
    for level, (down, up) in enumerate(zip(downs, ups, strict=True)):
        y = 22 + level * STEP
        left = 34 + level * 26.0
        units = list(anatomy.select(up))
        right = width - 34 - level * 26.0 - _measure(units)
        middle = y + SIDE / 2
        end = left + _measure(anatomy.select(down)) + 6
        parts.append(
            f'<line x1="{end:.0f}" y1="{middle:.0f}" x2="{right - 6:.0f}" y2="{middle:.0f}" '
            'stroke="var(--line)" stroke-dasharray="3 3"/>'
        )
        for block, x in ((down, left), (up, right)):
            parts += _draw_block(block, anatomy.select(block), x, y, gone)
    if "mid" in anatomy.blocks:
        units = list(anatomy.select("mid"))
        x = (width - _measure(units)) / 2
        parts += _draw_block("mid", units, x, 22 + len(downs) * STEP, gone)
    x, y = 34.0, height - 14
    for kind, label in LABELS.items():
        parts.append(_draw_square(x, y - 9, 11, kind, is_gone=False))
        parts.append(place_text(x + 16, y, label, anchor="start", size=10))
        x += 32 + 6 * len(label)
    parts.append(_draw_square(x, y - 9, 11, "resnet", is_gone=True))
    parts.append(place_text(x + 16, y, "goes", anchor="start", size=10))
    names = ", ".join(each.name for each in cut.removals) or "nothing"
    thinned = [each.name for each in cut.removals if any(".t" in at for at in each.addresses)]
    caption = "Transformer blocks that go: " + ", ".join(thinned) if thinned else ""
    return Drawing("".join(parts) + "</svg>", f"Of the UNet goes: {names}.", caption)


def _draw_block(
    block: str, units: Sequence[Unit], x: float, y: float, gone: set[str]
) -> Iterator[str]:
    yield place_text(x + _measure(units) / 2, y - 5, block, size=10.5)
    layer = get_layer(units[0].at)
    for unit in units:
        if get_layer(unit.at) != layer:
            layer, x = get_layer(unit.at), x + GAP
        kind = unit.kind if unit.kind in COLOURS else ""
        yield _draw_square(x, y, SIDE, kind, is_gone=unit.at in gone, title=unit.at)
        x += SIDE + 1


def _measure(units: Sequence[Unit]) -> float:
    layers = len({get_layer(unit.at) for unit in units})
    return len(units) * (SIDE + 1) + (layers - 1) * GAP


def _draw_square(
    x: float, y: float, side: float, kind: str, *, is_gone: bool, title: str = ""
) -> str:
    colour = COLOURS[kind]
    look = (
        f'fill="none" stroke="{colour}" stroke-dasharray="2.5 2"'
        if is_gone
        else f'fill="{colour}" stroke="{colour}"'
    )
    says = f"<title>{escape(title)}{' goes' if is_gone else ''}</title>" if title else ""
    cross = (
        f'<path d="M{x + 4:.1f} {y + 4:.1f}l{side - 8:.1f} {side - 8:.1f}m0 {8 - side:.1f}'
        f'l{8 - side:.1f} {side - 8:.1f}" stroke="{colour}" stroke-width="1.4"/>'
        if is_gone and side > 12
        else ""
    )
    return (
        f'<g>{says}<rect x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}" rx="2.5" '
        f"{look}/>{cross}</g>"
    )


def _plot(cut: Cut) -> Drawing:
    alt = (
        f"From {cut.front[0][1]:.3f} at {cut.front[0][0]:.0%} of the cost to "
        f"{cut.front[-1][1]:.3f} at {cut.front[-1][0]:.0%}; the cut: {cut.measured_error:.3f} at "
        f"{cut.cost:.0%}."
    )
    return plot_curve(
        [(100 * cost, error) for cost, error in cut.front],
        {cut.surgery.name: (100 * cut.cost, cut.measured_error)},
        x_name=f"{NAMES[cut.of]} left, %",
        y_name="squared error over the output",
        alt=alt,
    )
