"""Draw the figures of the pages: from built-in shapes and committed records alone.

    python benchmarks/figures.py     writes bench.svg, incubation.svg, concepts/*.svg of docs/images

What the boxes of `hooks.svg` say is no number, so that one is drawn by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from leansd.evaluation.pareto import find_front
from leansd.evaluation.records import Record, load_records
from leansd.evaluation.runs import FULL
from leansd.evaluation.standings import PREDICTED, Standing, rate_point, read_standings
from leansd.plans import Plan
from leansd.plans.grid import draw_picture
from leansd.plans.presets import SPEED_PRESETS
from leansd.surgery.apply import operate
from leansd.unets import open_anatomy, open_outline

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
SAMPLER = "ddim"
KEPT, GONE, RIVAL, OURS = "#0f766e", "#e2e8f0", "#94a3b8", "#c2410c"
FAMILIES = {
    "ours": ("ours", OURS, "o"),
    "fewer": ("fewer steps", "#334155", "^"),
    "samplers": ("UniPC, DEIS in fewer steps", "#7c3aed", "v"),
    "spectrum": ("Spectrum", "#0369a1", "D"),
    "deepcache": ("DeepCache", RIVAL, "s"),
    "taylorseer": ("forecasts at even steps", "#a16207", "P"),
}
"""What is drawn of a contest: its name, colour and marker. The others lie far below, or decide as
they run."""

NETS = {
    "light": ("#94a3b8", "-"),
    "assembled": ("#0f766e", "-"),
    "full": (OURS, "-"),
    "no GRI": ("#65a30d", "-"),
    "1112 GRI": ("#0369a1", "-"),
    "1112": ("#be185d", "-"),
    "direct": ("#334155", "--"),
    "bk": ("#a16207", "--"),
    "lean": ("#7c3aed", "--"),
    "leaner": ("#c026d3", "--"),
    "leanest": ("#db2777", "--"),
}
"""Which nets are drawn, in which colour and line; dashed ones are trained end to end."""
WAYS = {
    "full": ("light", "assembled", "full"),
    "no GRI": ("light", "assembled", "no GRI"),
    "direct": ("direct",),
    "bk": ("bk",),
    "lean": ("lean",),
}
"""Trainings, as the arms that follow each other."""


def draw_plan() -> Figure:
    """The plan of the page: a key step every third, forecast between, half the batch at two."""
    plan = Plan.every(3, cut="up2.up", steps=12, how="forecast").guide("inherit", at=[7, 8])
    return draw_picture(plan.rename("every 3, cut at up2.up"), open_anatomy("sd15"))


def draw_surgery() -> Figure:
    """Parameters and computation of every unit of SD 1.5, and which of them asdm-1222 drops."""
    outline = open_outline("sd15")
    before = open_anatomy("sd15")
    _, lineage = operate(outline, "asdm-1222")
    kept = {lineage.origins[at].at for at in lineage.units}
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.add_subplot()
    columns = [(block, before.select(block)) for block in ("stem", *before.blocks, "head")]
    for place, (_, units) in enumerate(columns):
        bottom = 0.0
        for unit in units:
            share = unit.macs / before.macs
            axes.bar(
                place, share, bottom=bottom, width=0.8, edgecolor="white", linewidth=1,
                color=KEPT if unit.at in kept else GONE,
                hatch=None if unit.at in kept else "///",
            )  # fmt: skip
            bottom += share
    axes.set_xticks(range(len(columns)), [block for block, _ in columns])
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_ylabel("share of computation")
    axes.set_title("asdm-1222 on SD 1.5: hatched units are dropped", loc="left", fontsize=10)
    hide_frame(axes)
    return figure


def draw_front() -> Figure:
    """Speed and fidelity of the presets, DeepCache's schedules and fewer steps."""
    records = [
        record
        for record in load_records(RESULTS / "presets.jsonl")
        if (record.model_extra or {}).get("sampler") == SAMPLER
    ]
    cells = {(record.plan, record.metric): record for record in records}
    plans = [plan for plan in dict.fromkeys(each.plan for each in records) if plan != "full"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    groups = {
        "presets": ([plan for plan in plans if plan in SPEED_PRESETS], OURS, "o"),
        "DeepCache's schedule": ([plan for plan in plans if "deepcache" in plan], RIVAL, "s"),
        "fewer steps": ([plan for plan in plans if plan.endswith(" steps")], "#334155", "^"),
    }
    for name, (members, colour, marker) in groups.items():
        plot_group(axes, name, members, cells, colour, marker)
    axes.set_xlabel("speed-up of the whole call, measured")
    axes.set_ylabel("PSNR to the full run [dB]")
    first = cells["full", "seconds"]
    extra = first.model_extra or {}
    title = f"{first.subject}, {SAMPLER}, {extra['steps']} steps; {first.device}"
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False)
    axes.grid(color="#e2e8f0")
    hide_frame(axes)
    return figure


