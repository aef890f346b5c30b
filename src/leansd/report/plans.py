"""Reports of plans: a plan itself, pictures drawn after plans, jobs of many, a tuning."""

from __future__ import annotations

import statistics
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from leansd.bulk.jobs import BulkOrder
from leansd.drawing import Request
from leansd.evaluation.compare import LEAN, Compared, Comparison
from leansd.evaluation.demo import FEWER, Demo, list_records, tabulate_demo
from leansd.evaluation.records import Record, get_field
from leansd.evaluation.runs import FULL
from leansd.plans.anatomy import Anatomy
from leansd.plans.grid import get_states, list_states
from leansd.plans.plan import Plan
from leansd.report.drawings import draw_heat, draw_plan
from leansd.report.figures import LIGHT
from leansd.report.page import (
    AMPLIFIED,
    DECIBELS,
    AttachedFile,
    Chart,
    Drawing,
    Listing,
    PictureGrid,
    Prose,
    ReportPage,
    Section,
    attach_records,
    count,
    show_differences,
    subtract_all,
)
from leansd.report.plots import PlotPoint, plot_tradeoff
from leansd.shards import DrawnPicture, read_shard
from leansd.text import Table, describe_duration
from leansd.tuning.front import Front, Point

SAME = "The same prompts, the same seeds"
HOW_TO_READ = (
    "A column is a step of the sampler, a line is a unit of the UNet from input to output. An idle "
    "unit is one that nobody reads at that step."
)


def report_plan(plan: Plan, anatomy: Anatomy, gain: float) -> ReportPage:
    """The grid of a plan, and how much of what it does.

    Args:
        gain: how many times fewer multiply-accumulates the UNet does.
    """
    saved = anatomy.uncounted or f"{gain:.1f} times less work in all"
    return ReportPage(
        title=f"Plan {plan.name} on {anatomy.name}",
        summary=(
            f"With this plan {len(plan.keys)} of {plan.steps} steps run the whole network, and the "
            f"others take over what was computed before: {saved}."
        ),
        measured=f"what plan {plan.identity} makes of {anatomy.name}'s UNet; counted, not measured",
        sections=[
            Chart("What runs when", [draw_plan(plan, anatomy)], [HOW_TO_READ]),
            Listing("How much of what", tabulate_states(plan, anatomy)),
        ],
        attachments=[attach_plan(plan)],
    )


def attach_plan(plan: Plan, about: str = "the plan") -> AttachedFile:
    return AttachedFile("plan.json", plan.encode(), about)


def tabulate_states(plan: Plan, anatomy: Anatomy) -> Table:
    """How many units at how many steps are in each state."""
    counts = Counter(state for marks in list_states(plan, anatomy).values() for state in marks)
    rows = [
        (state.label, str(counts[name]), f"{counts[name] / counts.total():.1%}")
        for name, state in get_states().items()
        if counts[name]
    ]
    return Table(("state", "units x steps", "share"), tuple(rows))


# -- generate --compare --------------------------------------------------------------------------


