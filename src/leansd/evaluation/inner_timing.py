"""Timing from the inside: every UNet call, what runs in it, and a pipeline's stages around it.

All of it is hooked around modules and off again; nothing of the pipeline or the engine is changed.
On a GPU times are pairs of events, so timing waits for nothing until the run is over."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from leansd.anatomy.inputs import TOKENS, make_inputs, pick_size
from leansd.anatomy.reading import read_anatomy
from leansd.core.devices import Stopwatch, start_stopwatch
from leansd.errors import LeansdError
from leansd.evaluation.timing import Timing, check_count, wait_for
from leansd.plans.anatomy import Anatomy
from leansd.plans.compile import compile_plan
from leansd.plans.liveness import Call, Program
from leansd.plans.plan import Plan
from leansd.runtime import ForwardHooks, inherit
from leansd.runtime.arguments import unwrap
from leansd.runtime.clock import read_schedule
from leansd.runtime.guidance import is_guided
from leansd.runtime.hooks import Around, Forward

# -- whole runs of a pipeline -------------------------------------------------------------------

Laps: TypeAlias = list[tuple[str, Stopwatch]]
"""Laps as they are taken, by an address or the name of a stage; read when the run is over."""

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


@dataclass
class CallLaps:
    """Seconds of one UNet call."""

    call: Call
    seconds: float
    """The call, the engine's share included."""
    inside: dict[str, float]
    """Units, parts and blocks that ran in it, by address; a block's time has its units' in it."""
    gap: float | None
    """From its end to the start of the next; None for the last."""


@dataclass
class RunLaps:
    """Seconds of one run of a pipeline."""

    program: Program
    calls: list[CallLaps]
    text: float
    decode: float
    whole: float
    output_bytes: dict[str, int]
    """What each unit and part gave, for a whole batch."""


