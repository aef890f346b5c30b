"""Fragments of the page as HTML: progress, numbers, tables, drawings. All text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import escape

from leansd.evaluation.compare import LEAN, RunProgress
from leansd.evaluation.prediction import Profiled, show_milliseconds, tabulate_gains, tabulate_split
from leansd.evaluation.runs import FULL
from leansd.plans.anatomy import WHOLE, Anatomy
from leansd.plans.compile import compile_plan, predict_speedup
from leansd.plans.liveness import Call
from leansd.plans.plan import Plan
from leansd.report.drawings import Bar, draw_bars
from leansd.report.measurements import draw_unit_times
from leansd.report.page import Chart, Drawing, Listing, render_section
from leansd.report.plans import plot_front
from leansd.text import Table
from leansd.tuning.front import Front, Point
from leansd.ui.folders import HistoryEntry
from leansd.ui.studio import Forecast, KnownModel

NAMES = {FULL: "Full run", LEAN: "With the plan"}


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
        gain = predict_speedup([call], anatomy)
    except ZeroDivisionError:
        return 0.0
    return min(1.0, 1 / gain) if gain == gain else 1.0  # NaN: it could not be counted


def show_lanes(beats: Sequence[Beat], progress: RunProgress | None = None, note: str = "") -> str:
    """Both runs, a bar a step: as tall as the share of the UNet that it computes."""
    whole = [Beat("compute", 1.0)] * len(beats)
    lanes = "".join(_show_lane(*lane, progress) for lane in ((FULL, whole), (LEAN, beats)))
    said = f'<p class="soft" role="status">{escape(note)}</p>' if note else ""
    return f'<div class="lanes">{lanes}</div>{said}'


def _show_lane(case: str, beats: Sequence[Beat], progress: RunProgress | None) -> str:
    done, total, told, is_active = 0, len(beats), "", False
    if progress is not None:
        total, is_active = progress.steps, progress.case == case
        # Who begins changes from turn to turn; who began is done when the other one runs.
        begins = (FULL, LEAN)[progress.turn % 2] == case
        done = progress.step if is_active else total * begins
        told = f"step {done} of {total}" if is_active or done else ""
    told = told or f"{total} steps"
    if progress is not None and case in progress.seconds:
        told += f" · {progress.seconds[case]:.2f} s"
    bars = "".join(
        # A sampler may call the UNet more than once a step.
        f'<i class="{beat.state}{" done" if place * total < done * len(beats) else ""}" '
        f'style="height:{max(8, round(100 * beat.share))}%"></i>'
        for place, beat in enumerate(beats)
    )
    return (
        f'<div class="lane{" active" if is_active and done < total else ""}" data-side="{case}">'
        f'<div class="lane-head"><b>{NAMES[case]}</b><span>{escape(told)}</span></div>'
        f'<div class="bars" role="progressbar" aria-label="{NAMES[case]}" aria-valuemin="0" '
        f'aria-valuemax="{total}" aria-valuenow="{done}">{bars}</div></div>'
    )


def describe_progress(progress: RunProgress) -> str:
    """What goes on, in words."""
    turn = f", round {progress.turn + 1} of {progress.turns}" if progress.turns > 1 else ""
    return f"{NAMES[progress.case].lower()}{turn}: in turns, so that both times are true"


def show_numbers(entry: HistoryEntry, warnings: Sequence[str] = ()) -> str:
    """What a comparison showed."""
    numbers = entry.numbers
    full, lean = sorted(numbers.full), sorted(numbers.lean)
    rounds = len(full)
    spread = f"{numbers.low:.2f} to {numbers.high:.2f} in {rounds} rounds"
    predicted = "not counted" if numbers.predicted is None else f"{numbers.predicted:.2f}x"
    cards = [
        (
            "speed-up",
            f"{numbers.speedup:.2f}x",
            spread if rounds > 1 else f"denoiser, predicted {predicted}",
        ),
        ("time", f"{lean[rounds // 2]:.2f} s", f"full run {full[rounds // 2]:.2f} s"),
        ("PSNR", f"{numbers.psnr:.1f} dB", _judge(numbers.psnr)),
        ("SSIM", f"{numbers.ssim:.3f}", "1 is the same picture"),
        (
            "calls in full",
            f"{numbers.full_calls} of {numbers.calls}",
            f"{numbers.bytes_kept / 2**20:.2f} MiB kept",
        ),
    ]
    shown = "".join(
        f'<div class="card"><dt>{escape(name)}</dt><dd>{escape(value)}</dd>'
        f"<small>{escape(remark)}</small></div>"
        for name, value, remark in cards
    )
    return f'<dl class="cards" data-key="{entry.key}">{shown}</dl>{show_warnings(warnings)}'


def _judge(decibels: float) -> str:
    """What a PSNR looks like, in words."""
    if decibels >= 100:
        return "the same to the bit"
    looks = ((40, "no difference to the eye"), (30, "small differences"), (20, "visible ones"))
    return next((word for least, word in looks if decibels >= least), "another picture")


def show_forecast(plan: Plan, forecast: Forecast, notes: Sequence[str] = ()) -> str:
    """How fast the plan in hand should be, and what must be said of it."""
    parts = ["not counted"]
    if forecast.unet is not None:
        parts = [f"predicted <b>{forecast.unet:.2f}x</b> by computation"]
    if forecast.run is not None and forecast.seconds is not None:
        parts.append(f"<b>{forecast.run:.2f}x</b>, {forecast.seconds:.2f} s a picture, as timed")
    keys = f"{len(plan.keys)} of {plan.steps} steps in full"
    return (
        f'<div class="prediction" role="status"><span class="plan-name">{escape(plan.name)}</span> '
        f"<span>{keys}</span> <span>{'; '.join(parts)}</span></div>{show_warnings(notes)}"
    )


def show_anatomy(model: KnownModel) -> str:
    """Where the UNet keeps its parameters and spends its multiply-accumulates."""
    anatomy = model.anatomy
    width, height = model.size
    if anatomy is WHOLE:
        return show_note(
            f"{model.name}: {model.denoiser}, {model.params / 1e6:.2f} M parameters, "
            f"{width} x {height} pixels; its whole steps are inherited."
        )
    picked = [(block, anatomy.select(block)) for block in ("stem", *anatomy.blocks, "head")]
    bars = [
        Bar(
            block,
            (units.params / anatomy.params, units.macs / (anatomy.macs or 1)),
            f"{units.params / 1e6:.2f} M",
        )
        for block, units in picked
    ]
    most = max(picked, key=lambda each: each[1].macs)[0]
    alt = f"Parameters and multiply-accumulates by block; most computation is in {most}."
    drawing = draw_bars(bars, names=("of parameters", "of MACs"), name="blocks", alt=alt)
    work = anatomy.uncounted or f"{anatomy.macs / 1e9:.3f} GMAC a call"
    lead = (
        f"{model.name}: {len(anatomy) - 2} units and 2 ends, {anatomy.params / 1e6:.2f} M "
        f"parameters, {work}, {width} x {height} pixels."
    )
    return f'<div class="drawing"><p>{escape(lead)}</p>{_draw(drawing)}</div>'


def show_profile(profiled: Profiled) -> str:
    """Where the time goes on this machine."""
    lead = (
        f"One UNet call in full takes {show_milliseconds(profiled.cost.full_call)} on "
        f"{profiled.circumstances['device']}; medians of {profiled.repeats} probing runs."
    )
    return (
        f'<div class="drawing"><p>{escape(lead)}</p>'
        f"<h3>A whole call, by stage</h3>{_show_table(tabulate_split(profiled))}"
        f"<h3>What presets gain here (predicted)</h3>{_show_table(tabulate_gains(profiled))}"
        f"<h3>Every unit</h3>{_draw(draw_unit_times(profiled))}</div>"
    )


def show_front(front: Front, chosen: Point) -> str:
    """What a tuning found, as a plot: tuned plans, and runs of fewer steps."""
    points = (*front.points, *front.dominated)
    names = {
        id(each): each.plan.name if each.is_plain else f"{len(each.plan.keys)} in full"
        for each in points
    }
    caption = f"{len(points)} plans; chosen: {chosen.speedup:.2f}x at {chosen.psnr:.1f} dB."
    return f'<div class="drawing">{_draw(plot_front(front, names, caption))}</div>'


def show_bar(text: str, share: float) -> str:
    """How far a long piece of work is."""
    percent = round(100 * min(1.0, max(0.0, share)))
    return (
        f'<div class="working"><div class="lane-head"><b>{escape(text)}</b>'
        f'<span>{percent} %</span></div><div class="track" role="progressbar" '
        f'aria-label="progress" aria-valuemin="0" aria-valuemax="100" aria-valuenow="{percent}">'
        f'<i style="width:{percent}%"></i></div></div>'
    )


def show_note(text: str) -> str:
    """One line, announced to who cannot see it."""
    return f'<p class="soft" role="status">{escape(text)}</p>'


def show_warnings(warnings: Sequence[str]) -> str:
    return "".join(f'<p class="warning">{escape(each)}</p>' for each in warnings)


def _draw(drawing: Drawing) -> str:
    return render_section(Chart(drawing.alt, [drawing]))


def _show_table(table: Table) -> str:
    return render_section(Listing(table.caption or table.columns[0], table))
