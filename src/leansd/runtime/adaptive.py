"""Adaptive plans at run time: every picture of a batch inherits, or not, on its own.

Each picture has a branch of its own: its program, what it keeps, how far it has drifted. A picture
that drifted too far at a call goes on with a program that has this call computed in full, so that
what is kept, what a forecast draws on and what is released follow from liveness as ever. A unit
that some pictures compute and others do not runs on the rows of those that do.

A drift metric sees the probe of every call, by lane, and the UNet's output of those that computed
it. All its numbers stay on the device; whoever asks for several reads them at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from leansd.plans.anatomy import HEAD
from leansd.plans.liveness import Call, Lane, Program
from leansd.plans.row import SAMPLE, Drift, Measure
from leansd.runtime.arguments import join_rows, map_rows, split_rows, unwrap
from leansd.runtime.call import CacheBranch, UNetCall, UNetStep
from leansd.runtime.clock import CallPosition
from leansd.runtime.watch import CallSignature

Rows = Mapping[Lane, torch.Tensor]
"""A picture's part of a tensor, lane by lane."""


class ChangeMetric:
    """The relative change of the probe since the picture was last computed in full."""

    def __init__(self) -> None:
        self._then: dict[Lane, torch.Tensor] = {}

    def measure(self, probe: Rows) -> torch.Tensor:
        """The drift at a call that may inherit, a scalar; NaN where it is not known yet."""
        return _sum_change(probe, self._then) / _sum_size(self._then, probe)

    def settle(self, probe: Rows, output: Rows, *, computed: bool) -> None:
        """Note a call: its probe and, if the picture was `computed` in full, the UNet's output.

        `probe` is the metric's to keep, `output` is not.
        """
        if computed:
            self._then.update(probe)

    @property
    def bytes(self) -> int:
        return _count_bytes(self._then.values())

    def clear(self) -> None:
        """Keep nothing any more: no later call inherits."""
        self._then.clear()


class PredictedMetric:
    """The output's relative changes predicted from the probe's, summed (EasyCache)."""

    def __init__(self) -> None:
        self._last: dict[Lane, torch.Tensor] = {}
        """Probe of the call before."""
        self._probe: dict[Lane, torch.Tensor] = {}
        self._output: dict[Lane, torch.Tensor] = {}
        """Probe and output of the last full computation."""
        self._rate: torch.Tensor | None = None
        """The output's change for the probe's, between the last two full computations."""
        self._sum: torch.Tensor | float = 0.0
        self._next: torch.Tensor | float = 0.0
        """The sum, should this call inherit."""

    def measure(self, probe: Rows) -> torch.Tensor:
        change = _sum_change(probe, self._last)
        if self._rate is None:
            return torch.full_like(change, math.nan)
        self._next = self._sum + self._rate * (change / _sum_size(self._output, probe))
        return self._next

    def settle(self, probe: Rows, output: Rows, *, computed: bool) -> None:
        self._last.update(probe)
        self._sum = 0.0 if computed else self._next
        if not computed:
            return
        if self._output:
            self._rate = _sum_change(output, self._output) / _sum_change(probe, self._probe)
        self._probe.update(probe)
        self._output.update({lane: rows.detach().clone() for lane, rows in output.items()})

    @property
    def bytes(self) -> int:
        return _count_bytes(
            [*self._last.values(), *self._probe.values(), *self._output.values()],
        )

    def clear(self) -> None:
        for kept in (self._last, self._probe, self._output):
            kept.clear()
        self._rate, self._sum, self._next = None, 0.0, 0.0


DriftMetric = ChangeMetric | PredictedMetric
METRICS: dict[Measure, Callable[[], DriftMetric]] = {
    "change": ChangeMetric,
    "predicted": PredictedMetric,
}


def _sum_change(now: Rows, then: Rows) -> torch.Tensor:
    """Sum of absolute differences over the lanes of `now`."""
    lanes = [(rows - then[lane]).abs().sum(dtype=torch.float32) for lane, rows in now.items()]
    return torch.stack(lanes).sum()