def take_laps(laps: Laps, device: torch.device) -> Around:
    """What times the forwards that it is put around."""

    def around(at: str, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        end = start_stopwatch(device)
        output = forward(*args, **kwargs)
        laps.append((at, end()))
        return output

    return around


class _Sheet:
    """Whatever is timed in a run."""

    def __init__(self, device: torch.device, on_call: Callable[[], None]) -> None:
        self.device, self.on_call = device, on_call
        self.calls: list[tuple[Stopwatch, Laps]] = []
        self.gaps: list[Stopwatch] = []
        self.stages: Laps = []
        self.output_bytes: dict[str, int] = {}
        self.batch = 0
        self._inside: Laps = []
        self._end_gap: Callable[[], Stopwatch] | None = None
        self.time_stage = take_laps(self.stages, device)
        self.time_inside = take_laps(self._inside, device)

    def time_unit(self, at: str, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        output = self.time_inside(at, forward, *args, **kwargs)
        # The first call computes everything, for the whole batch.
        self.output_bytes.setdefault(at, unwrap(output).nbytes)
        return output

    def time_call(self, _: str, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        sample = args[0] if args else kwargs["sample"]
        self.batch = sample.shape[0]
        if self._end_gap is not None:
            self.gaps.append(self._end_gap())
        self._inside.clear()
        end = start_stopwatch(self.device)
        output = forward(*args, **kwargs)
        self.calls.append((end(), self._inside.copy()))
        self.on_call()
        self._end_gap = start_stopwatch(self.device)
        return output


def time_run(
    pipe: Any,
    plan: Plan,
    call: Mapping[str, Any],
    *,
    anatomy: Anatomy | None = None,
    on_call: Callable[[], None] = lambda: None,
) -> RunLaps:
    """Run `pipe(**call)` once under `plan`, timed as a whole, by stages and by UNet calls.

    Args:
        anatomy: what to time inside the calls; by default nothing.
        on_call: told after each UNet call.

    Raises:
        LeansdError: the pipeline does not call its UNet once for each time step.
    """
    device = torch.device(pipe.device)
    sheet = _Sheet(device, on_call)
    with ExitStack() as hooks:
        if anatomy is not None:
            # Before the engine, so that what a unit lap spans is the unit's own forward.
            hooks.enter_context(ForwardHooks(list_blocks(pipe.unet, anatomy), sheet.time_inside))
            hooks.enter_context(ForwardHooks(list_units(pipe.unet, anatomy), sheet.time_unit))
        for name, modules in list_stages(pipe).items():
            for module in modules:
                hooks.enter_context(ForwardHooks({name: module}, sheet.time_stage))
        wait_for(device)
        started = time.perf_counter()
        with inherit(pipe, plan), ForwardHooks({"unet": pipe.unet}, sheet.time_call):
            pipe(**call)
        wait_for(device)
        whole = time.perf_counter() - started
    program = _compile_as_run(pipe, plan, sheet.batch)
    if len(program.calls) != len(sheet.calls):
        raise LeansdError(
            f"{type(pipe).__name__} made {len(sheet.calls)} UNet calls for {len(program.calls)} "
            "time steps; only pipelines that make one each can be profiled, without a start picture"
        )
    gaps = [*(gap() for gap in sheet.gaps), None]
    return RunLaps(
        program,
        [
            CallLaps(call, lap(), {at: inner() for at, inner in inside}, gap)
            for call, (lap, inside), gap in zip(program.calls, sheet.calls, gaps, strict=True)
        ],
        text=sum(lap() for name, lap in sheet.stages if name == "text"),
        decode=sum(lap() for name, lap in sheet.stages if name == "decode"),
        whole=whole,
        output_bytes=sheet.output_bytes,
    )


def measure_peaks(
    pipe: Any,
    call: Mapping[str, Any],
    anatomy: Anatomy,
    on_unit: Callable[[str], None] = lambda at: None,
) -> dict[str, int]:
    """Run a pipeline, which warms it up: the most bytes that each unit allocates on top of what
    there is; empty without a GPU.

    Args:
        on_unit: told the address of each unit that has run.
    """
    device = torch.device(pipe.device)
    is_gpu = device.type == "cuda"
    peaks: dict[str, int] = {}

    def around(at: str, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        if is_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) if is_gpu else 0
        output = forward(*args, **kwargs)
        if is_gpu:
            peaks[at] = max(peaks.get(at, 0), torch.cuda.max_memory_allocated(device) - before)
        on_unit(at)
        return output

    units = {unit.at: pipe.unet.get_submodule(unit.path) for unit in anatomy.units}
    with ForwardHooks(units, around):
        pipe(**call)
    return peaks


def list_units(unet: nn.Module, anatomy: Anatomy) -> dict[str, nn.Module]:
    """The modules of units and parts, by address."""
    rows = (*anatomy.units, *anatomy.parts)
    return {unit.at: unet.get_submodule(unit.path) for unit in rows}


def list_blocks(unet: nn.Module, anatomy: Anatomy) -> dict[str, nn.Module]:
    """The modules of blocks, by address."""
    paths = {at: anatomy.select(at)[0].path.rsplit(".", 2)[0] for at in anatomy.blocks}
    return {at: unet.get_submodule(path) for at, path in paths.items()}


def list_stages(pipe: Any) -> dict[str, list[nn.Module]]:
    """The modules of a pipeline's other stages; what it does not have is left out."""
    texts = [getattr(pipe, name, None) for name in TEXT_ENCODERS]
    decoder = getattr(getattr(pipe, "vae", None), "decoder", None)
    return {
        "text": [module for module in texts if module is not None],
        "decode": [decoder] if decoder is not None else [],
    }


def check_timing(device: torch.device) -> None:
    """Refuse a device whose calls cannot be timed from the inside."""
    if device.type not in ("cpu", "cuda"):
        raise LeansdError(
            f"calls on {device.type} cannot be timed from inside; use device cpu or cuda"
        )


def _compile_as_run(pipe: Any, plan: Plan, batch: int) -> Program:
    """The program that the run just ended has followed."""
    course = read_schedule(pipe.scheduler)
    return compile_plan(
        plan,
        read_anatomy(pipe.unet),
        rows=course.rows,
        moments=course.moments,
        guided=is_guided(pipe, batch),
    )


# -- calls of a bare UNet: what they cost does not depend on what the weights are ---------------


@dataclass(frozen=True)
class UnitTimes:
    """Seconds of every unit, and part of one, in full calls of a UNet."""

    batch: int
    """Samples a call: 2 for one picture with guidance."""
    size: tuple[int, int]
    """Latent (height, width)."""
    tokens: int
    units: Mapping[str, Timing]
    """Times by address; the time of parts is in their unit's, too."""
    call: Timing
    """Whole calls, what is besides the units included."""

    @property
    def medians(self) -> dict[str, float]:
        return {at: timing.median for at, timing in self.units.items()}


@torch.no_grad()
def time_units(
    unet: UNet2DConditionModel,
    *,
    batch: int = 2,
    latent: int | tuple[int, int] | None = None,
    tokens: int = TOKENS,
    repeats: int = 3,
    on_call: Callable[[float], None] = lambda seconds: None,
) -> UnitTimes:
    """Time `repeats` calls of a UNet from the inside, after one to warm up.

    Args:
        batch: samples a call; 2 are one picture with classifier-free guidance.
        latent: height (and width) in latent pixels; by default the UNet's own sample size.
        tokens: length of the text condition.
        on_call: told the seconds of every call when it is over, the warm-up's first.

    Raises:
        LeansdError: a count is under 1, or calls on the UNet's device cannot be timed.
    """
    check_count(batch, "samples")
    check_count(repeats, "repeats")
    device = unet.device
    check_timing(device)
    size = pick_size(unet, latent)
    inputs = make_inputs(
        unet, size=size, tokens=tokens, batch=batch, device=device, dtype=unet.dtype
    )
    laps: Laps = []

    def run_call() -> Stopwatch:
        end = start_stopwatch(device)
        unet(**inputs)
        wait_for(device)
        lap = end()
        on_call(lap())
        return lap

    with ForwardHooks(list_units(unet, read_anatomy(unet)), take_laps(laps, device)):
        run_call()
        laps.clear()
        calls = [run_call() for _ in range(repeats)]
    units: defaultdict[str, list[float]] = defaultdict(list)
    for at, lap in laps:
        units[at].append(lap())
    return UnitTimes(
        batch,
        size,
        tokens,
        {at: Timing(tuple(each)) for at, each in units.items()},
        Timing(tuple(lap() for lap in calls)),
    )
