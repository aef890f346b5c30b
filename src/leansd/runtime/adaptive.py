"""Adaptive plans at run time: every picture of a batch inherits, or not, on its own.

Each picture has a branch of its own: its program, what it keeps, how far it has drifted. A picture
that drifted too far at a call goes on with a program that has this call computed in full, so that
what is kept, what a forecast draws on and what is released follow from liveness as ever. A unit
that some pictures compute and others do not runs on the rows of those that do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from leansd.plans.anatomy import HEAD
from leansd.plans.liveness import Call, Lane, Program
from leansd.plans.row import SAMPLE, Drift
from leansd.runtime.clock import Tick
from leansd.runtime.gauges import GAUGES, Gauge, Rows
from leansd.runtime.passes import Branch, Pass, Step
from leansd.runtime.rows import join_rows, map_rows, split_rows
from leansd.runtime.store import unwrap


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture of a run: its features, and how far it has drifted."""

    branch: Branch
    gauge: Gauge


@dataclass(eq=False)
class Turn:
    """One picture in one call."""

    picture: Picture
    step: Pass
    probe: Rows = field(default_factory=dict[Lane, torch.Tensor])

    def upgrade(self, program: Program) -> None:
        """Go on with a program that computes this call in full."""
        self.picture.branch.program = program
        self.step.call = program[self.step.call.index]

    def pick(self, rows: torch.Tensor) -> Rows:
        """This picture's rows by lane."""
        return {lane: self.step.pick(rows, lane) for lane in self.step.call.lanes}


