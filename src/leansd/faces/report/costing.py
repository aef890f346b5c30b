"""A profile as report sections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from leansd.faces.costs import (
    EXAMPLE,
    Profiled,
    show_milliseconds,
    show_seconds,
    tabulate_blocks,
    tabulate_gains,
    tabulate_predictions,
    tabulate_split,
)
from leansd.faces.report.drawings import Bar, draw_bars
from leansd.faces.report.sections import Chart, Listing, Prose, Section
from leansd.measuring.prediction import find_worst


def headline(profiled: Profiled) -> str:
    """What came out, in a sentence or two."""
    cost = profiled.cost
    full, lean = (sum(profiled.split(plan).values()) for plan in (profiled.full, profiled.example))
    return (
        f"A whole call of {cost.subject} with {profiled.steps} steps takes {show_seconds(full)}, "
        f"under {EXAMPLE} {show_seconds(lean)}; one UNet call in full takes "
        f"{show_milliseconds(cost.full_call)}."
    )


def make_sections(profiled: Profiled) -> list[Section]:
    """The report of a profile."""
    sections: list[Section] = [_make_split(profiled), _make_gains(profiled)]
    if profiled.predictions:
        sections.append(_make_predictions(profiled))
    return [*sections, _make_bars(profiled), _make_blocks(profiled), _make_method(profiled)]


def _make_split(profiled: Profiled) -> Listing:
    notes = [
        f"{profiled.cost.pictures} picture(s), {profiled.steps} UNet calls, as the model predicts "
        "them from what was measured.",
        "What no plan touches bounds what plans gain: the faster the UNet, the larger the share of "
        "the decoder.",
    ]
    if profiled.vae is not None:
        notes.append(name_vae(profiled))
    return Listing("Where a whole call spends its time", tabulate_split(profiled), notes)


def name_vae(profiled: Profiled) -> str:
    """One line on the other autoencoder."""
    vae = profiled.vae
    assert vae is not None
    kind = "" if vae.is_trained else " (random weights: its time is real, its pictures are not)"
    return (
        f"VAE {vae.name}{kind} would decode in {show_seconds(vae.decode)}, the model's own takes "
        f"{show_seconds(profiled.cost.decode)}."
    )


def _make_gains(profiled: Profiled) -> Listing:
    notes = ["UNet: all its calls. Whole call: text encoder, scheduler and decoder included."]
    if profiled.vae is not None:
        notes.append("With the other VAE: over the full run with the model's own.")
    return Listing("What the presets gain here (predicted)", tabulate_gains(profiled), notes)


def _make_predictions(profiled: Profiled) -> Listing:
    return Listing(
        "Predicted against measured",
        tabulate_predictions(profiled.predictions),
        [
            "Plans that the model was not made from, run in turns with the probing runs; seconds "
            "in the UNet, median of the rounds. Speed-up: over the full run of the same round, "
            "median and range.",
            f"Largest error of a predicted speed-up: {find_worst(profiled.predictions):.1%}.",
        ],
    )


@dataclass(frozen=True)
class _Shares:
    name: str
    time: float
    macs: float
    remark: str


def _list_shares(profiled: Profiled) -> Sequence[_Shares]:
    cost, anatomy = profiled.cost, profiled.anatomy
    total = sum(cost.units[unit.at]["whole"] for unit in anatomy)
    return [
        _Shares(
            unit.at,
            time=cost.units[unit.at]["whole"] / total,
            macs=unit.macs / sum(each.macs for each in anatomy),
            remark=show_milliseconds(cost.units[unit.at]["whole"]),
        )
        for unit in anatomy
    ]


def _make_bars(profiled: Profiled) -> Chart:
    shares = _list_shares(profiled)
    most = sorted(shares, key=lambda row: -row.time)[:3]
    alt = "Most time is spent in " + ", ".join(f"{row.name} ({row.time:.0%})" for row in most)
    bars = [Bar(row.name, (row.time, row.macs), row.remark) for row in shares]
    drawing = draw_bars(bars, names=("share of time", "share of MACs"), alt=alt)
    return Chart(
        "Every unit",
        [drawing],
        ["In running order, whole batch: time here next to multiply-accumulates anywhere."],
    )


def _make_blocks(profiled: Profiled) -> Listing:
    notes = [
        "A block's time has its units' and what it spends besides them. Fixed: what every call "
        "spends, whatever it computes.",
        f"Copying what is kept and inherited: {profiled.cost.per_byte * 2**30 * 1000:.0f} ms a "
        "GiB read or written.",
    ]
    if profiled.cost.is_guided:
        notes.append("Half batch: the conditional half alone, measured where it ran alone.")
    peaks = profiled.cost.peak_bytes
    if peaks:
        at = max(peaks, key=lambda each: peaks[each])
        notes.append(f"Most memory on top of what was there: {at}, {peaks[at] / 2**20:.0f} MiB.")
    return Listing("Blocks", tabulate_blocks(profiled), notes)


def _make_method(profiled: Profiled) -> Prose:
    width, height = profiled.cost.size
    facts = profiled.circumstances
    return Prose(
        "How this was measured",
        [
            f"Model {profiled.cost.subject}, {width} x {height} pixels, "
            f"{profiled.cost.pictures} picture(s) at once. {profiled.repeats} probing run(s) after "
            "one to warm up: calls that compute everything, cut the UNet at several depths, leave "
            "out whole steps and run half the batch, every unit timed where it runs. Medians; "
            "fixed part and copies by least squares.",
            f"{facts['device']}; leansd {facts['leansd']}, torch {facts['torch']}, "
            f"diffusers {facts['diffusers']}, Python {facts['python']}; {facts['time']}.",
        ],
    )