def draw_bench() -> Figure:
    """Speed and fidelity in every contest, a line a family, along what nothing of it beats."""
    standings = read_standings(load_records(RESULTS / "bench.jsonl"))
    figure = Figure(figsize=(10, 12), layout="constrained")
    panels = figure.subplots(-(-len(standings) // 3), 3, sharex=True, sharey=True).flat
    for axes, standing in zip(panels, standings, strict=False):
        plot_contest(axes, standing)
    handles, labels = panels[0].get_legend_handles_labels()
    for axes in panels[len(standings) :]:
        axes.set_axis_off()
    figure.legend(handles, labels, loc="lower right", frameon=False)
    figure.supxlabel("speed-up by what is computed")
    figure.supylabel("PSNR to the full run [dB]")
    return figure


def plot_contest(axes: Axes, standing: Standing) -> None:
    points = standing.list_points(FULL, PREDICTED)
    for family, (name, colour, marker) in FAMILIES.items():
        front = find_front(points.get(family, []), rate_point)
        own = family == "ours"
        axes.plot(
            [point.speed for point in front], [point.quality for point in front],
            color=colour, marker=marker, label=name,
            markersize=6 if own else 4, linewidth=2 if own else 1, zorder=3 if own else 2,
        )  # fmt: skip
    title = standing.title.removeprefix("text-to-image, ")
    axes.set_title(title.replace("image-to-image, ", "image-to-image\n"), loc="left", fontsize=9)
    axes.set_xscale("log")
    axes.set_xticks([1.5, 2, 3, 4], ["1.5x", "2x", "3x", "4x"])
    axes.set_xticks([], minor=True)
    axes.tick_params(labelbottom=True)
    axes.set_xlim(1.15, 4.5)
    axes.set_ylim(15, 62)
    axes.grid(color="#e2e8f0")
    hide_frame(axes)


def plot_group(
    axes: Axes,
    name: str,
    plans: list[str],
    cells: Mapping[tuple[str, str], Record],
    colour: str,
    marker: str,
) -> None:
    points = sorted((cells[plan, "speedup"].value, cells[plan, "psnr"].value) for plan in plans)
    axes.plot(
        [x for x, _ in points], [y for _, y in points], color=colour, marker=marker, label=name
    )


def draw_incubation() -> Figure:
    """What training is worth: the nets' errors by time step, and how those of trainings fell."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot_errors(left, load_records(RESULTS / "incubation.jsonl"))
    lines = (RESULTS / "incubation-curves.jsonl").read_text(encoding="utf-8").splitlines()
    plot_curves(right, [json.loads(line) for line in lines])
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )
    return figure


def plot_errors(axes: Axes, records: list[Record]) -> None:
    """How far a net's predictions are off the teacher's, mean of its trainings."""
    found: dict[str, dict[int, list[float]]] = {}
    for record in records:
        if record.metric == "teacher_error" and record.plan in NETS:
            moment = (record.model_extra or {})["timestep"]
            found.setdefault(record.plan, {}).setdefault(moment, []).append(record.value)
    for plan in (each for each in NETS if each in found):
        colour, style = NETS[plan]
        means = {moment: mean(values) for moment, values in found[plan].items()}
        axes.plot(list(means), list(means.values()), style, color=colour, label=plan)
    axes.set_yscale("log")
    axes.set_xlabel("time step (1000 is noise)")
    axes.set_title("squared error to the teacher's prediction", loc="left", fontsize=10)
    axes.grid(color="#e2e8f0")
    hide_frame(axes)


def plot_curves(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """The output loss of trainings, stage after stage where there are records, a line a seed."""
    for name, arms in WAYS.items():
        colour, _ = NETS[name]
        for seed in sorted({row["seed"] for row in rows}):
            start = 0
            for arm in arms:
                own = [row for row in rows if (row["arm"], row["seed"]) == (arm, seed)]
                axes.plot(
                    [start + row["step"] for row in own], [row["output"] for row in own],
                    color=colour, linewidth=0.8,
                )  # fmt: skip
                start += max((row["step"] for row in own), default=0)
    axes.set_yscale("log")
    axes.set_xlabel("training step")
    axes.set_title("output loss while training", loc="left", fontsize=10)
    axes.grid(color="#e2e8f0")
    hide_frame(axes)


def hide_frame(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


FIGURES = {
    "concepts/plan": draw_plan,
    "concepts/surgery": draw_surgery,
    "concepts/front": draw_front,
    "bench": draw_bench,
    "incubation": draw_incubation,
}


def main() -> None:
    # The same bytes every time: text stays text, ids and dates follow from nothing else.
    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "leansd"
    for name, draw in FIGURES.items():
        draw().savefig(IMAGES / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