def report_pairs(
    pairs: Sequence[tuple[Request, Comparison]], plan: Plan, anatomy: Anatomy
) -> ReportPage:
    """Pictures drawn in full and after a plan: differences, times and fidelity, the plan."""
    prompts = [request.prompt for request, _ in pairs]
    full, planned = ([drawn[case] for _, drawn in pairs] for case in (FULL, LEAN))
    close, alike = ([each.mean(of) or 0.0 for each in planned] for of in ("psnr", "ssim"))
    gain = statistics.median(each.speedup.median for each in planned)
    what = "A picture was" if len(pairs) == 1 else f"{len(pairs)} pictures were"
    table = Table(
        ("prompt", "seed", "full", plan.name, "speed-up", "PSNR", "SSIM"),
        tuple(
            (
                request.prompt,
                str(request.seed),
                *(f"{drawn[case].timing.median:.2f} s" for case in (FULL, LEAN)),
                f"{drawn[LEAN].speedup.median:.2f}x",
                f"{decibels:.1f} dB",
                f"{similarity:.3f}",
            )
            for (request, drawn), decibels, similarity in zip(pairs, close, alike, strict=True)
        ),
    )
    once = (
        "Time of the whole call, once each: leansd demo and leansd bench take turns and say how "
        "sure they are."
    )
    return ReportPage(
        title=f"{plan.name} beside the full run",
        summary=(
            f"{what} drawn {gain:.1f} times faster with plan {plan.name}, "
            f"{statistics.fmean(close):.0f} dB close to what the full run draws (above about 40 "
            "differences are hard to see)."
        ),
        measured=f"{count(len(pairs), 'picture')} drawn by {anatomy.name} in full and after "
        f"{plan.identity} from the same seeds, one after the other",
        sections=[
            show_differences(
                SAME,
                prompts,
                ("full", "", [each.images[0] for each in full]),
                [(plan.name, f"{gain:.2f}x", [each.images[0] for each in planned])],
            ),
            Listing("Time and fidelity", table, [once]),
            Chart("The plan", [draw_plan(plan, anatomy, plan.name)]),
        ],
        attachments=[attach_plan(plan)],
    )


# -- demo ----------------------------------------------------------------------------------------


def report_comparison(demo: Demo) -> ReportPage:
    """Plans beside the full run: pictures, what differs, speed against fidelity, the plans."""
    width, height = demo.size
    first, *others = demo.entries
    rows = [(e.case.name, _remark(e), e.images) for e in demo.entries]
    summaries = [f"{e.case.name}: {e.case.summary}." for e in demo.entries]
    apart = [(e.case.name, "minus full", subtract_all(e.images, first.images)) for e in others]
    points = [
        PlotPoint(
            e.case.name,
            e.speedup.median,
            psnr,
            (e.speedup.low, e.speedup.high),
            is_rival=e.case.name == FEWER,
        )
        for e in demo.entries
        if (psnr := e.mean("psnr")) is not None
    ]
    plans = [
        draw_plan(
            e.case.plan,
            demo.anatomy,
            f"{e.case.name}: {e.case.summary}",
            name=f"plan-{e.case.name}",
        )
        for e in demo.entries
        if e.case.plan is not None
    ]
    return ReportPage(
        title="Lean Stable Diffusion: the same pictures in less time",
        summary=summarise_comparison(demo),
        measured=f"{len(demo.prompts)} prompts drawn by {demo.subject} at {width} x "
        f"{height} pixels, in full and after every plan, in turns",
        sections=[
            PictureGrid(SAME, demo.prompts, rows, summaries),
            Chart(
                "Speed against fidelity",
                [plot_tradeoff(points, x_name="measured speed-up")],
                [
                    "Further right is faster, further up is closer to the full run; a bar is the "
                    "range over the prompts. Fewer steps, a diamond in another colour, needs no "
                    "plan.",
                    DECIBELS,
                ],
            ),
            Listing("Results", tabulate_demo(demo), _explain_results(demo)),
            PictureGrid("What differs from the full run", demo.prompts, apart, [AMPLIFIED]),
            *([Chart("The plans", plans, [HOW_TO_READ])] if plans else []),
            Prose(
                "How this was measured",
                [
                    f"Sampler {demo.sampler}, {demo.steps} steps, guidance "
                    f"{demo.guidance:g}, prompt i from seed {demo.seed} + i. One "
                    "warm-up, then every prompt is drawn by all in turns, so that a "
                    "slow spell of the machine hits all alike.",
                ],
            ),
        ],
        attachments=[attach_records(list_records(demo))],
    )


def _explain_results(demo: Demo) -> list[str]:
    notes = [
        "Speed-up: whole pictures, text encoder and decoder included; median and range over the "
        f"{len(demo.prompts)} prompts, each drawn by all in turn. Every prompt is drawn up to "
        f"{demo.rounds} times and the fastest run of each case counts: other work on the machine "
        "only ever adds time.",
        "Predicted: from multiply-accumulates of the UNet alone.",
        "PSNR (in dB) and SSIM: against the full run's picture from the same seed. They say "
        "whether it is the same picture, not whether it is a good one.",
        "Kept: the most memory that inherited features took at any time.",
    ]
    if any(entry.find("clip_score", None) for entry in demo.entries):
        notes.append("CLIP: agreement of picture and prompt, by the small CLIP beside the model.")
    return notes


