"""What a run did under a plan: counted, timed and put into words."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch
from diffusers import UNet2DConditionModel

from leansd.anatomy.cost import dissect
from leansd.plans.liveness import Call, predict_speedup
from leansd.plans.plan import Plan

if TYPE_CHECKING:
    from leansd.runtime.control import ControlRun

Lap = Callable[[], float]
"""Gives the seconds of a UNet call; on a GPU it waits for that call, so ask after the run."""


@dataclass(frozen=True)
class Report:
    """One run under a plan. Unit counts are over all its UNet calls."""

    plan: Plan
    calls: int
    full_calls: int
    computed: int
    inherited: int
    idle: int
    bytes_kept: int
    """The most that was kept at any time."""
    predicted_speedup: float
    """Full run's over this run's multiply-accumulates, UNet only."""
    measured_speedup: float
    """What the run would have taken with every call like its median full one, over what it took."""
    seconds: float
    """In the UNet."""
    control_calls: int = 0
    control_runs: int = 0
    """How many of the calls of the ControlNet ran it; the others inherited its residuals."""

    def __str__(self) -> str:
        control = ""
        if self.control_calls:
            control = f"ControlNet ran {self.control_runs} of {self.control_calls} times; "
        units = self.computed + self.inherited + self.idle
        return (
            f"plan {self.plan.name}: {self.calls} UNet calls, {self.full_calls} in full; "
            f"of {units} unit runs {self.computed} computed, {self.inherited} inherited, "
            f"{self.idle} idle; {self.bytes_kept / 2**20:.2f} MiB kept; {control}"
            f"UNet {self.seconds:.2f} s, speed-up {self.measured_speedup:.2f}x "
            f"(predicted {self.predicted_speedup:.2f}x)"
        )


class Tally:
    """Counts a run as it goes."""

    def __init__(self, plan: Plan, control: ControlRun | None = None) -> None:
        self.plan = plan
        self.control = control
        self.calls: list[Call] = []
        self.laps: list[Lap] = []
        self.bytes_kept = 0
        self.size = (0, 0)
        self.tokens = 0

    def add(self, call: Call, lap: Lap, bytes_kept: int) -> None:
        self.calls.append(call)
        self.laps.append(lap)
        self.bytes_kept = max(self.bytes_kept, bytes_kept)

    def summarise(self, unet: UNet2DConditionModel) -> Report:
        anatomy = dissect(unet, latent=self.size, tokens=self.tokens)
        patterns = [call.pattern for call in self.calls]
        seconds = [lap() for lap in self.laps]
        full = [call.is_full for call in self.calls]
        whole = median(lap for lap, is_full in zip(seconds, full, strict=True) if is_full)
        return Report(
            plan=self.plan,
            calls=len(patterns),
            full_calls=sum(full),
            computed=sum(len(pattern.computed) for pattern in patterns),
            inherited=sum(len(pattern.inherited) for pattern in patterns),
            idle=sum(len(pattern.idle) for pattern in patterns),
            bytes_kept=self.bytes_kept,
            predicted_speedup=predict_speedup(self.calls, anatomy),
            measured_speedup=whole * len(seconds) / sum(seconds),
            seconds=sum(seconds),
            control_calls=self.control.calls if self.control is not None else 0,
            control_runs=self.control.runs if self.control is not None else 0,
        )


def start_lap(device: torch.device) -> Callable[[], Lap]:
    """Start timing a UNet call; the returned function ends it and gives its `Lap`."""
    if device.type == "cuda":
        first = torch.cuda.Event(enable_timing=True)
        last = torch.cuda.Event(enable_timing=True)
        first.record()

        def end_on_device() -> Lap:
            last.record()
            return lambda: _measure_events(first, last)

        return end_on_device
    started = time.perf_counter()

    def end() -> Lap:
        seconds = time.perf_counter() - started
        return lambda: seconds

    return end


def _measure_events(first: torch.cuda.Event, last: torch.cuda.Event) -> float:
    last.synchronize()
    return first.elapsed_time(last) / 1000
