"""Where a UNet keeps its weights and spends its work, as figures and as a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from leansd.evaluation.records import Record
from leansd.faces.redundancy import Spent, tabulate_spent
from leansd.files import write_file
from leansd.plans.address import get_block
from leansd.report.figures import (
    TEXT,
    add_key,
    encode_png,
    encode_svg,
    name_axes,
    open_axes,
    open_figure,
)
from leansd.report.palette import LIGHT
from leansd.report.sections import (
    Chart,
    Drawing,
    Listing,
    Origin,
    Prose,
    Report,
    attach_records,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = {"resnet": "compute", "transformer": "reuse", "": "soft"}
"""Colours of ResNets, attentions and everything else."""
LABELS = {"resnet": "ResNet", "transformer": "attention", "": "sampler, ends"}


def make_report(spent: Spent, records: Sequence[Record], origin: Origin) -> Report:
    """Both figures, every number, and how it was measured."""
    what = "Latency" if spent.seconds else "Multiply-accumulates"
    told = headline(spent)
    return Report(
        title=f"Where {spent.subject} keeps its weights and spends its work",
        summary=told,
        measured=f"parameters and computation{', and time,' if spent.seconds else ''} of the units "
        f"of {spent.subject}'s UNet",
        sections=[
            Chart(
                "Parameters and computation by block",
                [Drawing("blocks", draw_blocks([spent]), told)],
                [
                    "Attention's matrix products are in it; published counts often leave them out.",
                    "What costs much and holds little is where thinning pays.",
                ],
            ),
            Chart(f"{what} and parameters by unit", [Drawing("units", draw_units([spent]), told)]),
            Listing("Every block and unit", tabulate_spent(spent)),
            Prose("How this was measured", [_describe(spent)]),
        ],
        origin=origin,
        attachments=[attach_records(records)],
    )


def write_figures(folder: Path, models: Sequence[Spent]) -> list[Path]:
    """The two figures of several UNets as PNG and SVG: `blocks` and `units`."""
    written: list[Path] = []
    for name, figure in {"blocks": draw_blocks(models), "units": draw_units(models)}.items():
        written.append(write_file(folder / f"{name}.png", encode_png(figure)))
        written.append(write_file(folder / f"{name}.svg", encode_svg(figure)))
    return written


def headline(spent: Spent) -> str:
    """The redundancy in a sentence: what the outermost blocks hold and what they take."""
    first, last = spent.blocks[0], spent.blocks[-1]
    shares = {
        metric: sum(spent.share(metric, block) for block in (first, last))
        for metric in ("params", "macs")
    }
    text = (
        f"The outermost blocks {first} and {last} hold {shares['params']:.1%} of the weights and "
        f"do {shares['macs']:.1%} of the work"
    )
    if spent.seconds:
        inside = sum(
            seconds for at, seconds in spent.seconds.items() if get_block(at) in (first, last)
        )
        text += f", in {inside / spent.whole['call_time']:.1%} of the time"
    return f"{text}."


def _describe(spent: Spent) -> str:
    fields = spent.fields
    size = f"{fields['latent_width']} x {fields['latent_height']}"
    text = f"{size} latents, {fields['tokens']} text tokens; MACs are of one sample."
    if not spent.seconds:
        return text
    return (
        f"{text} Times are medians of whole UNet calls on {fields['batch']} samples of random "
        "inputs, every unit timed where it runs, after one call to warm up."
    )


# -- figures -----------------------------------------------------------------------------------


def draw_blocks(models: Sequence[Spent]) -> Figure:
    """Parameters and computation by block: shares of the whole UNet, a panel a model."""
    wide = 400.0
    figure = open_figure(wide * len(models), 246)
    for place, spent in enumerate(models):
        axes = open_axes(
            figure, left=42 + wide * place, right=8 + wide * (len(models) - 1 - place), top=42,
            bottom=24, rules="y",
        )  # fmt: skip
        for offset, metric, colour, label in (
            (-0.2, "params", "series-8", f"parameters, {spent.whole['unet_params'] / 1e6:.1f} M"),
            (+0.2, "macs", "compute", f"computation, {spent.whole['unet_macs'] / 1e9:.1f} GMAC"),
        ):
            shares = [100 * spent.share(metric, block) for block in spent.blocks]
            places = [each + offset for each in range(len(shares))]
            bars = axes.bar(places, shares, 0.38, color=LIGHT[colour], label=label)
            axes.bar_label(bars, fmt="%.0f", fontsize=TEXT - 1.5, padding=1, color=LIGHT["ink"])
        axes.set_xticks(range(len(spent.blocks)), spent.blocks)
        name_axes(axes, y="share of the UNet, %")
        _finish(axes, _name(spent))
        _explain(axes, columns=2)
    return figure


def draw_units(models: Sequence[Spent]) -> Figure:
    """Latency and parameters by unit, two panels a model; MACs where a model was not timed."""
    tall = 310.0
    figure = open_figure(740, tall * len(models))
    for place, spent in enumerate(models):
        above, below = tall * place, tall * (len(models) - 1 - place)
        top = open_axes(figure, left=48, right=8, top=above + 42, bottom=below + 174, rules="y")
        bottom = open_axes(figure, left=48, right=8, top=above + 150, bottom=below + 66, rules="y")
        if spent.seconds:
            work = {at: seconds * 1000 for at, seconds in spent.seconds.items()}
            samples = spent.fields["batch"]
            title = f"{_name(spent)}, {samples} samples a call, {spent.fields['device']}"
            _draw_row(top, spent, work, "latency, ms")
        else:
            work = {at: macs / 1e9 for at, macs in spent.macs.items()}
            title = _name(spent)
            _draw_row(top, spent, work, "GMAC")
        top.tick_params(labelbottom=False)
        _finish(top, title)
        _explain(top, columns=len(KINDS))
        millions = {at: params / 1e6 for at, params in spent.params.items()}
        _draw_row(bottom, spent, millions, "parameters, M")
    return figure


def _draw_row(axes: Axes, spent: Spent, values: Mapping[str, float], what: str) -> None:
    addresses = list(spent.kinds)
    for kind, colour in KINDS.items():
        own = [
            place
            for place, at in enumerate(addresses)
            if (spent.kinds[at] if spent.kinds[at] in KINDS else "") == kind
        ]
        heights = [values[addresses[place]] for place in own]
        axes.bar(own, heights, 0.78, color=LIGHT[colour], label=LABELS[kind])
    axes.set_xticks(range(len(addresses)), addresses, rotation=90)
    axes.set_xlim(-0.7, len(addresses) - 0.3)
    name_axes(axes, y=what)
    borders = [
        place - 0.5
        for place in range(1, len(addresses))
        if get_block(addresses[place]) != get_block(addresses[place - 1])
    ]
    for border in borders:
        axes.axvline(border, color=LIGHT["line"], linewidth=0.8, zorder=0)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=TEXT + 0.5, loc="left", color=LIGHT["ink"], pad=24)


def _explain(axes: Axes, columns: int) -> None:
    """The names of the colours, between title and axes."""
    add_key(axes, y=-axes.get_window_extent().height - 16, columns=columns)


def _name(spent: Spent) -> str:
    return (
        f"{spent.subject}, {spent.fields['latent_width']}x{spent.fields['latent_height']} latents"
    )