def summarise_comparison(demo: Demo) -> str:
    """The gentlest plan, the boldest, and fewer steps, in a sentence."""
    first, *others = demo.entries
    plans = [entry for entry in others if entry.case.plan is not None]
    gains = sorted(plans, key=lambda entry: entry.speedup.median)
    told = (
        f"In few steps every plan means the full run: a picture takes {first.timing.median:.2f} s"
    )
    if gains:
        gentle, bold = (_name_gain(gains[place]) for place in (0, -1))
        told = (
            f"A picture that takes {first.timing.median:.2f} s in full is drawn {gentle} with the "
            f"gentlest plan and {bold} with the boldest"
        )
    rival = next((entry for entry in others if entry.case.name == FEWER), None)
    if rival is None:
        return f"{told}."
    return f"{told}; simply drawing in {rival.case.steps} steps is {_name_gain(rival)}."


def _name_gain(entry: Compared) -> str:
    return f"{entry.speedup.median:.1f} times faster ({entry.mean('psnr'):.0f} dB close to it)"


def _remark(entry: Compared) -> str:
    if entry.case.name == FULL:
        return f"{entry.timing.median:.2f} s"
    return f"{entry.speedup.median:.2f}x, {entry.mean('psnr'):.1f} dB"


def draw_sheet(demo: Demo) -> Image.Image:
    """All pictures on one sheet: a row a case, a column a prompt."""
    side, gap, left, top = 128, 8, 132, 60
    columns, rows = len(demo.prompts), len(demo.entries)
    size = left + columns * (side + gap), top + rows * (side + gap)
    sheet = Image.new("RGB", size, LIGHT["card"])
    pen = ImageDraw.Draw(sheet)
    bold, plain = ImageFont.load_default(16), ImageFont.load_default(12)
    for column, prompt in enumerate(demo.prompts):
        text = "\n".join(textwrap.wrap(prompt, 20)[:3])
        x = left + column * (side + gap) + side / 2
        pen.multiline_text((x, top - 6), text, LIGHT["soft"], plain, anchor="md", align="center")
    for row, entry in enumerate(demo.entries):
        y = top + row * (side + gap)
        pen.text((10, y + side / 2 - 14), entry.case.name, LIGHT["ink"], bold, anchor="lm")
        pen.multiline_text((10, y + side / 2), _remark(entry), LIGHT["soft"], plain)
        for column, picture in enumerate(entry.images):
            small = picture.resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(small, (left + column * (side + gap), y))
    return sheet


# -- tune ----------------------------------------------------------------------------------------


def report_tuning(
    front: Front, chosen: Point, anatomy: Anatomy, drift: Sequence[Record] = ()
) -> ReportPage:
    """The front as a plot and a table, the chosen plan, the drift where it was measured."""
    named = {id(front.points[0]), id(front.points[-1]), id(chosen)}
    named |= {id(point) for point in front.points if len(front.points) <= 8}
    names = {id(point): point.plan.name for point in front.points if id(point) in named}
    notes = [describe_choice(front, chosen), _list_corrections(chosen.plan)]
    sections: list[Section] = [
        Chart(
            "Speed against fidelity",
            [plot_front(front, names)],
            [
                "On calls that had no part in the tuning. Plain runs of fewer steps are diamonds "
                "in another colour.",
                DECIBELS,
            ],
        ),
        Listing(
            "The front",
            tabulate_front(front, chosen),
            [
                "Speed-up and milliseconds: the whole call, predicted from a profile of this "
                "machine.",
                "or: the best at least as fast of the other kind: fewer steps beside a tuned "
                "plan, tuned plans beside fewer steps.",
            ],
        ),
        Chart(
            "The chosen plan",
            [draw_plan(chosen.plan, anatomy, chosen.plan.name)],
            [note for note in notes if note],
        ),
        *(show_drift(drift) if drift else []),
        Prose(
            "How this was found",
            [
                f"Sampler {front.sampler}, plans to be like its full run of {front.steps} steps. "
                "An error model calibrated on full runs proposes key steps and forecasts for every "
                "speed by dynamic programming; the best are run, their corrections fitted, their "
                "key steps moved while that helps. Held-out calls from other seeds decide.",
            ],
        ),
    ]
    drifts = [attach_records(drift, "drift.jsonl")] if drift else []
    return ReportPage(
        title=f"Plans tuned for {anatomy.name}",
        summary=summarise_tuning(front, chosen),
        measured=f"what skipping work does to pictures of {anatomy.name}, {front.steps} steps of "
        f"sampler {front.sampler}",
        sections=sections,
        attachments=[attach_plan(chosen.plan, "the chosen plan"), *drifts],
    )


