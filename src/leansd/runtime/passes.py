"""One UNet call under a plan: every unit asks it what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from leansd.plans.liveness import Call, Program
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
        self._program: Program | None = None
        self._last = -1
        self._signature: object = None

    def expects(self, index: int, sample: torch.Tensor) -> bool:
        """Whether this is the next call, with a sample like the one before."""
        follows = self._program is not None and index == self._last + 1
        return follows and self._signature == _sign(sample)

    def start_over(self, program: Program, sample: torch.Tensor) -> None:
        """Forget everything and follow `program`, whose first call computes in full."""
        self.store.clear()
        self.shapes.clear()
        self._program, self._signature = program, _sign(sample)

    def take(self, tick: Tick) -> Pass:
        """The pass for this call."""
        assert self._program is not None
        self._last = tick.index
        call = self._program[tick.index]
        return Pass(self, call, tick.course, records_shapes=tick.index == self._program.start)


def _sign(sample: torch.Tensor) -> object:
    return sample.shape, sample.dtype, sample.device


class Pass:
    """One UNet call: answers every unit's question what to do."""

    def __init__(self, branch: Branch, call: Call, course: Course, *, records_shapes: bool) -> None:
        self.branch = branch
        self.call = call
        self.log_snr = course.log_snr
        self.records_shapes = records_shapes
        self.writable = False
        """Whether placeholders may be written to."""

    def run_unit(self, at: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call, branch = self.call, self.branch
        if at in call.pattern.computed:
            given = args[0].detach().clone() if self._needs_input(at) else None
            output = forward(*args, **kwargs)
            for kept in call.keeps.get(at, ()):
                branch.store.keep(kept, unwrap(output), given)
            if self.records_shapes:
                branch.shapes[at] = Shape.of(output)
            return output
        return branch.shapes[at].wrap(self.give(at, args[0]))

    def give(self, at: str, given: torch.Tensor | None = None) -> torch.Tensor:
        """The output of a unit that is not computed; `given` is its present input."""
        how = self.call.pattern.inherited.get(at)
        if how is None:
            return self.branch.shapes[at].make_placeholder(writable=self.writable)
        sources = self.call.sources[at]
        return RECALLS[how](self.branch.store, sources, self.call.index, self.log_snr, given)

    def skips(self, units: Sequence[str]) -> bool:
        """Whether none of these units runs or needs its input."""
        pattern = self.call.pattern
        return all(
            at in pattern.idle or pattern.inherited.get(at) in ("reuse", "forecast") for at in units
        )

    def _needs_input(self, at: str) -> bool:
        return any(kept.what == "change" for kept in self.call.keeps.get(at, ()))
