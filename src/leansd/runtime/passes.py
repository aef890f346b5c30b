"""One UNet call under a plan: every unit asks it what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from leansd.plans.anatomy import HEAD
from leansd.plans.liveness import GUIDANCE, Call, Kept, Lane, Program
from leansd.plans.plan import How
from leansd.runtime.clock import Course, Tick
from leansd.runtime.store import RECALLS, Shape, Store, unwrap


class Branch:
    """The state of one run for one of the calls that a pipeline makes at each step.

    Ordinary pipelines make one; those that call the UNet for each guidance branch, or for each tile
    of a panorama, make several, and each has features of its own.
    """

    def __init__(self) -> None:
        self.store = Store()
        self.shapes: dict[str, Shape] = {}
        self.program: Program | None = None
        self._last = -1
        self._signature: object = None

    def expects(self, index: int, sample: torch.Tensor, guided: bool) -> bool:
        """Whether this is the next call, with a batch like the one before."""
        return self.follows(index) and self._signature == _sign(sample, guided)

    def follows(self, index: int) -> bool:
        """Whether this is the next call."""
        return self.program is not None and index == self._last + 1

    def start_over(self, program: Program, sample: torch.Tensor, guided: bool) -> None:
        """Forget everything and follow `program`, whose first call computes in full."""
        self.store.clear()
        self.shapes.clear()
        self.program, self._signature = program, _sign(sample, guided)

    def completes(self, index: int, sample: torch.Tensor) -> bool:
        """Whether this is the unconditional call to the conditional one just made."""
        joined = self._last == index and self._signature == _sign(sample, True)
        return self.program is not None and joined and self.store.has([keep_for_rest(index)])

    def take(self, tick: Tick, batch: int, apart: Lane | None = None) -> Pass:
        """The pass for this call, whose sample has `batch` rows; `apart` if all are of one lane."""
        assert self.program is not None
        self._last = tick.index
        call, records = self.program[tick.index], tick.index == self.program.start
        return Pass(self, call, tick.course, batch, records=records, apart=apart)


def _sign(sample: torch.Tensor, guided: bool) -> object:
    return sample.shape, sample.dtype, sample.device, guided


def keep_for_rest(index: int) -> Kept:
    """The conditional output of a call, kept until the unconditional call that belongs to it."""
    return Kept(GUIDANCE, index, "output", "cond")


class Pass:
    """One UNet call: answers every unit's question what to do."""

    def __init__(
        self,
        branch: Branch,
        call: Call,
        course: Course,
        batch: int,
        *,
        records: bool,
        apart: Lane | None = None,
    ) -> None:
        self.branch = branch
        self.call = call
        self.apart = apart
        """The lane whose call it is, where a pipeline calls the two apart."""
        self.lanes = call.lanes if apart is None else (apart,)
        """The lanes in this batch."""
        self.batch = batch // 2 if call.is_half and apart is None else batch
        """Rows that run."""
        self.writable = False
        """Whether placeholders may be written to."""
        self._course = course
        self._records = records

    def run_unit(self, at: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a unit, or a part of one, gives in this call."""
        if at not in self.call.pattern.active:
            return self.branch.shapes[at].wrap(self.give(at, args[0]))
        keeps = [kept for kept in self.call.keeps.get(at, ()) if kept.lane in self.lanes]
        # The unit may overwrite its input, so what a change is measured against is copied first.
        changes = any(kept.what == "change" for kept in keeps)
        given = args[0].detach().clone() if changes else None
        output = forward(*args, **kwargs)
        for kept in keeps:
            before = self.pick(given, kept.lane) if kept.what == "change" else None
            self.branch.store.keep(kept, self.pick(unwrap(output), kept.lane), before)
        if self._records:
            self.branch.shapes[at] = Shape.of(output)
        return output

    def give(self, at: str, given: torch.Tensor | None = None) -> torch.Tensor:
        """The output of what is not computed; `given` is its present input."""
        pattern = self.call.pattern
        how = pattern.inherited.get(at) or pattern.parts.get(at)
        if how is None:
            shape = self.branch.shapes[at]
            return shape.make_placeholder(self.batch, writable=self.writable)
        lanes = []
        for lane, sources in zip(self.call.lanes, self.call.sources[at], strict=True):
            if lane not in self.lanes:
                continue
            part = self.pick(given, lane) if given is not None else None
            lanes.append(self.recall(how, sources, part))
        return lanes[0] if len(lanes) == 1 else torch.cat(lanes)

    def recall(
        self, how: How, sources: Sequence[Kept], given: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One lane of an output made from what was kept."""
        return RECALLS[how](self.branch.store, sources, self.call.index, self._course, given)

    def correct(self, noise: torch.Tensor) -> torch.Tensor:
        """The UNet's computed output [B, C, H, W] moved away from its forecast (`Plan.correct`)."""
        lanes = zip(self.call.lanes, self.call.corrects, strict=True)
        forecasts = [self.recall("forecast", each) for lane, each in lanes if lane in self.lanes]
        return torch.lerp(torch.cat(forecasts), noise, 1 + self.call.correct)

    def pick(self, tensor: torch.Tensor, lane: Lane) -> torch.Tensor:
        """The rows of one lane; in a call that runs one lane, all there are."""
        if len(self.lanes) == 1:
            return tensor
        rest, cond = tensor.chunk(2)
        return cond if lane == "cond" else rest

    @property
    def skips_unet(self) -> bool:
        """Whether the output follows from what is kept alone."""
        return self.call.pattern.inherited.get(HEAD, "residual") != "residual"

    def skips(self, units: Sequence[str]) -> bool:
        """Whether none of these units runs or needs its input."""
        pattern = self.call.pattern
        return all(
            at in pattern.idle or pattern.inherited.get(at, "residual") != "residual"
            for at in units
        )
