"""Drift: how much everything in a UNet changes from step to step, and what inheriting it costs.

One pass over full runs. Beside every UNet call, the same call is made again with one cut inheriting
from the steps before, which gives the error of that one step; the run itself goes on in full.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from leansd.anatomy.reading import read_anatomy
from leansd.core.devices import make_exact
from leansd.errors import LeansdError
from leansd.evaluation.records import Record, stamp
from leansd.evaluation.runs import CallSet, run_calls
from leansd.plans.anatomy import HEAD, Anatomy
from leansd.plans.liveness import Pattern, find_pattern
from leansd.plans.methods import METHODS, weigh
from leansd.plans.row import How
from leansd.runtime.arguments import Shape, unwrap
from leansd.runtime.clock import CallPosition, SchedulerClock
from leansd.runtime.engine import list_followers
from leansd.runtime.guidance import is_guided
from leansd.runtime.hooks import ForwardHooks
from leansd.tuning.host import require_one_call_a_step

UNET = "unet"
GAPS = (1, 2, 3)
WAYS: tuple[How, ...] = ("reuse", "forecast", "forecast2")
REACH = max(GAPS) * max(METHODS[how].depth for how in WAYS)
"""Steps back that an inherited output can draw on."""


def measure_drift(
    pipe: Any,
    calls: CallSet,
    steps: int,
    *,
    cuts: Sequence[str] | None = None,
    subject: str = "",
) -> list[Record]:
    """What changes from step to step, as records; all values are relative, root mean square.

    `unit_drift`      a unit's output less the one a step before, over itself; by step and lane.
    `guidance_drift`  the same of conditional minus unconditional output.
    `cut_error`       the UNet's output with a cut inheriting, less the computed one, over it; by
                      step, `how` and `gap`: made from the outputs one, two and three gaps before.

    Args:
        cuts: addresses that inherit in turn; every up block but the last, and `head`, by default.

    Raises:
        LeansdError: the pipeline follows a plan, or calls its UNet more than once a step.
    """
    if list_followers(pipe.unet):
        raise LeansdError("drift is of full runs: release the plan that the UNet follows first")
    require_one_call_a_step(pipe.scheduler, steps)
    anatomy = read_anatomy(pipe.unet)
    chosen = [f"up{place}" for place in range(anatomy.up_blocks - 1)] if cuts is None else cuts
    watch = _Watch(pipe, anatomy, dict.fromkeys([*chosen, HEAD]))
    modules = {unit.at: pipe.unet.get_submodule(unit.path) for unit in anatomy.units}
    with ForwardHooks({UNET: pipe.unet, **modules}, watch.around):
        run_calls(pipe, calls, steps)
    shared: dict[str, Any] = {
        **stamp(pipe.device),
        "subject": subject or type(pipe).__name__,
        "plan": "no plan",
        "unit": "",
        "seed": calls.seed,
        "steps": steps,
        "sampler": type(pipe.scheduler).__name__,
        "calls": len(calls),
    }
    return [
        Record(**shared, **dict(fields), value=math.sqrt(over / under) if under else 0.0)
        for fields, (over, under) in watch.read_sums().items()
    ]


class _Watch:
    """Hooked around a UNet and its units: sees what they give, and tries what they might."""

    def __init__(self, pipe: Any, anatomy: Anatomy, cuts: Mapping[str, None]) -> None:
        self._sums: defaultdict[tuple[tuple[str, Any], ...], list[Tensor | float]] = defaultdict(
            lambda: [0.0, 0.0]
        )
        """On the device, where they are added up."""
        self._pipe = pipe
        self._clock = SchedulerClock(pipe)
        self._patterns = {
            cut: find_pattern(anatomy, dict.fromkeys(anatomy.select(cut).addresses, "reuse"))
            for cut in cuts
        }
        self._kept = {at for pattern in self._patterns.values() for at in pattern.inherited}
        self._now: dict[str, Tensor] = {}
        self._past: list[dict[str, Tensor]] = []
        """What the units gave at the steps before, latest first; all of them only at the latest."""
        self._given: Mapping[str, Tensor] | None = None
        """While a call is tried: what is not computed in it."""
        self._shapes: dict[str, Shape] = {}

    def around(self, at: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if at == UNET:
            return self._run_unet(forward, *args, **kwargs)
        if self._given is not None:
            given = self._given.get(at)
            return (
                forward(*args, **kwargs) if given is None else self._shapes[at].wrap(given.clone())
            )
        output = forward(*args, **kwargs)
        self._now[at] = unwrap(output).detach().clone()
        self._shapes[at] = Shape.of(output)
        return output

    def _run_unet(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        tick = self._clock.locate(args[1] if len(args) > 1 else kwargs["timestep"])
        output = forward(*args, **kwargs)
        if tick is None:
            return output
        if tick.starts:
            self._past = []
        if self._past:
            self._note_changes(tick.index)
        for cut, pattern in self._patterns.items():
            self._try_cut(cut, pattern, tick, lambda: forward(*args, **kwargs)[0])
        latest = [{at: each[at] for at in self._kept} for each in self._past[: REACH - 1]]
        self._past, self._now = [self._now, *latest], {}
        return output

    def read_sums(self) -> dict[tuple[tuple[str, Any], ...], tuple[float, float]]:
        """By fields of a record, sums: squares of a difference, and of what it is relative to."""
        both = [torch.as_tensor(each) for pair in self._sums.values() for each in pair]
        values = torch.stack(both).tolist() if both else []
        return dict(zip(self._sums, zip(values[::2], values[1::2], strict=True), strict=True))

    def _note_changes(self, step: int) -> None:
        guided = is_guided(self._pipe, len(self._now[HEAD]))
        lanes = ("rest", "cond") if guided else ("all",)
        for at, now in self._now.items():
            before = self._past[0][at].chunk(len(lanes))
            for lane, new, old in zip(lanes, now.chunk(len(lanes)), before, strict=True):
                self._add(new - old, new, metric="unit_drift", at=at, step=step, lane=lane)
        if guided:
            new, old = (
                cond - rest
                for rest, cond in (each[HEAD].chunk(2) for each in (self._now, self._past[0]))
            )
            self._add(new - old, new, metric="guidance_drift", step=step)

    def _try_cut(
        self, cut: str, pattern: Pattern, tick: CallPosition, run: Callable[[], Tensor]
    ) -> None:
        """One call with the cut inheriting, for every way and gap that there are outputs for."""
        true = self._now[HEAD]
        resting = {at: self._now[at] for at in pattern.idle}
        for how in WAYS:
            for gap in GAPS:
                back = [gap * (place + 1) for place in range(METHODS[how].depth)]
                if back[-1] > len(self._past):
                    continue
                points = [tick.schedule.log_snr[tick.index - each] for each in back]
                weights = [weigh(tick.schedule.log_snr[tick.index], p, points) for p in points]
                made = {
                    at: torch.stack(
                        [w * self._past[b - 1][at] for w, b in zip(weights, back, strict=True)]
                    ).sum(0)
                    for at in pattern.inherited
                }
                self._given = {**resting, **made}
                try:
                    output = made[HEAD] if HEAD in made else run()
                finally:
                    self._given = None
                fields = {"metric": "cut_error", "at": cut, "step": tick.index}
                self._add(output - true, true, **fields, how=how, gap=gap)

    def _add(self, difference: Tensor, whole: Tensor, **fields: Any) -> None:
        sums = self._sums[tuple(fields.items())]
        for place, tensor in enumerate((difference, whole)):
            sums[place] = sums[place] + make_exact(tensor).square().sum()
