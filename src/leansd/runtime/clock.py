"""Clocks: which run and which step a UNet call belongs to, known rather than guessed.

Pipelines hand the UNet a view into the scheduler's own tensor of time steps, so the place of that
view in the tensor is the number of the call: no device is read, and samplers that visit a time step
twice (Heun, KDPM2, PNDM) or start late (image-to-image) need no special case.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_args

import torch

from leansd.core.schedule import CallSchedule, Output, assign_rows, list_log_snr
from leansd.plans.keysteps import interpolate


@dataclass(frozen=True)
class CallPosition:
    """What a clock says of one UNet call."""

    schedule: CallSchedule
    index: int
    """Number of the call in the schedule."""
    starts: bool
    """Whether a new run begins with it."""


class SchedulerClock:
    """The clock of a pipeline: reads the schedule whenever its scheduler lays one out."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._schedule: CallSchedule | None = None
        self._last = -1
        self._seen: torch.Tensor | None = None
        """The last time step; held so that no other tensor gets its storage."""
        self._reader = _TimestepReader()

    def owns(self, timestep: Any) -> bool:
        """Whether the time step is certainly one of this clock's."""
        return find_in_storage(timestep, self._pipe.scheduler.timesteps) is not None

    def locate(self, timestep: Any) -> CallPosition | None:
        """Place a call by its time step; None where it belongs to no run that this clock knows."""
        position = self.peek(timestep)
        if position is not None:
            self._last = position.index
            self._seen = timestep if isinstance(timestep, torch.Tensor) else None
        return position

    def peek(self, timestep: Any) -> CallPosition | None:
        """What `locate` will say of a call that is yet to come; the clock does not advance."""
        schedule = self._schedule
        if schedule is None or not self._goes_on(schedule, timestep):
            if not _is_laid_out(self._pipe.scheduler):
                return None
            schedule = read_schedule(self._pipe.scheduler)
            self._schedule, self._last, self._seen = schedule, -1, None
        index = find_in_storage(timestep, schedule.timesteps)
        if index is None:
            value = self._reader.read(timestep)
            index = _find_by_value(value, schedule.moments, self._last)
        if index is None or not 0 <= index < len(schedule.rows):
            return None
        return CallPosition(schedule, index, starts=self._last == -1 or index < self._last)

    def _goes_on(self, schedule: CallSchedule, timestep: Any) -> bool:
        """Whether a time step is of the known schedule.

        A pipeline that exchanges its scheduler's state for every tile of a panorama goes on with
        the time steps that it began with.
        """
        return (
            schedule.timesteps is self._pipe.scheduler.timesteps
            or share_storage(timestep, schedule.timesteps)
            or (is_view(timestep) and share_storage(timestep, self._seen))
        )


class LoopClock:
    """The clock of a raw loop on a UNet: a run starts when the time step rises, a call is a step.

    A loop does not say how long it will be, so the schedule is as long as the plan.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._last: float | None = None
        self._reader = _TimestepReader()
        self._log_snr: list[float] = []
        self._schedule: CallSchedule | None = None

    def owns(self, timestep: Any) -> bool:
        return False

    def peek(self, timestep: Any) -> CallPosition | None:
        return None

    def locate(self, timestep: Any) -> CallPosition | None:
        moment = self._reader.read(timestep)
        schedule, starts = self._schedule, False
        if schedule is None or self._last is None or moment > self._last:
            rows = tuple(range(self._steps))
            self._log_snr = []
            # Only whether two calls share a moment matters, and here no two do.
            schedule = CallSchedule(None, tuple(map(float, rows)), rows, self._steps, self._log_snr)
            self._schedule, starts = schedule, True
        if starts or moment != self._last:
            self._log_snr.append(interpolate(_list_stable_diffusion_log_snr(), moment))
        self._last = moment
        index = len(self._log_snr) - 1
        return CallPosition(schedule, index, starts) if index < self._steps else None


Clock = SchedulerClock | LoopClock


def find_in_storage(timestep: Any, timesteps: Any) -> int | None:
    """The index of `timestep` in `timesteps` if it is a view into it; reads no value."""
    if not isinstance(timestep, torch.Tensor) or not isinstance(timesteps, torch.Tensor):
        return None
    if timestep.dtype != timesteps.dtype or timestep.device != timesteps.device:
        return None
    if not share_storage(timestep, timesteps):
        return None
    offset = int(timestep.storage_offset()) - int(timesteps.storage_offset())
    index, rest = divmod(offset, timesteps.stride(0))
    return index if rest == 0 and 0 <= index < len(timesteps) else None


def share_storage(one: Any, other: Any) -> bool:
    """Whether two tensors are views of the same memory; reads no value."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    # The storage object, not its address: tensors without data have one, too.
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def is_view(timestep: Any) -> bool:
    """Whether a time step is an element of a longer tensor."""
    if not isinstance(timestep, torch.Tensor):
        return False
    return timestep.untyped_storage().nbytes() > timestep.element_size()


