"""A duel: the full run and the planned run of one request, in turns, told step by step.

In turns, because two runs at once on one device slow each other down and neither time would be
true. The first run on a pipeline is preceded by a short one that is not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from PIL.Image import Image

from leansd.drawing import Painting, Request, paint
from leansd.evaluation.fidelity import psnr, ssim
from leansd.evaluation.timing import Ratio, Timing, compare_timings
from leansd.plans.plan import Plan
from leansd.ui.tickets import Ticket

Side = Literal["full", "lean"]
SIDES: tuple[Side, Side] = ("full", "lean")
WARM_UP = 2
"""Steps of the run that is not timed."""


@dataclass(frozen=True)
class Progress:
    """How far a duel is: the side that runs, and the steps that each has done in this round."""

    side: Side | None
    done: dict[Side, int]
    steps: int
    turn: int
    rounds: int
    seconds: dict[Side, float]
    """Of the latest finished run of each side."""

    def end(self) -> Progress:
        """When both runs of the last round are over."""
        return replace(self, side=None, done=dict.fromkeys(SIDES, self.steps))


@dataclass(frozen=True)
class Outcome:
    """Both pictures, how long each took, and how close they are."""

    full: Image
    lean: Image
    timings: dict[Side, Timing]
    """Seconds of whole pipeline calls, one a round."""
    speedup: Ratio
    predicted: float
    """Of the UNet, by its multiply-accumulates."""
    psnr: float
    ssim: float
    calls: int
    full_calls: int
    bytes_kept: int


def hold_duel(
    pipe: Any,
    request: Request,
    plan: Plan,
    *,
    rounds: int = 1,
    warm: bool = True,
    ticket: Ticket | None = None,
    tell: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Draw a request in full and by a plan, `rounds` times, the first to run changing every round.

    Args:
        warm: whether the pipeline has run before; else it runs for two steps first.
        ticket: stops it at the next step.

    Raises:
        Stopped: the ticket was.
    """
    ticket = ticket or Ticket()
    ticket.check()
    if not warm:
        tell(Progress(None, {"full": 0, "lean": 0}, request.steps, 0, rounds, {}))
        paint(pipe, replace(request, steps=WARM_UP), None, lambda done, total: ticket.check())
    seconds: dict[Side, list[float]] = {side: [] for side in SIDES}
    paintings: dict[Side, Painting] = {}
    plans: dict[Side, Plan | None] = {"full": None, "lean": plan}
    for turn in range(rounds):
        done: dict[Side, int] = {"full": 0, "lean": 0}
        for side in SIDES if turn % 2 == 0 else SIDES[::-1]:

            def step(count: int, total: int, side: Side = side, turn: int = turn) -> None:
                ticket.check()
                done[side] = count  # noqa: B023
                last: dict[Side, float] = {each: laps[-1] for each, laps in seconds.items() if laps}
                tell(Progress(side, dict(done), total, turn, rounds, last))  # noqa: B023

            step(0, request.steps)
            paintings[side] = paint(pipe, request, plans[side], step)
            seconds[side].append(paintings[side].seconds)
            last: dict[Side, float] = {each: laps[-1] for each, laps in seconds.items() if laps}
            tell(Progress(None, dict(done), request.steps, turn, rounds, last))
    return _judge(paintings, seconds)


def _judge(paintings: dict[Side, Painting], seconds: dict[Side, list[float]]) -> Outcome:
    full, lean = paintings["full"].image, paintings["lean"].image
    report = paintings["lean"].report
    assert report is not None
    timings: dict[Side, Timing] = {side: Timing(tuple(laps)) for side, laps in seconds.items()}
    return Outcome(
        full,
        lean,
        timings,
        compare_timings(timings["full"], timings["lean"]),
        report.predicted_speedup,
        float(psnr([lean], [full])[0]),
        float(ssim([lean], [full])[0]),
        report.calls,
        report.full_calls,
        report.bytes_kept,
    )
