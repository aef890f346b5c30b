"""A comparison of plans as a report and as one sheet of pictures."""

from __future__ import annotations

import textwrap

from PIL import Image, ImageDraw, ImageFont

from leansd.faces.comparison import FEWER, Comparison, Entry, list_records, tabulate_comparison
from leansd.report.differences import DECIBELS, NOTE, list_differences
from leansd.report.drawings import draw_plan
from leansd.report.plots import Point, plot_tradeoff
from leansd.report.sections import (
    Chart,
    Grid,
    Listing,
    Origin,
    Prose,
    Report,
    attach_records,
)

PAPER, INK, SOFT = "#ffffff", "#1b1d22", "#5d636f"


def make_report(comparison: Comparison, origin: Origin) -> Report:
    """The pictures, what differs, speed against fidelity, the plans."""
    width, height = comparison.size
    return Report(
        title="Lean Stable Diffusion: the same pictures in less time",
        summary=headline(comparison),
        measured=f"{len(comparison.prompts)} prompts drawn by {comparison.subject} at {width} x "
        f"{height} pixels, in full and after every plan, in turns",
        sections=[
            _make_grid(comparison),
            _make_plot(comparison),
            _make_table(comparison),
            _make_differences(comparison),
            _make_plans(comparison),
            _make_method(comparison),
        ],
        origin=origin,
        attachments=[attach_records(list_records(comparison))],
    )


def headline(comparison: Comparison) -> str:
    """What came out, in a sentence or two."""
    first, *others = comparison.entries
    plans = [entry for entry in others if entry.contestant.plan is not None]
    gains = sorted(plans, key=lambda entry: entry.speedup.median)
    gentle, bold = (_name_gain(gains[place]) for place in (0, -1))
    told = (
        f"A picture that takes {first.timing.median:.2f} s in full is drawn {gentle} with the "
        f"gentlest plan and {bold} with the boldest"
    )
    rival = next((entry for entry in others if entry.contestant.name == FEWER), None)
    if rival is None:
        return f"{told}."
    return f"{told}; simply drawing in {rival.contestant.steps} steps is {_name_gain(rival)}."


def _name_gain(entry: Entry) -> str:
    return f"{entry.speedup.median:.1f} times faster ({entry.psnr:.0f} dB close to it)"


def draw_sheet(comparison: Comparison) -> Image.Image:
    """All pictures on one sheet: a row a contestant, a column a prompt."""
    side = 128
    gap, left, top = 8, 132, 60
    columns, rows = len(comparison.prompts), len(comparison.entries)
    width, height = left + columns * (side + gap), top + rows * (side + gap)
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    bold, plain = ImageFont.load_default(16), ImageFont.load_default(12)
    for column, prompt in enumerate(comparison.prompts):
        text = "\n".join(textwrap.wrap(prompt, 20)[:3])
        x = left + column * (side + gap) + side / 2
        pen.multiline_text((x, top - 6), text, SOFT, plain, anchor="md", align="center")
    for row, entry in enumerate(comparison.entries):
        y = top + row * (side + gap)
        pen.text((10, y + side / 2 - 14), entry.contestant.name, INK, bold, anchor="lm")
        pen.multiline_text((10, y + side / 2), _remark(entry), SOFT, plain)
        for column, picture in enumerate(entry.pictures):
            small = picture.resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(small, (left + column * (side + gap), y))
    return sheet


def _remark(entry: Entry) -> str:
    if entry.is_full:
        return f"{entry.timing.median:.2f} s"
    return f"{entry.speedup.median:.2f}x, {entry.psnr:.1f} dB"


def _make_table(comparison: Comparison) -> Listing:
    notes = [
        "Speed-up: whole pictures, text encoder and decoder included; median and range over the "
        f"{len(comparison.prompts)} prompts, each drawn by all in turn.",
        "Predicted: from multiply-accumulates of the UNet alone.",
        "PSNR (in dB) and SSIM: against the full run's picture from the same seed. They say "
        "whether it is the same picture, not whether it is a good one.",
        "Kept: the most memory that inherited features took at any time.",
    ]
    if any(entry.clip is not None for entry in comparison.entries):
        notes.append("CLIP: agreement of picture and prompt, by the small CLIP beside the model.")
    return Listing("Results", tabulate_comparison(comparison), notes)


def _make_grid(comparison: Comparison) -> Grid:
    rows = [(e.contestant.name, _remark(e), e.pictures) for e in comparison.entries]
    return Grid(
        "The same prompts, the same seeds",
        comparison.prompts,
        rows,
        [f"{e.contestant.name}: {e.contestant.summary}." for e in comparison.entries],
    )


def _make_differences(comparison: Comparison) -> Grid:
    first, *others = comparison.entries
    apart = list_differences(first.pictures, {e.contestant.name: e.pictures for e in others})
    rows = [(name, "minus full", pictures) for name, pictures in apart.items()]
    return Grid("What differs from the full run", comparison.prompts, rows, [NOTE])


def _make_plot(comparison: Comparison) -> Chart:
    points = [
        Point(
            name=e.contestant.name,
            x=e.speedup.median,
            y=e.psnr,
            low=e.speedup.low,
            high=e.speedup.high,
            is_rival=e.contestant.name == FEWER,
        )
        for e in comparison.entries
        if e.psnr is not None
    ]
    drawing = plot_tradeoff(points, x_name="measured speed-up", y_name="PSNR to the full run, dB")
    return Chart(
        "Speed against fidelity",
        [drawing],
        [
            "Further right is faster, further up is closer to the full run; a bar is the range "
            "over the prompts. Fewer steps, a diamond in another colour, needs no plan.",
            DECIBELS,
        ],
    )


def _make_plans(comparison: Comparison) -> Chart:
    drawings = [
        draw_plan(
            e.contestant.plan,
            comparison.anatomy,
            f"{e.contestant.name}: {e.contestant.summary}",
            name=f"plan-{e.contestant.name}",
        )
        for e in comparison.entries
        if e.contestant.plan is not None
    ]
    return Chart(
        "The plans",
        drawings,
        [
            "A column is a step of the sampler, a line is a unit of the UNet from input to output. "
            "An idle unit is one that nobody reads at that step."
        ],
    )


def _make_method(comparison: Comparison) -> Prose:
    return Prose(
        "How this was measured",
        [
            f"Sampler {comparison.sampler}, {comparison.steps} steps, guidance "
            f"{comparison.guidance:g}, prompt i from seed {comparison.seed} + i. One warm-up, then "
            "every prompt is drawn by all contestants in turns, so that a slow spell of the "
            "machine hits all alike.",
        ],
    )