class AdaptiveBranch(Branch):
    """The state of a run under a plan with a drift: a branch for every picture."""

    def __init__(self, drift: Drift, count_pictures: Callable[[int], int]) -> None:
        super().__init__()
        self._drift = drift
        self._count_pictures = count_pictures
        self._pictures: tuple[Picture, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(each.branch.bytes + each.gauge.bytes for each in self._pictures)

    def clear(self) -> None:
        for each in self._pictures:
            each.branch.clear()
            each.gauge.clear()

    def start_over(self, program: Program, sample: torch.Tensor, guided: bool) -> None:
        super().start_over(program, sample, guided)
        count = self._count_pictures(sample.shape[0])
        pictures = [Picture(Branch(), GAUGES[self._drift.measure]()) for _ in range(count)]
        for each in pictures:
            each.branch.start_over(program, sample, guided)
        self._pictures = tuple(pictures)

    def take(self, tick: Tick, latents: torch.Tensor) -> Step:
        self._last = tick.index
        rows = split_rows(latents, len(self._pictures))
        turns = [
            Turn(each, each.branch.open(tick, own))
            for each, own in zip(self._pictures, rows, strict=True)
        ]
        return AdaptivePass(turns, self._drift)


class AdaptivePass:
    """One UNet call of a batch whose pictures may do different things: a `Step`."""

    def __init__(self, turns: Sequence[Turn], drift: Drift) -> None:
        self._turns = turns
        self._here = turns
        """Those whose rows are in the arguments of the module that runs."""
        self.writable = False
        self._threshold = drift.threshold
        program = turns[0].picture.branch.program
        assert program is not None
        self._probe = program.probe
        if self._probe == SAMPLE:
            self._observe([turn.step.latents for turn in turns])

    @property
    def call(self) -> Call:
        """The first picture's call; lanes and guidance are those of all."""
        return self._turns[0].step.call

    @property
    def calls(self) -> tuple[Call, ...]:
        return tuple(turn.step.call for turn in self._turns)

    def run_unit(self, at: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a unit, or a part of one, gives: each picture's own, computed together."""
        here = self._here
        running = [turn for turn in here if at in turn.step.call.pattern.active]
        given = args[0]
        if not running:
            output = here[0].step.shapes[at].wrap(self.give(at, given))
        else:
            if any(turn.step.keeps_change(at) for turn in running):
                given = given.detach().clone()  # the unit may overwrite it
            computed = self._run_some(running, forward, args, kwargs)
            output = self._share_out(at, running, computed, split_rows(given, len(here)))
        if at == self._probe:
            self._observe(split_rows(unwrap(output), len(here)))
        if at == HEAD:
            self._settle(unwrap(output))
        return output

    def _run_some(
        self, running: Sequence[Turn], forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """A module's forward on the rows of some pictures."""
        here = self._here
        if len(running) == len(here):
            return forward(*args, **kwargs)
        places = [here.index(turn) for turn in running]

        def take(tensor: torch.Tensor) -> torch.Tensor:
            return join_rows([tensor[place :: len(here)] for place in places])

        batch = args[0].shape[0]
        args, kwargs = map_rows(args, batch, take), map_rows(kwargs, batch, take)
        self._here = running
        try:
            return forward(*args, **kwargs)
        finally:
            self._here = here

    def _share_out(
        self, at: str, running: Sequence[Turn], computed: Any, given: Sequence[torch.Tensor]
    ) -> Any:
        """Let every picture keep its rows of what was computed, or give what it inherits."""
        rows = split_rows(unwrap(computed), len(running))
        own = {id(turn): each for turn, each in zip(running, rows, strict=True)}
        outputs: list[torch.Tensor] = []
        for turn, mine in zip(self._here, given, strict=True):

            def forward(_: torch.Tensor, turn: Turn = turn) -> Any:
                return _wrap_like(computed, own[id(turn)])

            outputs.append(unwrap(turn.step.run_unit(at, forward, mine)))
        if len(running) == len(self._here):
            return computed
        return _wrap_like(computed, join_rows(outputs))

    def give(self, at: str, given: torch.Tensor | None = None) -> torch.Tensor:
        """The output of what no picture computes; `given` is its present input."""
        here = self._here
        rows = [None] * len(here) if given is None else split_rows(given, len(here))
        if all(at in turn.step.call.pattern.idle for turn in here):
            batch = sum(turn.step.batch for turn in here)
            shape = here[0].step.shapes[at]
            return shape.make_placeholder(batch, writable=self.writable)
        output = join_rows(
            [turn.step.give(at, mine) for turn, mine in zip(here, rows, strict=True)]
        )
        if at == HEAD:
            self._settle(output)
        return output

    def correct(self, noise: torch.Tensor) -> torch.Tensor:
        return join_rows([step.correct(own) for step, own in self.split(noise)])

    @property
    def skips_unet(self) -> bool:
        return all(turn.step.skips_unet for turn in self._turns)

    def skips(self, units: Sequence[str]) -> bool:
        return all(turn.step.skips(units) for turn in self._here)

    def split(self, tensor: torch.Tensor) -> list[tuple[Pass, torch.Tensor]]:
        rows = split_rows(tensor, len(self._turns))
        return [(turn.step, mine) for turn, mine in zip(self._turns, rows, strict=True)]

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return join_rows(tensors)

    def release(self) -> None:
        """Drop what no later call reads."""
        for turn in self._turns:
            branch, index = turn.picture.branch, turn.step.call.index
            program = branch.program
            assert program is not None
            # All else: what was kept for this call is of no use to a picture that computed it.
            branch.store.retain(program.alive[index - program.start])
            if not any(call.inherits for call in program.calls[index - program.start + 1 :]):
                turn.picture.gauge.clear()

    def _observe(self, probe: Sequence[torch.Tensor]) -> None:
        """Take every picture's probe, and compute those in full that have drifted too far."""
        for turn, rows in zip(self._turns, probe, strict=True):
            turn.probe = {lane: own.detach().clone() for lane, own in turn.pick(rows).items()}
        if not self.call.inherits:
            return
        drifts = [turn.picture.gauge.measure(turn.probe) for turn in self._turns]
        upgraded: dict[int, Program] = {}
        # The one time that a call waits for the device.
        values = cast(list[float], torch.stack(drifts).tolist())
        for turn, drift in zip(self._turns, values, strict=True):
            if drift < self._threshold:
                continue
            program = turn.picture.branch.program
            assert program is not None
            if id(program) not in upgraded:
                upgraded[id(program)] = program.upgrade(turn.step.call.index)
            turn.upgrade(upgraded[id(program)])

    def _settle(self, output: torch.Tensor) -> None:
        for turn, rows in zip(self._turns, split_rows(output, len(self._turns)), strict=True):
            computed = turn.step.call.computes_all
            turn.picture.gauge.settle(turn.probe, turn.pick(rows), computed=computed)


def _wrap_like(output: Any, tensor: Any) -> Any:
    return (tensor,) if isinstance(output, tuple) else tensor
