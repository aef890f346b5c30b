"""Fragments of the page as HTML: progress, numbers, tables, drawings. All text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import escape

from leansd.faces.costs import Profiled, show_milliseconds, tabulate_gains, tabulate_split
from leansd.plans.anatomy import Anatomy
from leansd.plans.compile import compile_plan
from leansd.plans.liveness import Call
from leansd.plans.macs import predict_speedup
from leansd.plans.plan import Plan
from leansd.report.drawings import Bar, draw_bars
from leansd.report.figures import embed_svg, encode_svg
from leansd.report.plots import Point, plot_tradeoff
from leansd.report.sections import Drawing
from leansd.text import Table
from leansd.ui.duels import Progress, Side
from leansd.ui.history import Entry
from leansd.ui.studio import Forecast, Model, Tuned

NAMES: dict[Side, str] = {"full": "Full run", "lean": "With the plan"}


@dataclass(frozen=True)
class Beat:
    """A step of a run as a bar: how it is coloured, and what share of the UNet it computes."""

    state: str
    share: float


def list_beats(plan: Plan, anatomy: Anatomy) -> list[Beat]:
    """The steps of a plan."""
    calls = compile_plan(plan, anatomy).calls
    return [Beat(_name_state(call), _share(call, anatomy)) for call in calls]


def _name_state(call: Call) -> str:
    hows = set(call.pattern.inherited.values()) | set(call.pattern.parts.values())
    if not hows:
        return "compute" if call.guidance == "compute" else "reuse"
    return hows.pop() if len(hows) == 1 else "mixed"


def _share(call: Call, anatomy: Anatomy) -> float:
    try:
        return min(1.0, 1 / predict_speedup([call], anatomy))
    except ZeroDivisionError:
        return 0.0


def show_lanes(beats: Sequence[Beat], progress: Progress | None = None, note: str = "") -> str:
    """Both runs, a bar a step: as tall as the share of the UNet that it computes."""
    whole = [Beat("compute", 1.0)] * len(beats)
    lanes = [
        _show_lane("full", whole, progress),
        _show_lane("lean", beats, progress),
    ]
    said = f'<p class="soft" role="status">{escape(note)}</p>' if note else ""
    return f'<div class="lanes">{"".join(lanes)}</div>{said}'


def _show_lane(side: Side, beats: Sequence[Beat], progress: Progress | None) -> str:
    done = progress.done[side] if progress is not None else 0
    total = progress.steps if progress is not None else len(beats)
    active = progress is not None and progress.side == side
    told = f"{total} steps"
    if progress is not None and (active or done):
        told = f"step {done} of {total}"
    if progress is not None and side in progress.seconds:
        told += f" · {progress.seconds[side]:.2f} s"
    bars: list[str] = []
    for place, beat in enumerate(beats):
        # A sampler may call the UNet more than once a step.
        reached = place * total < done * len(beats)
        kind = f"{beat.state}{' done' if reached else ''}"
        bars.append(f'<i class="{kind}" style="height:{max(8, round(100 * beat.share))}%"></i>')
    name = NAMES[side]
    return (
        f'<div class="lane{" active" if active else ""}" data-side="{side}">'
        f'<div class="lane-head"><b>{name}</b><span>{escape(told)}</span></div>'
        f'<div class="bars" role="progressbar" aria-label="{name}" aria-valuemin="0" '
        f'aria-valuemax="{total}" aria-valuenow="{done}">{"".join(bars)}</div></div>'
    )


def show_numbers(entry: Entry, warnings: Sequence[str] = ()) -> str:
    """What a duel showed."""
    numbers = entry.numbers
    full, lean = sorted(numbers.full), sorted(numbers.lean)
    rounds = len(full)
    spread = f"{numbers.low:.2f} to {numbers.high:.2f} in {rounds} rounds" if rounds > 1 else ""
    cards = [
        (
            "speed-up",
            f"{numbers.speedup:.2f}x",
            spread or f"UNet, predicted {numbers.predicted:.2f}x",
        ),
        ("time", f"{lean[rounds // 2]:.2f} s", f"full run {full[rounds // 2]:.2f} s"),
        ("PSNR", f"{numbers.psnr:.1f} dB", _judge(numbers.psnr)),
        ("SSIM", f"{numbers.ssim:.3f}", "1 is the same picture"),
        (
            "UNet calls in full",
            f"{numbers.full_calls} of {numbers.calls}",
            f"{numbers.bytes_kept / 2**20:.2f} MiB kept",
        ),
    ]
    shown = "".join(
        f'<div class="card"><dt>{escape(name)}</dt><dd>{escape(value)}</dd>'
        f"<small>{escape(remark)}</small></div>"
        for name, value, remark in cards
    )
    said = "".join(f'<p class="warning">{escape(each)}</p>' for each in warnings)
    return f'<dl class="cards" data-key="{entry.key}">{shown}</dl>{said}'


def _judge(decibels: float) -> str:
    """What a PSNR looks like, in words."""
    if decibels >= 100:
        return "the same to the bit"
    looks = ((40, "no difference to the eye"), (30, "small differences"), (20, "visible ones"))
    return next((word for least, word in looks if decibels >= least), "another picture")


def show_forecast(plan: Plan, forecast: Forecast) -> str:
    """How fast the plan in hand should be."""
    parts = [f"<b>{forecast.unet:.2f}x</b> in the UNet, by multiply-accumulates"]
    if forecast.run is not None and forecast.seconds is not None:
        parts.append(f"<b>{forecast.run:.2f}x</b>, {forecast.seconds:.2f} s a picture, as timed")
    keys = f"{len(plan.keys)} of {plan.steps} steps in full"
    return (
        f'<div class="prediction" role="status"><span class="plan-name">{escape(plan.name)}</span> '
        f"<span>{keys}</span> <span>predicted {'; '.join(parts)}</span></div>"
    )


def show_table(table: Table) -> str:
    """A table that scrolls in its own box."""
    heads = "".join(
        f'<th scope="col"{_align(table, place)}>{escape(name)}</th>'
        for place, name in enumerate(table.columns)
    )
    rows = "".join(
        "<tr>"
        + f'<th scope="row">{escape(row[0])}</th>'
        + "".join(
            f"<td{_align(table, place)}>{escape(cell)}</td>"
            for place, cell in enumerate(row[1:], start=1)
        )
        + "</tr>"
        for row in table.rows
    )
    return (
        '<div class="scroll" tabindex="0"><table class="plain">'
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _align(table: Table, place: int) -> str:
    return ' class="number"' if table.is_numeric(place) else ""


def show_drawing(drawing: Drawing) -> str:
    caption = f"<figcaption>{escape(drawing.caption)}</figcaption>" if drawing.caption else ""
    shown = embed_svg(encode_svg(drawing.figure), drawing.name, drawing.alt)
    return f"<figure>{shown}{caption}</figure>"


def show_anatomy(model: Model) -> str:
    """Where the UNet keeps its parameters and spends its multiply-accumulates."""
    anatomy = model.anatomy
    blocks = ["stem", *anatomy.blocks, "head"]
    picked = [(block, anatomy.select(block)) for block in blocks]
    bars = [
        Bar(
            block,
            (units.params / anatomy.params, units.macs / (anatomy.macs or 1)),
            f"{units.params / 1e6:.2f} M",
        )
        for block, units in picked
    ]
    most = max(picked, key=lambda each: each[1].macs)[0]
    drawing = draw_bars(
        bars,
        names=("of parameters", "of MACs"),
        name="blocks",
        alt=f"Parameters and multiply-accumulates by block; most computation is in {most}.",
    )
    units = len(anatomy) - 2
    lead = (
        f"{model.name}: {units} units and 2 ends, {anatomy.params / 1e6:.2f} M parameters, "
        f"{anatomy.macs / 1e9:.3f} GMAC a call, {model.size[0]} x {model.size[1]} pixels."
    )
    return f'<div class="drawing"><p>{escape(lead)}</p>{show_drawing(drawing)}</div>'


def show_profile(profiled: Profiled) -> str:
    """Where the time goes on this machine."""
    cost, anatomy = profiled.cost, profiled.anatomy
    whole = sum(cost.units[unit.at]["whole"] for unit in anatomy)
    work = sum(unit.macs for unit in anatomy) or 1
    bars = [
        Bar(
            unit.at,
            (cost.units[unit.at]["whole"] / whole, unit.macs / work),
            show_milliseconds(cost.units[unit.at]["whole"]),
        )
        for unit in anatomy
    ]
    slowest = max(bars, key=lambda bar: bar.lengths[0])
    drawing = draw_bars(
        bars,
        names=("of time here", "of MACs"),
        name="units",
        alt=f"Time of every unit; most is spent in {slowest.name}, {slowest.lengths[0]:.0%}.",
    )
    facts = profiled.circumstances
    lead = (
        f"One UNet call in full takes {show_milliseconds(cost.full_call)} on {facts['device']}; "
        f"medians of {profiled.repeats} probing runs."
    )
    return (
        f'<div class="drawing"><p>{escape(lead)}</p>'
        f"<h3>A whole call, by stage</h3>{show_table(tabulate_split(profiled))}"
        f"<h3>What presets gain here (predicted)</h3>{show_table(tabulate_gains(profiled))}"
        f"<h3>Every unit</h3>{show_drawing(drawing)}</div>"
    )


def show_front(tuned: Tuned) -> str:
    """What a tuning found, as a plot: tuned plans, and runs of fewer steps."""
    front, chosen = tuned.front, tuned.chosen
    points = [
        Point(
            point.plan.name if point.is_plain else f"{len(point.plan.keys)} in full",
            point.speedup,
            point.psnr,
            is_rival=point.is_plain,
        )
        for point in (*front.points, *front.beaten)
    ]
    drawing = plot_tradeoff(
        points,
        x_name="times faster than the full run (predicted)",
        y_name="dB to the full run",
        caption=f"{len(points)} plans; chosen: {chosen.speedup:.2f}x at {chosen.psnr:.1f} dB.",
    )
    return f'<div class="drawing">{show_drawing(drawing)}</div>'


def show_bar(text: str, share: float) -> str:
    """How far a long piece of work is."""
    percent = round(100 * min(1.0, max(0.0, share)))
    return (
        f'<div class="working"><div class="lane-head"><b>{escape(text)}</b>'
        f'<span>{percent} %</span></div><div class="track" role="progressbar" '
        f'aria-label="progress" aria-valuemin="0" aria-valuemax="100" aria-valuenow="{percent}">'
        f'<i style="width:{percent}%"></i></div></div>'
    )


def show_note(text: str, kind: str = "soft") -> str:
    return f'<p class="{kind}" role="status">{escape(text)}</p>'
