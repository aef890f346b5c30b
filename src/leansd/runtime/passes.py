"""One UNet call under a plan: every unit asks it what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from leansd.plans.anatomy import HEAD
from leansd.plans.liveness import GUIDANCE, Call, Kept, Lane, Program
from leansd.plans.row import How
from leansd.runtime.clock import Course, Tick
from leansd.runtime.store import (
    RECALLS,
    Shape,
    Store,
    combine,
    unwrap,
    weigh_correction,
)


class Step(Protocol):
    """One UNet call, as the engine sees it."""

    writable: bool
    """Whether placeholders may be written to."""

    @property
    def call(self) -> Call:
        """What the call does; where pictures differ, lanes and guidance are those of all."""
        ...

    @property
    def calls(self) -> tuple[Call, ...]:
        """What was done: one of the whole batch, or one of each picture."""
        ...

    def run_unit(self, at: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any: ...

    def give(self, at: str, given: torch.Tensor | None = None) -> torch.Tensor: ...

    def correct(self, noise: torch.Tensor) -> torch.Tensor:
        """The UNet's output [B, C, H, W] corrected where the plan says so (`Plan.correct`)."""
        ...

    @property
    def skips_unet(self) -> bool:
        """Whether the output follows from latents and what is kept alone."""
        ...

    def skips(self, units: Sequence[str]) -> bool:
        """Whether none of these units runs or needs its input."""
        ...

    def split(self, tensor: torch.Tensor) -> list[tuple[Pass, torch.Tensor]]:
        """The rows of a batch by the pass that they follow; `join` puts such parts together."""
        ...

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor: ...

    def release(self) -> None:
        """Drop what nobody reads after this call."""
        ...


