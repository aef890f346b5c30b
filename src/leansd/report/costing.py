"""A profile as a report."""

from __future__ import annotations

from collections.abc import Sequence

from leansd.evaluation.prediction import find_worst
from leansd.evaluation.records import Record
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
from leansd.report.drawings import Bar, draw_bars
from leansd.report.sections import (
    Chart,
    Listing,
    Origin,
    Prose,
    Report,
    Section,
    attach_records,
)
from leansd.report.words import count


def make_report(profiled: Profiled, records: Sequence[Record], origin: Origin) -> Report:
    """Where the time goes, what plans gain of it, and how true the predictions are."""
    sections: list[Section] = [_make_stages(profiled), _make_split(profiled), _make_gains(profiled)]
    if profiled.predictions:
        sections.append(_make_predictions(profiled))
    sections += [_make_bars(profiled), _make_blocks(profiled), _make_method(profiled)]
    width, height = profiled.cost.size
    return Report(
        title=f"What {profiled.cost.subject} costs here",
        summary=headline(profiled),
        measured=f"{count(profiled.cost.pictures, 'picture')} of {width} x {height} pixels a call "
        f"of {profiled.cost.subject}",
        sections=sections,
        origin=origin,
        attachments=[attach_records(records)],
    )


def headline(profiled: Profiled) -> str:
    """What came out, in a sentence."""
    full, lean = (sum(profiled.split(plan).values()) for plan in (profiled.full, profiled.example))
    what = "a picture" if profiled.cost.pictures == 1 else f"{profiled.cost.pictures} pictures"
    return (
        f"Drawing {what} in {profiled.steps} steps takes {show_seconds(full)} here; with the plan "
        f"{EXAMPLE} it should take {show_seconds(lean)}: {full / lean:.1f} times faster."
    )


def _make_stages(profiled: Profiled) -> Chart:
    """Seconds by stage, in full and under the example."""
    full, lean = profiled.split(profiled.full), profiled.split(profiled.example)
    bars = [
        Bar(
            stage,
            (full[stage], lean[stage]),
            f"{show_seconds(full[stage])}, {show_seconds(lean[stage])}",
        )
        for stage in full
    ]
    most = max(full, key=lambda stage: full[stage])
    share = full[most] / sum(full.values())
    alt = f"{most} takes most: {share:.0%} of a full call, {show_seconds(lean[most])} under a plan."
    drawing = draw_bars(bars, names=("full", EXAMPLE), alt=alt, name="stages")
    return Chart("Where the seconds of a call go", [drawing])


def _make_split(profiled: Profiled) -> Listing:
    notes = [
        f"{count(profiled.cost.pictures, 'picture')}, {profiled.steps} UNet calls, as the model "
        "predicts them from what was measured.",
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


def _make_bars(profiled: Profiled) -> Chart:
    cost, anatomy = profiled.cost, profiled.anatomy
    times = {unit.at: cost.units[unit.at]["whole"] for unit in anatomy}
    total, macs = sum(times.values()), sum(unit.macs for unit in anatomy) or 1
    bars = [
        Bar(
            unit.at,
            (times[unit.at] / total, unit.macs / macs),
            show_milliseconds(times[unit.at]),
        )
        for unit in anatomy
    ]
    most = sorted(times, key=lambda at: -times[at])[:3]
    alt = "Most time is spent in " + ", ".join(f"{at} ({times[at] / total:.0%})" for at in most)
    drawing = draw_bars(bars, names=("share of time", "share of MACs"), alt=f"{alt}.", name="units")
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
    return Prose(
        "How this was measured",
        [
            f"{count(profiled.repeats, 'probing run')} after one to warm up: calls that compute "
            "everything, cut the UNet at several depths, leave out whole steps and run half the "
            "batch, every unit timed where it runs. Medians; fixed part and copies by least "
            "squares.",
        ],
    )
