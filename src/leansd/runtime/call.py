"""One UNet call under a plan: what every unit does in it, and what a run keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from leansd.core.outputs import History, PlannedCall, find_method
from leansd.core.schedule import CallSchedule
from leansd.plans.anatomy import HEAD
from leansd.plans.liveness import GUIDANCE, Call, Kept, Lane, Program
from leansd.plans.methods import METHODS
from leansd.runtime.arguments import Shape, unwrap
from leansd.runtime.clock import CallPosition
from leansd.runtime.watch import CallSignature


class UNetStep(Protocol):
    """One UNet call as the engine sees it: of a whole batch, or of pictures that differ."""

    writable: bool
    """Whether placeholders may be written to."""
    compiles: bool
    """Whether a graph may run it."""
    apart: Lane | None
    """The lane whose call it is, where a pipeline calls the two apart."""

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

    def split(self, tensor: torch.Tensor) -> list[tuple[UNetCall, torch.Tensor]]:
        """The rows of a batch by the call that they follow; `join` puts such parts together."""
        ...

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor: ...

    def release(self) -> None:
        """Drop what nobody reads after this call."""
        ...


class CacheBranch(History):
    """The state of one run for one of the calls that a pipeline makes at each step.

    Ordinary pipelines make one; those that call the UNet for each guidance branch, or for each tile
    of a panorama, make several, and each has features of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[str, dict[str, Shape]] = {}
        """Shapes of what units and parts give, for each net."""
        self._signature: CallSignature | None = None
        self._rest: CallSignature | None = None
        """The signature of the unconditional calls, where a pipeline makes them apart."""

    def find_break(self, index: int, signature: CallSignature) -> str:
        """Why the call `index` cannot go on from the one before, in words; empty where it can."""
        if self._signature is None or not self.follows(index):
            return "a call is out of order"
        return signature.find_change(self._signature)

    def has_changed(self, states: tuple[object, ...]) -> bool:
        """Whether the UNets are not what they were when the branch began."""
        return self._signature is not None and self._signature.states != states

    def start_over(self, program: Program, signature: CallSignature, pictures: int) -> None:
        """Forget everything and follow `program`, whose first call computes in full."""
        self.begin(program)
        self.shapes.clear()
        self._signature, self._rest = signature, None

    def completes(self, index: int, signature: CallSignature) -> bool:
        """Whether this is the unconditional call to the conditional one just made."""
        goes_on = self._rest is None or not signature.find_change(self._rest)
        self._rest = signature
        made = self.program is not None and self.last == index
        return made and goes_on and self.cache.has([keep_for_rest(index)])

    def take(self, position: CallPosition, latents: torch.Tensor) -> UNetStep:
        """What the next call does; its sample holds these `latents` [B, C, H, W]."""
        return self.open(position, latents)

    def open(
        self, position: CallPosition, latents: torch.Tensor, apart: Lane | None = None
    ) -> UNetCall:
        """The call at this position; `apart` if all its rows are of one lane."""
        assert self.program is not None
        index = self.last = position.index
        records = index == self.program.start
        return UNetCall(
            self, self.program[index], position.schedule, latents, records=records, apart=apart
        )


def keep_for_rest(index: int) -> Kept:
    """The conditional output of a call, kept until the unconditional call that belongs to it."""
    return Kept(GUIDANCE, index, "output", "cond")


class UNetCall(PlannedCall):
    """One UNet call: answers every unit's question what to do."""

    def __init__(
        self,
        branch: CacheBranch,
        call: Call,
        schedule: CallSchedule | None,
        latents: torch.Tensor,
        *,
        records: bool,
        apart: Lane | None = None,
    ) -> None:
        super().__init__(branch.cache, call, schedule)
        self.branch = branch
        self.apart: Lane | None = apart
        self.lanes = call.lanes if apart is None else (apart,)
        """The lanes in this batch."""
        halves = call.is_half and apart is None
        self.latents = latents[latents.shape[0] // 2 :] if halves else latents
        """The rows that run of what the UNet is given, in the channels that it gives."""
        self.batch = self.latents.shape[0]
        self.writable = False
        self.compiles = apart is None and not self.skips_unet
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
        given = given.detach().clone() if self.keeps_input(at) else given
        output = forward(*args, **kwargs)
        for kept in self.list_keeps(at):
            before = self.pick(given, kept.lane) if kept.what != "output" else None
            self.keep_output(kept, self.pick(unwrap(output), kept.lane), before)
        if self.records:
            self.shapes[at] = Shape.of(output)
        return output

    def give(self, at: str, given: torch.Tensor | None = None) -> torch.Tensor:
        """The output of what is not computed; `given` is its present input."""
        pattern = self.call.pattern
        if at not in pattern.inherited and at not in pattern.parts:
            return self.shapes[at].make_placeholder(self.batch, writable=self.writable)
        return self.fill_lanes(at, self._pick_input(at, given))

    def fill_lanes(self, at: str, given: torch.Tensor | None = None) -> torch.Tensor:
        """The lanes in this batch of an inherited output; `given` is its input for a change."""
        method, call = find_method(self.call, at), self.call
        lanes = [
            self.fill(method, each, None if given is None else self.pick(given, lane))
            for lane, each in zip(call.lanes, call.sources[at], strict=True)
            if lane in self.lanes
        ]
        return lanes[0] if len(lanes) == 1 else torch.cat(lanes)

    def correct(self, noise: torch.Tensor) -> torch.Tensor:
        """The UNet's output [B, C, H, W] moved away from forecasts by those before."""
        call = self.call
        if not call.corrects:
            return noise
        return torch.cat(
            [
                self.move_on(self.pick(noise, lane), each, self.pick(self.latents, lane))
                for lane, each in zip(call.lanes, call.corrects, strict=True)
                if lane in self.lanes
            ]
        )

    def list_keeps(self, at: str) -> list[Kept]:
        """What to keep of a unit, of the lanes in this batch."""
        return [kept for kept in self.call.keeps.get(at, ()) if kept.lane in self.lanes]

    def pick(self, tensor: torch.Tensor, lane: Lane) -> torch.Tensor:
        """The rows of one lane; in a call that runs one lane, all there are."""
        if len(self.lanes) == 1:
            return tensor
        rest, cond = tensor.chunk(2)
        return cond if lane == "cond" else rest

    def split(self, tensor: torch.Tensor) -> list[tuple[UNetCall, torch.Tensor]]:
        return [(self, tensor)]

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        (tensor,) = tensors
        return tensor

    def skips(self, units: Sequence[str]) -> bool:
        pattern = self.call.pattern
        return all(
            at in pattern.idle
            or (at in pattern.inherited and not METHODS[pattern.inherited[at]].takes_input)
            for at in units
        )

    def release(self) -> None:
        # The unconditional call of the same step, where there is one, reads the same.
        if self.apart != "cond":
            self.store.release(self.call.releases)

    def _pick_input(self, at: str, given: Any) -> Any:
        """What a unit's change is a change of."""
        return self.latents if at == HEAD else given
