"""A benchmark as report sections."""

from __future__ import annotations

from collections.abc import Sequence

from leansd.faces.pareto import draw_pareto, encode_figure
from leansd.faces.report.sections import Chart, Drawing, Listing, Prose, Section
from leansd.faces.standings import (
    Standing,
    describe_quality,
    list_left_out,
    tabulate_all,
    tabulate_margins,
)
from leansd.measuring.contest import FULL
from leansd.measuring.evaluation import CONVERGED
from leansd.measuring.resuming import get_field


def make_sections(standings: Sequence[Standing]) -> list[Section]:
    """For every contest the margins, the plots and everything that was measured."""
    sections: list[Section] = []
    for standing in standings:
        left_out = [f"Left out: {line}." for line in list_left_out(standing)]
        quality = describe_quality(standing)
        notes = [*left_out, *([f"Quality of {quality}."] if quality else [])]
        sections += [
            Listing(standing.title, tabulate_margins(standing), notes),
            Chart("Speed-up against fidelity", [_draw(standing, FULL), _draw(standing, CONVERGED)]),
            Listing("All contestants", tabulate_all(standing)),
        ]
    return [*sections, Prose("How this was measured", describe_method(standings[0]))]


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
        f"{get_field(first, 'batch')}, picture i from seed {first.seed} + i. {first.device}; "
        f"leansd {first.leansd}, torch {first.torch}, diffusers {first.diffusers}, Python "
        f"{first.python}; {first.time}.",
    ]


def _draw(standing: Standing, reference: str) -> Drawing:
    svg = encode_figure(draw_pareto(standing, reference), "svg").decode()
    alt = f"Speed-up against PSNR to {reference}: {standing.title}"
    return Drawing(svg[svg.index("<svg") :], alt)
