"""A tuning as a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from leansd.evaluation.records import Record
from leansd.evaluation.resuming import get_field
from leansd.faces.fronts import describe_choice, tabulate_front
from leansd.plans.anatomy import Anatomy
from leansd.plans.document import encode_plan
from leansd.report.differences import DECIBELS
from leansd.report.drawings import draw_heat, draw_plan
from leansd.report.plots import Point as Place
from leansd.report.plots import plot_tradeoff
from leansd.report.sections import (
    Attachment,
    Chart,
    Drawing,
    Listing,
    Origin,
    Prose,
    Report,
    Section,
    attach_records,
)
from leansd.tuning.front import Front, Point


def make_report(
    front: Front,
    chosen: Point,
    anatomy: Anatomy,
    drift: Sequence[Record],
    origin: Origin,
) -> Report:
    """The front as a plot and a table, the chosen plan, the drift where it was measured."""
    drawing = draw_plan(chosen.plan, anatomy, chosen.plan.name)
    notes = [describe_choice(front, chosen), _list_corrections(chosen)]
    sections: list[Section] = [
        _plot(front, chosen),
        _list(front, chosen),
        Chart("The chosen plan", [drawing], [note for note in notes if note]),
    ]
    attachments = [Attachment("plan.json", encode_plan(chosen.plan), "the chosen plan")]
    if drift:
        sections += make_drift_sections(drift)
        attachments.append(attach_records(drift, "drift.jsonl"))
    return Report(
        title=f"Plans tuned for {anatomy.name}",
        summary=summarise(front, chosen),
        measured=f"what skipping work does to pictures of {anatomy.name}, {front.steps} steps of "
        f"sampler {front.sampler}",
        sections=[*sections, _describe_method(front)],
        origin=origin,
        attachments=attachments,
    )


def summarise(front: Front, chosen: Point) -> str:
    """What the choice gains, and whether it was worth tuning, in a sentence."""
    rival = front.find_rival(chosen)
    gain = f"{chosen.speedup:.1f} times faster, {chosen.psnr:.0f} dB close to the originals"
    if chosen.is_plain:
        return (
            f"Nothing beats simply drawing in fewer steps here: {chosen.plan.steps} in the place "
            f"of {front.steps} are {gain}."
        )
    beside = f" (drawing in fewer steps: {rival.psnr:.0f} dB)" if rival is not None else ""
    return f"With the chosen plan pictures are drawn {gain}{beside}."


def make_drift_sections(drift: Sequence[Record]) -> list[Section]:
    """Heat maps of what changes from step to step."""
    lanes = list(dict.fromkeys(str(get_field(record, "lane")) for record in drift))
    units = [
        _draw_heat(drift, "unit_drift", {"lane": lane}, f"Lane {lane}", f"drift-{lane}")
        for lane in lanes
        if any(get_field(r, "lane") == lane for r in drift if r.metric == "unit_drift")
    ]
    errors = [record for record in drift if record.metric == "cut_error"]
    ways = sorted({(str(get_field(r, "how")), int(get_field(r, "gap"))) for r in errors})
    cuts = [
        _draw_heat(
            drift, "cut_error", {"how": how, "gap": gap}, f"{how}, gap {gap}", f"cut-{how}-{gap}"
        )
        for how, gap in ways
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
        heat = _draw_heat(
            drift, "guidance_drift", {}, "Conditional minus unconditional output", "drift-guidance"
        )
        sections.append(Chart("Drift of the guidance difference", [heat]))
    return sections


def _draw_heat(
    drift: Sequence[Record],
    metric: str,
    fields: Mapping[str, str | int],
    caption: str,
    name: str,
) -> Drawing:
    rows: dict[str, dict[int, float]] = {}
    for record in drift:
        if record.metric == metric and all(get_field(record, k) == v for k, v in fields.items()):
            rows.setdefault(record.at or "guidance", {})[get_field(record, "step")] = record.value
    return draw_heat(rows, caption, name=name)


def _plot(front: Front, chosen: Point) -> Chart:
    named = {id(front.points[0]), id(front.points[-1]), id(chosen)}
    named |= {id(point) for point in front.points if len(front.points) <= 8}
    places = [
        Place(
            name=p.plan.name if id(p) in named else "",
            x=p.speedup,
            y=p.psnr,
            low=p.speedup,
            high=p.speedup,
            is_rival=p.is_plain,
        )
        for p in (*front.points, *front.beaten)
    ]
    drawing = plot_tradeoff(places, x_name="predicted speed-up", y_name="PSNR to the full run, dB")
    return Chart(
        "Speed against fidelity",
        [drawing],
        [
            "On calls that had no part in the tuning. Plain runs of fewer steps are diamonds in "
            "another colour.",
            DECIBELS,
        ],
    )


def _list(front: Front, chosen: Point) -> Listing:
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


def _describe_method(front: Front) -> Prose:
    return Prose(
        "How this was found",
        [
            f"Sampler {front.sampler}, plans to be like its full run of {front.steps} steps. An "
            "error model calibrated on full runs proposes key steps and forecasts for every speed "
            "by dynamic programming; the best are run, their corrections fitted, their key steps "
            "moved while that helps. Held-out calls from other seeds decide.",
        ],
    )