class Branch:
    """The state of one run for one of the calls that a pipeline makes at each step.

    Ordinary pipelines make one; those that call the UNet for each guidance branch, or for each tile
    of a panorama, make several, and each has features of its own.
    """

    def __init__(self) -> None:
        self.store = Store()
        self.shapes: dict[str, dict[str, Shape]] = {}
        """Of what units and parts give, for each net."""
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

    @property
    def bytes(self) -> int:
        return self.store.bytes

    def clear(self) -> None:
        """Keep nothing any more."""
        self.store.clear()

    def completes(self, index: int, sample: torch.Tensor) -> bool:
        """Whether this is the unconditional call to the conditional one just made."""
        joined = self._last == index and self._signature == _sign(sample, True)
        return self.program is not None and joined and self.store.has([keep_for_rest(index)])

    def take(self, tick: Tick, latents: torch.Tensor) -> Step:
        """What the next call does; its sample holds these `latents` [B, C, H, W]."""
        return self.open(tick, latents)

    def open(self, tick: Tick, latents: torch.Tensor, apart: Lane | None = None) -> Pass:
        """The pass for the call of this tick; `apart` if all its rows are of one lane."""
        assert self.program is not None
        self._last = tick.index
        call, records = self.program[tick.index], tick.index == self.program.start
        return Pass(self, call, tick.course, latents, records=records, apart=apart)


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
        course: Course | None,
        latents: torch.Tensor,
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
        halves = call.is_half and apart is None
        self.latents = latents[latents.shape[0] // 2 :] if halves else latents
        """The rows that run of what the UNet is given, in the channels that it gives."""
        self.batch = self.latents.shape[0]
        self.writable = False
        """Whether placeholders may be written to."""
        self.course = course
        """The run's; None where a graph is traced, which has it from its arguments."""
        self.records = records
        """Whether to note what the outputs of the units look like."""
        self.shapes = branch.shapes.setdefault(call.net, {})
        """What the outputs of the units look like, as far as it is known."""

    @property
    def calls(self) -> tuple[Call, ...]:
        return (self.call,)

    def run_unit(self, at: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a unit, or a part of one, gives in this call."""
        if at not in self.call.pattern.active:
            return self.shapes[at].wrap(self.give(at, args[0]))
        # The unit may overwrite its input, so what a change is measured against is copied first.
        given = self._pick_input(at, args[0])
        given = given.detach().clone() if self.keeps_change(at) else given
        output = forward(*args, **kwargs)
        for kept in self.list_keeps(at):
            before = self.pick(given, kept.lane) if kept.what == "change" else None
            self.branch.store.keep(kept, self.pick(unwrap(output), kept.lane), before)
        if self.records:
            self.shapes[at] = Shape.of(output)
        return output

    def give(self, at: str, given: torch.Tensor | None = None) -> torch.Tensor:
        """The output of what is not computed; `given` is its present input."""
        pattern = self.call.pattern
        how = pattern.inherited.get(at) or pattern.parts.get(at)
        if how is None:
            shape = self.shapes[at]
            return shape.make_placeholder(self.batch, writable=self.writable)
        return self.make(at, how, self._pick_input(at, given))

    def make(self, at: str, how: How, given: torch.Tensor | None = None) -> torch.Tensor:
        """The lanes in this batch of what an inherited unit is made from, put together by `how`."""
        lanes = self._recall_lanes(how, self.call.sources[at], given)
        return lanes[0] if len(lanes) == 1 else torch.cat(lanes)

    def keeps_change(self, at: str) -> bool:
        """Whether a later call reads what this unit adds to its input."""
        return any(kept.what == "change" for kept in self.list_keeps(at))

    def recall(
        self, how: How, sources: Sequence[Kept], given: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One lane of an output made from what was kept."""
        return RECALLS[how](self.branch.store, sources, self.call.index, self.course, given)

    def correct(self, noise: torch.Tensor) -> torch.Tensor:
        """The UNet's output [B, C, H, W] moved away from forecasts by those before."""
        corrects = self.call.corrects
        if not corrects:
            return noise
        lanes = zip(self.call.lanes, corrects, strict=True)
        return torch.cat(
            [
                self.move_on(self.pick(noise, lane), each)
                for lane, each in lanes
                if lane in self.lanes
            ]
        )

    def move_on(self, noise: torch.Tensor, sources: Sequence[Kept]) -> torch.Tensor:
        """One lane of a corrected output."""
        call, read = self.call, self.branch.store.read
        lead, weights = weigh_correction(call.correct, sources, call.index, self.course.log_snr)
        return combine([noise, *map(read, weights)], [lead, *weights.values()])

    def pick(self, tensor: torch.Tensor, lane: Lane) -> torch.Tensor:
        """The rows of one lane; in a call that runs one lane, all there are."""
        if len(self.lanes) == 1:
            return tensor
        rest, cond = tensor.chunk(2)
        return cond if lane == "cond" else rest

    def split(self, tensor: torch.Tensor) -> list[tuple[Pass, torch.Tensor]]:
        return [(self, tensor)]

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        (tensor,) = tensors
        return tensor

    @property
    def skips_unet(self) -> bool:
        return HEAD in self.call.pattern.inherited

    def skips(self, units: Sequence[str]) -> bool:
        pattern = self.call.pattern
        return all(
            at in pattern.idle or pattern.inherited.get(at, "residual") != "residual"
            for at in units
        )

    def release(self) -> None:
        # The unconditional call of the same step, where there is one, reads the same.
        if self.apart != "cond":
            self.branch.store.release(self.call.releases)

    def list_keeps(self, at: str) -> list[Kept]:
        """What to keep of a unit, of the lanes in this batch."""
        return [kept for kept in self.call.keeps.get(at, ()) if kept.lane in self.lanes]

    def _recall_lanes(
        self, how: How, sources: Sequence[Sequence[Kept]], given: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """The lanes in this batch of an output made from what was kept, lane by lane."""
        return [
            self.recall(how, each, None if given is None else self.pick(given, lane))
            for lane, each in zip(self.call.lanes, sources, strict=True)
            if lane in self.lanes
        ]

    def _pick_input(self, at: str, given: Any) -> Any:
        """What a unit's change is a change of."""
        return self.latents if at == HEAD else given