def _is_laid_out(scheduler: Any) -> bool:
    """Whether a run was prepared: a new scheduler has its training's time steps and no run."""
    if getattr(scheduler, "num_inference_steps", 0) is not None:
        return True
    return len(scheduler.timesteps) != scheduler.config.num_train_timesteps


def lay_out_run(scheduler: Any, steps: int) -> Any:
    """A copy of a scheduler at the start of a run.

    Noise levels of a flow are a pipeline's own (Z-Image), or go by the size of the picture (FLUX):
    they are those of its last run of as many steps, and till there is one some levels or other.
    """
    double = copy.deepcopy(scheduler)
    shifts = scheduler.config.get("use_dynamic_shifting", False)
    double.set_timesteps(steps, **({"mu": 1.0} if shifts else {}))
    if is_flow(scheduler) and getattr(scheduler, "num_inference_steps", None) == steps:
        double.sigmas, double.timesteps = scheduler.sigmas, scheduler.timesteps
    return double


def read_schedule(scheduler: Any) -> CallSchedule:
    """Lay out the calls of the run that `scheduler.set_timesteps` has just prepared.

    The time steps are read here, once a run, before its first call.
    """
    timesteps: torch.Tensor = scheduler.timesteps
    moments = tuple(float(value) for value in timesteps.tolist())
    steps = getattr(scheduler, "num_inference_steps", None) or len(moments)
    order = getattr(scheduler, "order", 1)
    if order == 1 and len(set(moments)) == len(moments):
        # A call a step, also where a list of time steps was given and not counted (DDPM).
        steps = len(moments)
    rows = assign_rows(len(moments), int(steps), order)
    if rows is None:
        rows, steps = tuple(range(len(moments))), len(moments)
    levels = _log_snr(scheduler, moments)
    return CallSchedule(timesteps, moments, rows, int(steps), levels, _find_output(scheduler))


def _find_by_value(value: float, moments: Sequence[float], last: int) -> int | None:
    """The call with this time step: the next if it fits, else the same again, else the first."""
    for index in (last + 1, last):
        if 0 <= index < len(moments) and moments[index] == value:
            return index
    return next((index for index, moment in enumerate(moments) if moment == value), None)


LONGEST = 10_000
"""Time steps that are read together."""


class _TimestepReader:
    """Time steps as numbers. Those of one tensor are all read when the first of them is asked for,
    so that a loop on a GPU waits for it once and not at every step."""

    def __init__(self) -> None:
        self._seen: torch.Tensor | None = None
        """One of them; held so that no other tensor gets its storage."""
        self._version = 0
        self._values: list[float] = []

    def read(self, timestep: Any) -> float:
        """The time step as a number; a batch of them counts as its first."""
        if not isinstance(timestep, torch.Tensor):
            return float(timestep)
        count = timestep.untyped_storage().nbytes() // timestep.element_size()
        if timestep.device.type == "cpu" or not 1 < count <= LONGEST or timestep.is_inference():
            return float(timestep.reshape(-1)[0])
        seen = self._seen
        known = seen is not None and seen.dtype == timestep.dtype
        if not known or not share_storage(timestep, seen) or timestep._version != self._version:
            self._values = timestep.detach().as_strided((count,), (1,), 0).tolist()
            self._seen, self._version = timestep, timestep._version
        return float(self._values[timestep.storage_offset()])


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler's sigmas are those of rectified flow, from 1 to 0."""
    flow = type(scheduler).__name__.startswith("FlowMatch")
    return flow or bool(scheduler.config.get("use_flow_sigmas", False))


def _find_output(scheduler: Any) -> Output | None:
    """What the denoiser gives that a scheduler is for."""
    if is_flow(scheduler):
        return "flow_prediction"
    known = get_args(Output)
    told = scheduler.config.get("prediction_type", "epsilon")
    return told if told in known and hasattr(scheduler, "alphas_cumprod") else None


def _log_snr(scheduler: Any, moments: Sequence[float]) -> tuple[float, ...]:
    """log-SNR at (possibly fractional) time steps; minus the time step without a noise table."""
    if is_flow(scheduler):
        return list_log_snr(scheduler.sigmas.tolist()[: len(moments)], "flow")
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        return tuple(-moment for moment in moments)
    alphas = [min(max(alpha, 1e-8), 1 - 1e-8) for alpha in table.tolist()]
    points = [math.log(alpha / (1 - alpha)) for alpha in alphas]
    return tuple(interpolate(points, moment) for moment in moments)


@lru_cache(maxsize=1)
def _list_stable_diffusion_log_snr(count: int = 1000) -> list[float]:
    """log-SNR of Stable Diffusion's own noise schedule, for loops without a scheduler.

    In plain Python, since a loop may run on simulated tensors.
    """
    first, last = 0.00085**0.5, 0.012**0.5
    step, signal, points = (last - first) / (count - 1), 1.0, list[float]()
    for place in range(count):
        root = first + step * place if place < count // 2 else last - step * (count - 1 - place)
        signal *= 1 - root * root
        points.append(math.log(signal / (1 - signal)))
    return points