def plot_front(front: Front, names: Mapping[int, str], caption: str = "") -> Drawing:
    """Speed against fidelity of everything that was tried.

    Args:
        names: by `id` of a point; those without one have no name in the plot.
    """
    points = [
        PlotPoint(names.get(id(point), ""), point.speedup, point.psnr, is_rival=point.is_plain)
        for point in (*front.points, *front.dominated)
    ]
    return plot_tradeoff(points, x_name="predicted speed-up", caption=caption)


def summarise_tuning(front: Front, chosen: Point) -> str:
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


def show_drift(drift: Sequence[Record]) -> list[Section]:
    """Heat maps of what changes from step to step."""

    def draw(metric: str, caption: str, name: str, **fields: str | int) -> Drawing:
        rows: dict[str, dict[int, float]] = {}
        for record in drift:
            same = all(get_field(record, key) == value for key, value in fields.items())
            if record.metric == metric and same:
                row = rows.setdefault(record.at or "guidance", {})
                row[get_field(record, "step")] = record.value
        return draw_heat(rows, caption, name=name)

    units = [record for record in drift if record.metric == "unit_drift"]
    lanes = dict.fromkeys(str(get_field(record, "lane")) for record in units)
    errors = [record for record in drift if record.metric == "cut_error"]
    ways = sorted({(str(get_field(r, "how")), int(get_field(r, "gap"))) for r in errors})
    sections: list[Section] = [
        Chart(
            "Drift of every unit",
            [draw("unit_drift", f"Lane {lane}", f"drift-{lane}", lane=lane) for lane in lanes],
            ["The change of a unit's output since the step before, over the output itself."],
        ),
        Chart(
            "One-step error of every cut",
            [
                draw("cut_error", f"{how}, gap {gap}", f"cut-{how}-{gap}", how=how, gap=gap)
                for how, gap in ways
            ],
            [
                "The relative error of the UNet's output where the cut alone inherits at this "
                "step, from outputs that are one, two, three times the gap back."
            ],
        ),
    ]
    if any(record.metric == "guidance_drift" for record in drift):
        what = "Conditional minus unconditional output"
        heat = draw("guidance_drift", what, "drift-guidance")
        sections.append(Chart("Drift of the guidance difference", [heat]))
    return sections


def _list_corrections(plan: Plan) -> str:
    mixes = [row.mix for row in plan.rows if row.mix is not None]
    if mixes:
        count = sum(len(mix.numbers) for mix in mixes)
        return (
            f"Mixes, at {len(mixes)} steps: the sampler gets a weighted sum of all outputs so far, "
            f"by lane, and of the noise that the run began with; {count} fitted weights."
        )
    corrections = [
        (step, row.correction) for step, row in enumerate(plan.rows) if any(row.correction)
    ]
    listed = ", ".join(f"{line:.2f} and {last:.2f} at step {n}" for n, (line, last) in corrections)
    return f"Corrections, by the line and by the last output: {listed}." if listed else ""


# -- what a tuning found, in tables and sentences ------------------------------------------------


