"""What a tuning needs of whoever draws: runs to watch and steer, and the sampler's answer to them.

Pipelines of diffusers are one host (`pipeline_host`); a node in another program can be one, too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol, TypeAlias

import numpy as np
from torch import Tensor

from leansd.evaluation.runs import PipelineCall, RunOutputs
from leansd.plans.anatomy import Anatomy
from leansd.plans.liveness import Net
from leansd.plans.plan import Plan, Tuned
from leansd.runtime.clock import SchedulerClock
from leansd.runtime.hooks import patch_method

# -- what a scheduler does -------------------------------------------------------------------------
# A tap on a pipeline's scheduler: what every step is given and makes of it, and a way to steer.
#
# The scheduler sees the guided output, whatever the pipeline did to get it, so nothing about
# guidance, rescaling or the kind of pipeline has to be known here.


@dataclass(frozen=True)
class Seen:
    """One scheduler step."""

    timestep: float
    sample: Tensor
    """What the scheduler was given to step from, [B, C, H, W]."""
    output: Tensor
    """The guided output of the UNet, [B, C, H, W]."""
    previous: Tensor
    """What came out: the sample of the next step, [B, C, H, W]."""


SchedulerRun: TypeAlias = list[Seen]
Step: TypeAlias = Callable[[Tensor], Tensor]
"""What the scheduler would make of an output; nothing advances."""
Steer: TypeAlias = Callable[[int, int, Seen, Step], Tensor]
"""`(number of the run, number of the call, what is seen, step)` -> the output to go on with."""


@contextmanager
def tap(scheduler: Any, steer: Steer | None = None) -> Iterator[list[SchedulerRun]]:
    """See every step of `scheduler`; a run begins where the time step rises.

    The scheduler's own `step` is put back in the end; taps nest.
    """
    runs: list[SchedulerRun] = []
    clock = SchedulerClock(SimpleNamespace(scheduler=scheduler))

    def around(
        _: str, own: Any, output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        # By its place in the scheduler's tensor, which is read once a run: no wait for each step.
        place = clock.locate(timestep)
        moment = float(timestep) if place is None else place.schedule.moments[place.index]
        if not runs or moment >= runs[-1][-1].timestep:
            runs.append([])
        run = runs[-1]

        def foresee(other: Tensor) -> Tensor:
            double = _copy_plain(scheduler)
            return double.step(other, timestep, sample, *args, **kwargs)[0]

        if steer is not None:
            output = steer(len(runs) - 1, len(run), Seen(moment, sample, output, sample), foresee)
        result = own(output, timestep, sample, *args, **kwargs)
        run.append(Seen(moment, sample, output, result[0]))
        return result

    hook = patch_method(scheduler, "step", around)
    try:
        yield runs
    finally:
        hook.release()


def _copy_plain(scheduler: Any) -> Any:
    """A copy of a tapped scheduler, in its present state and without the tap."""
    double = copy.copy(scheduler)
    vars(double).pop("step", None)
    return copy.deepcopy(double)


# -- hosts -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Course:
    """A sampler's run of n calls, with one call a step."""

    steps: int
    """Step count of the sampler; image-to-image makes fewer calls than that."""
    log_snr: np.ndarray
    """At every call, [n]."""
    response: np.ndarray
    """[n + 1, n]: how much of the output of call j is in the sample before call k."""


class Host(Protocol):
    """Draws calls, each to one picture; call `i` from the noise of `seed + i`."""

    @property
    def anatomy(self) -> Anatomy:
        """Of the denoiser that plans are for."""
        ...

    @property
    def nets(self) -> Mapping[str, Net]:
        """Others that plans may switch to."""
        ...

    @property
    def tuned(self) -> Tuned:
        """What plans found here are tuned for."""
        ...

    def draw(
        self,
        calls: Sequence[PipelineCall],
        steps: int,
        plan: Plan | None = None,
        *,
        seed: int,
        steer: Steer | None = None,
    ) -> tuple[RunOutputs, list[SchedulerRun]]:
        """The ends of the runs, and what was seen of every run at every step.

        Args:
            steer: asked for the guided output to go on with at every step.
        """
        ...

    def respond(self, steps: int, calls: int | None = None) -> Course:
        """How the sampler answers to the outputs that it is given.

        Args:
            calls: of a run, where it starts late.

        Raises:
            LeansdError: it calls the denoiser several times a step, or what it adds of its own
                cannot be told apart.
        """
        ...

    def describe(self) -> Mapping[str, Any]:
        """What tells a tuning here from any other, as plain values."""
        ...
