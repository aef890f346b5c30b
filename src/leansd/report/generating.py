"""Pictures drawn in full and after a plan, as a report."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from leansd.drawing import Painting, Request
from leansd.evaluation.fidelity import psnr, ssim
from leansd.plans.anatomy import Anatomy
from leansd.plans.document import encode_plan
from leansd.plans.plan import Plan
from leansd.report.differences import NOTE, list_differences
from leansd.report.drawings import draw_plan
from leansd.report.sections import (
    Attachment,
    Chart,
    Grid,
    Listing,
    Origin,
    Report,
)
from leansd.report.words import count
from leansd.text import Table


@dataclass(frozen=True)
class Pair:
    """One request, drawn both ways."""

    request: Request
    full: Painting
    planned: Painting

    @property
    def gain(self) -> float:
        """Times faster."""
        return self.full.seconds / self.planned.seconds


def make_report(pairs: Sequence[Pair], plan: Plan, anatomy: Anatomy, origin: Origin) -> Report:
    """The pictures and their differences, times and fidelity, the plan."""
    full = [pair.full.image for pair in pairs]
    planned = [pair.planned.image for pair in pairs]
    close = [float(each) for each in psnr(planned, full)]
    alike = [float(each) for each in ssim(planned, full)]
    gain = statistics.median(pair.gain for pair in pairs)
    apart = list_differences(full, {plan.name: planned})[plan.name]
    what = "A picture was" if len(pairs) == 1 else f"{len(pairs)} pictures were"
    return Report(
        title=f"{plan.name} beside the full run",
        summary=(
            f"{what} drawn {gain:.1f} times faster with plan {plan.name}, "
            f"{statistics.fmean(close):.0f} dB close to what the full run draws (above about 40 "
            "differences are hard to see)."
        ),
        measured=f"{count(len(pairs), 'picture')} drawn by {anatomy.name} in full and after "
        f"{plan.name} from the same seeds, one after the other",
        sections=[
            Grid(
                "The same prompts, the same seeds",
                [pair.request.prompt for pair in pairs],
                [
                    ("full", "", full),
                    (plan.name, f"{gain:.2f}x", planned),
                    ("difference", f"{plan.name} - full", apart),
                ],
                [NOTE],
            ),
            Listing(
                "Time and fidelity",
                Table(
                    ("prompt", "seed", "full", plan.name, "speed-up", "PSNR", "SSIM"),
                    tuple(
                        _show(pair, *scores)
                        for pair, *scores in zip(pairs, close, alike, strict=True)
                    ),
                ),
                [
                    "Time of the whole call, once each: leansd demo and leansd bench take turns "
                    "and say how sure they are.",
                ],
            ),
            Chart("The plan", [draw_plan(plan, anatomy, plan.name)]),
        ],
        origin=origin,
        attachments=[Attachment("plan.json", encode_plan(plan), "the plan")],
    )


def _show(pair: Pair, close: float, alike: float) -> tuple[str, ...]:
    return (
        pair.request.prompt,
        str(pair.request.seed),
        f"{pair.full.seconds:.2f} s",
        f"{pair.planned.seconds:.2f} s",
        f"{pair.gain:.2f}x",
        f"{close:.1f} dB",
        f"{alike:.3f}",
    )
