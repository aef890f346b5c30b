"""The plot of a contest: speed-up against fidelity, a line a family."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from leansd.faces.standings import Standing
from leansd.measuring.contest import FULL, OURS
from leansd.measuring.files import write_file
from leansd.measuring.margins import find_front

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    OURS: "#1d4ed8",
    "ours+tomesd": "#93c5fd",
    "fewer": "#111827",
    "samplers": "#9ca3af",
    "deepcache": "#f59e0b",
    "tgate": "#10b981",
    "tgate-plan": "#6ee7b7",
    "tomesd": "#a855f7",
    "easycache": "#ef4444",
    "spectrum": "#be185d",
    "guidance-cutoff": "#92400e",
}
"""By family; one that is not here is grey."""
FORMATS = ("png", "svg")


def draw_pareto(standing: Standing, reference: str = FULL) -> Figure:
    """All contestants of a contest, each family's front as a line; better is up and right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for family, points in standing.list_points(reference).items():
        colour = COLOURS.get(family, "#6b7280")
        width, order = (2.2, 3) if family == OURS else (1.0, 2)
        front = find_front(points)
        axes.plot(
            [point.speed for point in front],
            [point.quality for point in front],
            color=colour,
            linewidth=width,
            zorder=order,
        )
        axes.scatter(
            [point.speed for point in points],
            [point.quality for point in points],
            color=colour,
            s=18 * width,
            zorder=order,
            label=family,
        )
    axes.set_xscale("log")
    ticks = [1, 1.25, 1.5, 2, 2.5, 3, 4, 5]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("speed-up, measured, whole pipeline")
    axes.set_ylabel(f"PSNR to {reference}, dB")
    axes.set_title(f"{standing.fields['subject']}: {standing.title}", fontsize=10, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, frameon=False)
    return figure


def encode_figure(figure: Figure, form: str) -> bytes:
    """A figure as the bytes of a file, the same for the same records."""
    import matplotlib

    out = BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "leansd", "svg.fonttype": "path"}):
        figure.savefig(
            out, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None
        )
    return out.getvalue()


def write_plots(standing: Standing, folder: Path) -> list[Path]:
    """The plot as PNG and SVG."""
    figure = draw_pareto(standing)
    return [
        write_file(folder / f"{standing.slug}.{form}", encode_figure(figure, form))
        for form in FORMATS
    ]
