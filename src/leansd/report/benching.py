"""A benchmark as a report."""

from __future__ import annotations

import re
from collections.abc import Sequence

from leansd.evaluation.compare import CONVERGED
from leansd.evaluation.contest import FULL, OURS
from leansd.evaluation.margins import find_front
from leansd.evaluation.resuming import get_field
from leansd.faces.standings import (
    Standing,
    describe_quality,
    list_left_out,
    tabulate_all,
    tabulate_margins,
)
from leansd.report.differences import DECIBELS
from leansd.report.plots import Family, plot_families
from leansd.report.sections import (
    Chart,
    Drawing,
    Listing,
    Origin,
    Prose,
    Report,
    Section,
    attach_records,
)
from leansd.report.words import count


def make_report(standings: Sequence[Standing], origin: Origin) -> Report:
    """For every contest the plots, the margins and everything that was measured."""
    sections: list[Section] = []
    for standing in standings:
        sections += _make_contest(standing)
    sections.append(Prose("How this was measured", describe_method(standings[0])))
    first = next(iter(standings[0].cells.values()))
    drawn = get_field(first, "calls")
    return Report(
        title=f"Lean plans and their rivals on {first.subject}",
        summary=summarise(standings),
        measured=f"{count(len(standings), 'contest')} on {first.subject}, {drawn} pictures each, "
        "everybody in turns in one process",
        sections=sections,
        origin=origin,
        attachments=[attach_records([r for each in standings for r in each.cells.values()])],
    )


def summarise(standings: Sequence[Standing]) -> str:
    """Who is closest to the full run at twice the speed, over all contests."""
    margins = [each.find_margins(speeds=(2.0,))[0] for each in standings]
    told = [margin.value for margin in margins if margin.value is not None]
    ahead = sum(value > 0 for value in told)
    if not told:
        return "Nobody can be compared at twice the speed: one side has nothing that is so fast."
    if len(told) == 1:
        word = "closer to" if ahead else "further from"
        return (
            f"At twice the speed, pictures drawn after our plans are {word} the originals than "
            f"those of the best other method: by {abs(told[0]):.1f} dB."
        )
    return (
        f"At twice the speed, our plans' pictures are closer to the originals than those "
        f"of the best other method in {ahead} of {len(told)} contests, by {min(told):+.1f} to "
        f"{max(told):+.1f} dB."
    )


def _make_contest(standing: Standing) -> list[Section]:
    left_out = [f"Left out: {line}." for line in list_left_out(standing)]
    quality = describe_quality(standing)
    notes = [
        DECIBELS,
        *left_out,
        *([f"Quality of {quality}."] if quality else []),
    ]
    title = _capitalise(standing.title)
    return [
        Chart(
            f"{title}: speed against fidelity",
            [draw_front(standing, FULL), draw_front(standing, CONVERGED)],
            ["Further right is faster, further up is closer. A line joins what no other of its "
             "kind beats; ours is strong."],
        ),
        Listing(f"{title}: ours and the best rival", tabulate_margins(standing), notes),
        Listing(f"{title}: all contestants", tabulate_all(standing)),
    ]  # fmt: skip


def _capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]


def draw_front(standing: Standing, reference: str = FULL) -> Drawing:
    """All contestants of a contest, a line a family."""
    families = [
        Family(
            family,
            [(point.speed, point.quality) for point in points],
            [(point.speed, point.quality) for point in find_front(points)],
            is_ours=family == OURS,
        )
        for family, points in standing.list_points(reference).items()
    ]
    slug = re.sub(r"[^A-Za-z0-9-]+", "-", standing.slug)
    return plot_families(
        families,
        x_name="speed-up, measured, whole pipeline",
        y_name=f"PSNR to the {reference} run, dB",
        name=slug if reference == FULL else f"{slug}-{reference}",
        caption=f"Against the {reference} run.",
    )


def describe_method(standing: Standing) -> list[str]:
    """The circumstances and how to read the tables."""
    first = next(iter(standing.cells.values()))
    return [
        "A round is one batch drawn by everybody in turns; a speed-up is the median of the rounds' "
        "own ratios to the full run, with their range. Time is that of the whole pipeline call; a "
        "warm-up round does not count. Pictures and times are of the same runs.",
        "A point counts for every speed up to its own. Between neighbouring points of its front a "
        "rival is taken to reach what lies on the line between them over the logarithm of the "
        "speed; ours is only what was measured.",
        "The converged run is the same sampler in many more steps: who only copies the full run's "
        "own discretisation error gains nothing there. Samplers of other names are rivals as well.",
        f"Model {first.subject}, {get_field(first, 'calls')} pictures in batches of "
        f"{get_field(first, 'batch')}, picture i from seed {first.seed} + i. The "
        f"first contest was held on {first.device}, {first.time}, with leansd {first.leansd}, "
        f"torch {first.torch} and diffusers {first.diffusers}.",
    ]
