"""A tuning as report sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from leansd.faces.fronts import describe_choice, tabulate_front
from leansd.faces.report.drawings import Point as Place
from leansd.faces.report.drawings import draw_heat, draw_plan, plot_tradeoff
from leansd.faces.report.sections import Chart, Drawing, Listing, Prose, Section
from leansd.measuring.records import Record
from leansd.measuring.resuming import get_field
from leansd.plans.anatomy import Anatomy
from leansd.tuning.front import Front, Point


def make_sections(
    front: Front,
    chosen: Point | None,
    anatomy: Anatomy,
    drift: Sequence[Record],
    circumstances: Mapping[str, str],
) -> list[Section]:
    """The front as a plot and a table, the chosen plan, the drift where it was measured."""
    sections: list[Section] = [_plot(front), _list(front, chosen)]
    if chosen is not None:
        drawing = draw_plan(chosen.plan, anatomy, chosen.plan.name)
        notes = [describe_choice(front, chosen), _list_corrections(chosen)]
        sections.append(Chart("The chosen plan", [drawing], [note for note in notes if note]))
    if drift:
        sections += make_drift_sections(drift)
    return [*sections, _describe_method(front, circumstances)]


def make_drift_sections(drift: Sequence[Record]) -> list[Section]:
    """Heat maps of what changes from step to step."""
    lanes = list(dict.fromkeys(str(get_field(record, "lane")) for record in drift))
    units = [
        _draw_heat(drift, "unit_drift", {"lane": lane}, f"Lane {lane}")
        for lane in lanes
        if any(get_field(r, "lane") == lane for r in drift if r.metric == "unit_drift")
    ]
    hows = list(dict.fromkeys(get_field(r, "how") for r in drift if r.metric == "cut_error"))
    gaps = sorted({get_field(r, "gap") for r in drift if r.metric == "cut_error"})
    cuts = [
        _draw_heat(drift, "cut_error", {"how": how, "gap": gap}, f"{how}, gap {gap}")
        for how in hows
        for gap in gaps
    ]
    sections: list[Section] = [
        Chart(
            "Drift of every unit",
            units,
            ["The change of a unit's output since the step before, over the output itself."],
        ),
        Chart(
            "One-step error of every cut",
            cuts,
            [
                "The relative error of the UNet's output where the cut alone inherits at this "
                "step, from outputs that are one, two, three times the gap back."
            ],
        ),
    ]
    if any(record.metric == "guidance_drift" for record in drift):
        heat = _draw_heat(drift, "guidance_drift", {}, "Conditional minus unconditional output")
        sections.append(Chart("Drift of the guidance difference", [heat]))
    return sections


def _draw_heat(
    drift: Sequence[Record], metric: str, fields: Mapping[str, str | int], caption: str
) -> Drawing:
    rows: dict[str, dict[int, float]] = {}
    for record in drift:
        if record.metric == metric and all(get_field(record, k) == v for k, v in fields.items()):
            rows.setdefault(record.at or "guidance", {})[get_field(record, "step")] = record.value
    return draw_heat(rows, caption=caption)


def _plot(front: Front) -> Chart:
    points = [*front.points, *front.beaten]
    places = [
        Place(
            p.plan.name if p in front.points else "", p.speedup, p.psnr, p.speedup, p.speedup,
            is_rival=p.is_plain,
        )
        for p in points
    ]  # fmt: skip
    alt = "; ".join(f"{p.plan.name}: {p.speedup:.2f} times faster, {p.psnr:.1f} dB" for p in points)
    drawing = plot_tradeoff(
        places, x_name="predicted speed-up", y_name="PSNR to the full run, dB", alt=alt
    )
    return Chart(
        "Speed against fidelity",
        [drawing],
        [
            "On calls that had no part in the tuning. Plain runs of fewer steps are in another "
            "colour; what has no name is beaten by what has one."
        ],
    )


def _list(front: Front, chosen: Point | None) -> Listing:
    return Listing(
        "The front",
        tabulate_front(front, chosen),
        [
            "Speed-up and milliseconds: the whole call, predicted from a profile of this machine.",
            "or: the best at least as fast of the other kind: fewer steps beside a tuned plan, "
            "tuned plans beside fewer steps.",
        ],
    )


def _list_corrections(chosen: Point) -> str:
    rows = enumerate(chosen.plan.rows)
    corrections = {step: row.correct for step, row in rows if any(row.correct)}
    if not corrections:
        return ""
    listed = ", ".join(
        f"{line:.2f} and {last:.2f} at step {step}" for step, (line, last) in corrections.items()
    )
    return f"Corrections, by the line and by the last output: {listed}."


def _describe_method(front: Front, facts: Mapping[str, str]) -> Prose:
    return Prose(
        "How this was found",
        [
            f"Sampler {front.sampler}, plans to be like its full run of {front.steps} steps. An "
            "error model calibrated on full runs proposes key steps and forecasts for every speed "
            "by dynamic programming; the best are run, their corrections fitted, their key steps "
            "moved while that helps. Held-out calls from other seeds decide.",
            f"{facts['device']}; leansd {facts['leansd']}, torch {facts['torch']}, "
            f"diffusers {facts['diffusers']}, Python {facts['python']}; {facts['time']}.",
        ],
    )
