"""What a run did under a plan: counted, timed and put into words."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from diffusers import UNet2DConditionModel

from leansd.anatomy.cost import dissect
from leansd.plans.liveness import Call, Net
from leansd.plans.macs import predict_speedup
from leansd.plans.plan import Plan

if TYPE_CHECKING:
    from leansd.runtime.control import ControlRun

NOTHING: Mapping[str, UNet2DConditionModel] = MappingProxyType({})

Lap = Callable[[], float]
"""Gives the seconds of a UNet call; on a GPU it waits for that call, so ask after the run."""


@dataclass(frozen=True)
class Report:
    """One run under a plan. Unit counts are over all its UNet calls.

    Where pictures of a call differ, a unit counts as computed if any picture computes it, and a
    call as full if all do; the predicted speed-up weighs them.
    """

    plan: Plan
    calls: int
    full_calls: int
    computed: int
    inherited: int
    idle: int
    bytes_kept: int
    """The most that was kept at any time."""
    predicted_speedup: float
    """Full run's over this run's multiply-accumulates, UNet only; NaN where it was not counted."""
    measured_speedup: float
    """What the run would have taken with every call like its median full one, over what it took.

    A full one is one without gates, if there is any."""
    seconds: float
    """In the UNet."""
    control_calls: int = 0
    control_runs: int = 0
    """How many of the calls of the ControlNet ran it; the others inherited its residuals."""
    guarded: int = 0
    """Under a plan with a drift: calls at which it inherits, counted once for each picture."""
    drifted: int = 0
    """Of these, those that were computed in full because the picture had drifted too far."""
    gated: int = 0
    """Calls in which the plan had self-attentions computed otherwise than the UNet has them."""
    uncounted: str = ""
    """Why nothing is predicted, "not counted, because ..."; empty where it is."""

    def __str__(self) -> str:
        control = ""
        if self.control_calls:
            control = f"ControlNet ran {self.control_runs} of {self.control_calls} times; "
        drift = ""
        if self.guarded:
            drift = f"{self.drifted} of {self.guarded} times a picture drifted and was computed; "
        gates = f"self-attentions gated in {self.gated} calls; " if self.gated else ""
        units = self.computed + self.inherited + self.idle
        return (
            f"plan {self.plan.name}: {self.calls} UNet calls, {self.full_calls} in full; "
            f"of {units} unit runs {self.computed} computed, {self.inherited} inherited, "
            f"{self.idle} idle; {self.bytes_kept / 2**20:.2f} MiB kept; {control}{drift}{gates}"
            f"UNet {self.seconds:.2f} s, speed-up {self.measured_speedup:.2f}x "
            f"({self.uncounted or f'predicted {self.predicted_speedup:.2f}x'})"
        )


class Tally:
    """Counts a run as it goes."""

    def __init__(self, plan: Plan, control: ControlRun | None = None) -> None:
        self.plan = plan
        self.control = control
        self.calls: list[tuple[Call, ...]] = []
        self.laps: list[Lap] = []
        self.bytes_kept = 0
        self.size = (0, 0)
        self.tokens = 0

    def add(self, calls: tuple[Call, ...], lap: Lap, bytes_kept: int) -> None:
        """Count a UNet call, given as one call of the batch or one of each picture."""
        self.calls.append(calls)
        self.laps.append(lap)
        self.bytes_kept = max(self.bytes_kept, bytes_kept)

    def summarise(
        self, unet: UNet2DConditionModel, others: Mapping[str, UNet2DConditionModel] = NOTHING
    ) -> Report:
        anatomy = dissect(unet, latent=self.size, tokens=self.tokens)
        nets = {
            name: Net(dissect(each, latent=self.size, tokens=self.tokens))
            for name, each in others.items()
        }
        counts = [_count_units(calls) for calls in self.calls]
        computed, inherited, idle = (sum(each) for each in zip(*counts, strict=True))
        every = [call for calls in self.calls for call in calls]
        drifted = sum(call.recomputed for call in every)
        guarded = drifted + sum(call.inherits for call in every) if self.plan.drift else 0
        seconds = [lap() for lap in self.laps]
        full = [all(call.is_full for call in calls) for calls in self.calls]
        gated = [any(call.gates for call in calls) for calls in self.calls]
        whole = _find_whole(seconds, full, gated)
        there = (anatomy, *(net.anatomy for net in nets.values()))
        return Report(
            plan=self.plan,
            calls=len(self.calls),
            full_calls=sum(full),
            computed=computed,
            inherited=inherited,
            idle=idle,
            bytes_kept=self.bytes_kept,
            predicted_speedup=predict_speedup(every, anatomy, nets),
            measured_speedup=whole * len(seconds) / sum(seconds),
            seconds=sum(seconds),
            control_calls=self.control.calls if self.control is not None else 0,
            control_runs=self.control.runs if self.control is not None else 0,
            guarded=guarded,
            drifted=drifted,
            gated=sum(gated),
            uncounted=next((each.uncounted for each in there if each.uncounted), ""),
        )


def _count_units(calls: Sequence[Call]) -> tuple[int, int, int]:
    """Units that a UNet call computed, inherited and left idle, for all pictures together."""
    patterns = [call.pattern for call in calls]
    computed = frozenset[str]().union(*(pattern.computed for pattern in patterns))
    inherited = frozenset[str]().union(*(pattern.inherited for pattern in patterns)) - computed
    idle = frozenset[str]().union(*(pattern.idle for pattern in patterns)) - computed - inherited
    return len(computed), len(inherited), len(idle)


def _find_whole(seconds: Sequence[float], full: Sequence[bool], gated: Sequence[bool]) -> float:
    """Median seconds of full calls: of those without gates, where there are any."""
    rows = [row for row in zip(gated, seconds, full, strict=True) if row[2]]
    least = min(is_gated for is_gated, _, _ in rows)
    return median(lap for is_gated, lap, _ in rows if is_gated == least)


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
