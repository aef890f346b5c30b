"""Hosts that draw for a tuning: runs to watch and steer, the sampler's response, pipelines.

Pipelines of diffusers are one host; a node in another program can be one, too.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType, SimpleNamespace
from typing import Any, Protocol, TypeAlias

import numpy as np
from diffusers import UNet2DConditionModel
from torch import Tensor

from leansd.anatomy.reading import fingerprint_module, read_anatomy
from leansd.core.schedule import CallSchedule
from leansd.errors import LeansdError
from leansd.evaluation.cost import CostModel
from leansd.evaluation.records import name_device
from leansd.evaluation.runs import CallSet, PipelineCall, RunOutputs, run_calls
from leansd.plans.anatomy import HEAD, WHOLE, Anatomy
from leansd.plans.liveness import Net
from leansd.plans.plan import Plan, Tuned
from leansd.runtime.attachment import NO_NETS
from leansd.runtime.clock import SchedulerClock, is_flow, lay_out_run, read_schedule
from leansd.runtime.context import find_denoiser, find_transformer
from leansd.runtime.hooks import patch_method
from leansd.runtime.nets import match_nets
from leansd.tuning.sampler_map import run_scheduler

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
            double = copy.copy(scheduler)  # in its present state, and without the tap
            vars(double).pop("step", None)
            with keep_draws(kwargs.get("generator")):
                return copy.deepcopy(double).step(other, timestep, sample, *args, **kwargs)[0]

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


@contextmanager
def keep_draws(generator: Any) -> Iterator[None]:
    """Let one generator or several draw meanwhile, and afterwards the same once more."""
    generators = generator if isinstance(generator, list) else [generator]
    states = [each and each.get_state() for each in generators]
    try:
        yield
    finally:
        for each, state in zip(generators, states, strict=True):
            if each is not None:
                each.set_state(state)


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
    denoising: np.ndarray | None = None
    """[n, 2]: the weights of sample and output in the denoised picture that a call sees, where the
    sampler adds noise (the same in every run of a call); None for other samplers."""

    def describe_levels(self, tuned: Tuned) -> Tuned:
        """What a plan of so many steps is tuned for; runs that start late leave some levels out."""
        whole = len(self.log_snr) == self.steps
        levels = [round(float(each), 4) for each in self.log_snr] if whole else ()
        return replace(tuned, log_snr=tuple(levels))


class Host(Protocol):
    """Draws calls, each to one picture; call `i` from the noise of `seed + i`."""

    @property
    def anatomy(self) -> Anatomy:
        """The anatomy of the denoiser that plans are for."""
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
            LeansdError: it calls the denoiser several times a step, is not linear, or adds noise
                to what is no known prediction.
        """
        ...

    def describe(self) -> Mapping[str, Any]:
        """What tells a tuning here from any other, as plain values."""
        ...


# -- pipelines of diffusers ------------------------------------------------------------------------

NOTHING: Mapping[str, Any] = MappingProxyType({})


