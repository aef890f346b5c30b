"""Where a UNet keeps its weights and spends its work, as report sections and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from leansd.faces.pareto import encode_figure
from leansd.faces.redundancy import Spent, draw_blocks, draw_units, tabulate_spent
from leansd.faces.report.page import write_page
from leansd.faces.report.sections import Chart, Drawing, Listing, Prose, Section
from leansd.measuring.files import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")


def write_redundancy(folder: Path, spent: Spent, circumstances: Mapping[str, str]) -> list[Path]:
    """Both figures and the page that shows them with every number."""
    page = write_page(
        folder / "report.html",
        title=f"Where {spent.subject} keeps its weights and spends its work",
        lead=headline(spent),
        sections=make_sections(spent, circumstances),
        foot="Written by leansd anatomy.",
    )
    return [*write_figures(folder, [spent]), page]


def write_figures(folder: Path, models: Sequence[Spent]) -> list[Path]:
    """The two figures as PNG and SVG: `blocks` and `units`."""
    figures = {"blocks": draw_blocks(models), "units": draw_units(models)}
    return [
        write_file(folder / f"{name}.{form}", encode_figure(figure, form))
        for name, figure in figures.items()
        for form in FORMATS
    ]


def headline(spent: Spent) -> str:
    """The redundancy in a sentence: what the outermost blocks hold and what they take."""
    first, last = spent.blocks[0], spent.blocks[-1]
    shares = {
        metric: sum(spent.share(metric, block) for block in (first, last))
        for metric in ("params", "macs")
    }
    text = (
        f"{first} and {last} hold {shares['params']:.1%} of the parameters and take "
        f"{shares['macs']:.1%} of the multiply-accumulates"
    )
    if spent.seconds:
        inside = sum(
            seconds for at, seconds in spent.seconds.items() if at.split(".")[0] in (first, last)
        )
        text += f", and {inside / spent.whole['call_time']:.1%} of a call's time here"
    return f"{text}."


def make_sections(spent: Spent, circumstances: Mapping[str, str]) -> list[Section]:
    """Both figures, every number, and how it was measured."""
    first, last = spent.blocks[0], spent.blocks[-1]
    what = "Latency" if spent.seconds else "Multiply-accumulates"
    return [
        Chart(
            "Parameters and computation by block",
            [_embed(draw_blocks([spent]), headline(spent))],
            [
                "Attention's matrix products are in it; published counts often leave them out.",
                f"What costs much and holds little, {first} and {last}, is where thinning pays.",
            ],
        ),
        Chart(f"{what} and parameters by unit", [_embed(draw_units([spent]), headline(spent))]),
        Listing("Every block and unit", tabulate_spent(spent)),
        Prose("How this was measured", [_describe(spent, circumstances)]),
    ]


def _describe(spent: Spent, facts: Mapping[str, str]) -> str:
    fields = spent.fields
    size = f"{fields['latent_width']} x {fields['latent_height']}"
    text = f"{size} latents, {fields['tokens']} text tokens; MACs are of one sample. "
    if spent.seconds:
        text += (
            f"Times are medians of whole UNet calls on {fields['batch']} samples of random inputs, "
            "every unit timed where it runs, after one call to warm up. "
        )
    return (
        f"{text}{facts['device']}; leansd {facts['leansd']}, torch {facts['torch']}, "
        f"diffusers {facts['diffusers']}, Python {facts['python']}; {facts['time']}."
    )


def _embed(figure: Figure, alt: str) -> Drawing:
    # Clipping paths are referred to by url(), which a page that needs nothing else has none of.
    for artist in figure.findobj():
        artist.set_clip_on(False)
    svg = encode_figure(figure, "svg").decode()
    return Drawing(svg[svg.index("<svg") :], alt)