def _sum_size(then: Rows, lanes: Iterable[Lane]) -> torch.Tensor:
    """Sum of absolute values over some lanes."""
    sizes = [then[lane].abs().sum(dtype=torch.float32) for lane in lanes]
    return torch.stack(sizes).sum()


def _count_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors, of which several may be the same."""
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


@dataclass(frozen=True, eq=False)
class SampleState:
    """One picture of a run: its features, and how far it has drifted."""

    branch: CacheBranch
    metric: DriftMetric


@dataclass(eq=False)
class SampleCall:
    """One picture in one call."""

    picture: SampleState
    step: UNetCall
    probe: Rows = field(default_factory=dict[Lane, torch.Tensor])

    def upgrade(self, program: Program) -> None:
        """Go on with a program that computes this call in full."""
        self.picture.branch.program = program
        self.step.call = program[self.step.call.index]

    def pick(self, rows: torch.Tensor) -> Rows:
        """This picture's rows by lane."""
        return {lane: self.step.pick(rows, lane) for lane in self.step.call.lanes}


class AdaptiveBranch(CacheBranch):
    """The state of a run under a plan with a drift: a branch for every picture."""

    def __init__(self, drift: Drift) -> None:
        super().__init__()
        self._drift = drift
        self._pictures: tuple[SampleState, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(each.branch.bytes + each.metric.bytes for each in self._pictures)

    def clear(self) -> None:
        for each in self._pictures:
            each.branch.clear()
            each.metric.clear()

    def start_over(self, program: Program, signature: CallSignature, pictures: int) -> None:
        super().start_over(program, signature, pictures)
        make = METRICS[self._drift.measure]
        self._pictures = tuple(SampleState(CacheBranch(), make()) for _ in range(pictures))
        for each in self._pictures:
            each.branch.start_over(program, signature, 1)

    def take(self, position: CallPosition, latents: torch.Tensor) -> UNetStep:
        self.last = position.index
        rows = split_rows(latents, len(self._pictures))
        samples = [
            SampleCall(each, each.branch.open(position, own))
            for each, own in zip(self._pictures, rows, strict=True)
        ]
        return AdaptiveCall(samples, self._drift)


class AdaptiveCall:
    """One UNet call of a batch whose pictures may do different things: a `UNetStep`."""

    def __init__(self, samples: Sequence[SampleCall], drift: Drift) -> None:
        self._samples = samples
        self._here = samples
        """The samples whose rows are in the arguments of the module that runs."""
        self.writable = False
        self.compiles = False
        self.apart: Lane | None = None
        self._threshold = drift.threshold
        program = samples[0].picture.branch.program
        assert program is not None
        self._probe = program.probe
        if self._probe == SAMPLE:
            self._observe([sample.step.latents for sample in samples])

    @property
    def call(self) -> Call:
        """The first picture's call; lanes and guidance are those of all."""
        return self._samples[0].step.call

    @property
    def calls(self) -> tuple[Call, ...]:
        return tuple(sample.step.call for sample in self._samples)

    def run_unit(self, at: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a unit, or a part of one, gives: each picture's own, computed together."""
        here = self._here
        running = [sample for sample in here if at in sample.step.call.pattern.active]
        given = args[0]
        if not running:
            output = here[0].step.shapes[at].wrap(self.give(at, given))
        else:
            if any(sample.step.keeps_input(at) for sample in running):
                given = given.detach().clone()  # the unit may overwrite it
            computed = self._run_some(running, forward, args, kwargs)
            output = self._share_out(at, running, computed, split_rows(given, len(here)))
        if at == self._probe:
            self._observe(split_rows(unwrap(output), len(here)))
        if at == HEAD:
            self._settle(unwrap(output))
        return output

    def _run_some(
        self, running: Sequence[SampleCall], forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """A module's forward on the rows of some pictures."""
        here = self._here
        if len(running) == len(here):
            return forward(*args, **kwargs)
        places = [here.index(sample) for sample in running]

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
        self, at: str, running: Sequence[SampleCall], computed: Any, given: Sequence[torch.Tensor]
    ) -> Any:
        """Let every picture keep its rows of what was computed, or give what it inherits."""
        rows = split_rows(unwrap(computed), len(running))
        own = {id(sample): each for sample, each in zip(running, rows, strict=True)}
        outputs: list[torch.Tensor] = []
        for sample, mine in zip(self._here, given, strict=True):

            def forward(_: torch.Tensor, sample: SampleCall = sample) -> Any:
                return _wrap_like(computed, own[id(sample)])

            outputs.append(unwrap(sample.step.run_unit(at, forward, mine)))
        if len(running) == len(self._here):
            return computed
        return _wrap_like(computed, join_rows(outputs))

    def give(self, at: str, given: torch.Tensor | None = None) -> torch.Tensor:
        """The output of what no picture computes; `given` is its present input."""
        here = self._here
        rows = [None] * len(here) if given is None else split_rows(given, len(here))
        if all(at in sample.step.call.pattern.idle for sample in here):
            batch = sum(sample.step.batch for sample in here)
            shape = here[0].step.shapes[at]
            return shape.make_placeholder(batch, writable=self.writable)
        output = join_rows(
            [sample.step.give(at, mine) for sample, mine in zip(here, rows, strict=True)]
        )
        if at == HEAD:
            self._settle(output)
        return output

    def correct(self, noise: torch.Tensor) -> torch.Tensor:
        return join_rows([step.correct(own) for step, own in self.split(noise)])

    @property
    def skips_unet(self) -> bool:
        return all(sample.step.skips_unet for sample in self._samples)

    def skips(self, units: Sequence[str]) -> bool:
        return all(sample.step.skips(units) for sample in self._here)

    def split(self, tensor: torch.Tensor) -> list[tuple[UNetCall, torch.Tensor]]:
        rows = split_rows(tensor, len(self._samples))
        return [(sample.step, mine) for sample, mine in zip(self._samples, rows, strict=True)]

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return join_rows(tensors)

    def release(self) -> None:
        """Drop what no later call reads."""
        for sample in self._samples:
            branch, index = sample.picture.branch, sample.step.call.index
            program = branch.program
            assert program is not None
            # All else: what was kept for this call is of no use to a picture that computed it.
            branch.cache.retain(program.alive[index - program.start])
            if not any(call.inherits for call in program.calls[index - program.start + 1 :]):
                sample.picture.metric.clear()

    def _observe(self, probe: Sequence[torch.Tensor]) -> None:
        """Take every picture's probe, and compute those in full that have drifted too far."""
        for sample, rows in zip(self._samples, probe, strict=True):
            sample.probe = {lane: own.detach().clone() for lane, own in sample.pick(rows).items()}
        if not self.call.inherits:
            return
        drifts = [sample.picture.metric.measure(sample.probe) for sample in self._samples]
        upgraded: dict[int, Program] = {}
        # The one time that a call waits for the device.
        values = cast(list[float], torch.stack(drifts).tolist())
        for sample, drift in zip(self._samples, values, strict=True):
            if drift < self._threshold:
                continue
            program = sample.picture.branch.program
            assert program is not None
            if id(program) not in upgraded:
                upgraded[id(program)] = program.upgrade(sample.step.call.index)
            sample.upgrade(upgraded[id(program)])

    def _settle(self, output: torch.Tensor) -> None:
        for sample, rows in zip(self._samples, split_rows(output, len(self._samples)), strict=True):
            computed = sample.step.call.computes_all
            sample.picture.metric.settle(sample.probe, sample.pick(rows), computed=computed)


def _wrap_like(output: Any, tensor: Any) -> Any:
    return (tensor,) if isinstance(output, tuple) else tensor