def tabulate_front(front: Front, chosen: Point | None = None) -> Table:
    """Every point, and beside it what the other kind, tuned or plain, reaches at its speed."""
    rows: list[tuple[str, ...]] = []
    for point, row in zip(front.points, front.tabulate().rows, strict=True):
        speed, took, close, *others, name = row
        rival = front.find_rival(point)
        beside = f"{rival.psnr:.1f}" if rival is not None else "–"
        mark = " <" if point is chosen else ""
        rows.append((speed, took, close, beside, *others, name + mark))
    columns = ("speed-up", "ms", "PSNR, dB", "or", "steps", "in full", "plan")
    return Table(columns, tuple(rows))


def describe_choice(front: Front, chosen: Point) -> str:
    """What was chosen, and whether fewer steps alone do better."""
    rival = front.find_rival(chosen)
    what = f"{chosen.speedup:.2f}x, {chosen.milliseconds:.0f} ms, {chosen.psnr:.1f} dB"
    if chosen.is_plain:
        best = "no tuned plan is as fast"
        if rival is not None:
            best = f"the best tuned plan reaches {rival.psnr:.1f} dB"
        return (
            f"fewer steps alone win: {chosen.plan.steps} steps without a plan give {what}; {best}"
        )
    if rival is None:
        return f"{chosen.plan.name}: {what}"
    return (
        f"{chosen.plan.name}: {what}; {rival.plan.steps} steps without a plan, {rival.psnr:.1f} dB"
    )


# -- generate --prompts ----------------------------------------------------------------------------

SHOWN = 8
"""Pictures of the first shard that are on the page."""


def report_job(order: BulkOrder, folder: Path, seconds: float) -> ReportPage:
    """How much was drawn, into what, and what could not be.

    Args:
        seconds: that this call took.
    """
    total, flaws = order.total, order.sheet.flaws
    first = list(islice(read_shard(folder / order.parts[0].name), SHOWN)) if order.parts else []
    shards = tuple(
        (part.name, str(len(part.items)), "yes" if part in order.missing else "")
        for part in order.parts
    )
    wrong = Table(("line", "why"), tuple((str(flaw.line), flaw.reason) for flaw in flaws))
    left = f"; {count(len(flaws), 'row')} of the file cannot be drawn" if flaws else ""
    return ReportPage(
        title=f"{total} pictures of {order.job.model}",
        summary=f"All {total} pictures are drawn, {order.left} of them now in "
        f"{describe_duration(seconds)}{left}.",
        measured=f"job {order.job.fingerprint}: rows of prompts, drawn into shards",
        sections=[
            *([_show_first(first, order)] if first else []),
            Listing("The job", tabulate_job(order, seconds)),
            Listing("Shards", Table(("shard", "pictures", "drawn now"), shards)),
            *([Listing("Rows that cannot be drawn", wrong)] if flaws else []),
        ],
        attachments=[
            AttachedFile("job.json", (folder / "job.json").read_text(encoding="utf-8"), "the job")
        ],
    )


def tabulate_job(order: BulkOrder, seconds: float) -> Table:
    """What was asked for, and how fast it went."""
    job = order.job
    plan = "none" if job.plan is None else Plan.from_dict(job.plan).identity
    rows = [
        ("model", job.model),
        ("plan", f"{plan}, {job.steps} steps"),
        ("pictures", f"{order.total} in {count(len(order.parts), 'shard')}"),
        ("seeds", f"row n has {job.seed} + n, unless it says"),
        ("in turns", f"{job.batch} at once"),
    ]
    if order.left:
        rate = order.left / max(seconds, 1e-9)
        rows.append(("speed", f"{rate:.2f} pictures a second, loading included"))
    return Table(("what", "value"), tuple(rows))


def _show_first(first: Sequence[DrawnPicture], order: BulkOrder) -> PictureGrid:
    prompts = {item.row.id: item.row.prompt for item in order.parts[0].items}
    columns = [prompts.get(each.id, each.id) for each in first]
    pictures = [each.picture for each in first]
    return PictureGrid("The first pictures", columns, [("drawn", "", pictures)])