class PipelineHost:
    """A pipeline with its present scheduler."""

    def __init__(
        self,
        pipe: Any,
        batch: int = 8,
        settings: Mapping[str, Any] = NOTHING,
        unets: Mapping[str, UNet2DConditionModel] = NO_NETS,
        sampler: str = "",
    ) -> None:
        """Args:
        batch: pictures drawn at once.
        settings: arguments that all calls share.
        unets: that plans may switch to.
        sampler: its name in plans; the scheduler's class by default.
        """
        self.pipe, self.batch, self.settings, self.unets = pipe, batch, settings, unets
        denoiser = find_denoiser(pipe)
        self.anatomy: Anatomy = WHOLE
        self.nets: Mapping[str, Net] = {}
        if find_transformer(pipe) is None:
            self.anatomy = read_anatomy(denoiser)
            self.nets = match_nets(denoiser, unets).nets
        self.tuned = Tuned(
            sampler or type(pipe.scheduler).__name__,
            fingerprint_module(denoiser),
            settings.get("guidance_scale"),
            strength=settings.get("strength"),
        )

    def draw(
        self,
        calls: Sequence[PipelineCall],
        steps: int,
        plan: Plan | None = None,
        *,
        seed: int,
        steer: Steer | None = None,
    ) -> tuple[RunOutputs, list[SchedulerRun]]:
        with tap(self.pipe.scheduler, steer) as runs:
            finals = run_calls(
                self.pipe,
                CallSet(calls, seed, self.batch, self.settings),
                steps,
                plan,
                nets=self.unets,
            )
        return finals, runs

    def respond(self, steps: int, calls: int | None = None) -> Course:
        require_one_call_a_step(self.pipe.scheduler, steps)
        schedule = read_schedule(lay_out_run(self.pipe.scheduler, steps))
        start = schedule.steps - (calls or schedule.steps)
        return measure_course(self.pipe.scheduler, schedule, start)

    def describe(self) -> Mapping[str, Any]:
        scheduler = self.pipe.scheduler
        return {
            "tuned": (self.tuned.sampler, self.tuned.unet, self.tuned.guidance),
            "device": name_device(str(self.pipe.device)),
            "scheduler": type(scheduler).__name__
            + json.dumps({key: str(value) for key, value in scheduler.config.items()}),
            "batch": self.batch,
            "settings": dict(self.settings),
            "nets": {name: fingerprint_module(net) for name, net in self.unets.items()},
        }


def measure_whole_cost(host: PipelineHost, calls: Sequence[PipelineCall], steps: int) -> CostModel:
    """What a call of a transformer takes here, one that is forecast, and all else of a run."""
    plan = Plan.full(steps).inherit(HEAD, at=range(1, steps, 2), how="reuse")
    calls = calls[: host.batch]
    ends, _ = host.draw(calls, steps, plan, seed=0)
    assert ends.attachment is not None
    report = ends.attachment.report()
    computed = report.measured_speedup * report.seconds / report.calls
    nothing = (report.seconds - computed * report.full_calls) / max(report.inherited, 1)
    height, width = ends.pictures.shape[-2:]
    return CostModel.of_whole_calls(
        host.tuned.unet,
        pictures=len(calls),
        size=(width, height),
        computed=computed,
        forecast=max(nothing, 0.0),
        other=max(ends.seconds[-1] - report.seconds, 0.0),
    )


def require_tunable(scheduler: Any, steps: int) -> None:
    """Refuse samplers whose runs cannot be foreseen; no UNet runs."""
    require_one_call_a_step(scheduler, steps)
    measure_course(scheduler, read_schedule(lay_out_run(scheduler, steps)))


def require_one_call_a_step(scheduler: Any, steps: int) -> None:
    """Refuse samplers of higher order."""
    course = read_schedule(lay_out_run(scheduler, steps))
    if len(course.rows) != course.steps or len(set(course.moments)) != course.steps:
        flow = is_flow(scheduler)
        net, others = ("transformer", "flow-euler") if flow else ("UNet", "ddim, euler or dpm++2m")
        raise LeansdError(
            f"{type(scheduler).__name__} calls the {net} more than once in some steps; tuning is "
            f"for samplers with one call a step, such as {others}"
        )


def measure_course(scheduler: Any, schedule: CallSchedule, start: int = 0) -> Course:
    """How a scheduler of diffusers answers in the calls from `start` on.

    All impulses go through it at once, as a batch of single pixels.

    Raises:
        LeansdError: it adds noise, and what the UNet predicts is not known.
    """
    double = lay_out_run(scheduler, schedule.steps)
    timesteps = double.timesteps[start:]
    if start and hasattr(double, "set_begin_index"):
        double.set_begin_index(start)
    count = len(timesteps)
    seen, scales = run_scheduler(double, timesteps, np.eye(count, count + 1), np.zeros(count + 1))
    nothing = seen[:, count:]  # of the run without any impulse
    weights = None
    if np.abs(nothing).max() > 0:
        of_input = np.array([schedule.denoise(start + call) for call in range(count)])
        weights = of_input * np.stack([scales, np.ones(count)], axis=1)
    levels = np.array(schedule.log_snr[start:])
    return Course(schedule.steps, levels, seen[:, :count] - nothing, weights)
