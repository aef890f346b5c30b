"""Timing the units of a bare UNet on this machine: full calls on random inputs, no pipeline.

What a call costs does not depend on what the weights are, so any shape will do, trained or not.
Every repeat is a whole call, so a slow spell of the machine hits all units alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from leansd.anatomy.inputs import TOKENS, make_inputs, pick_size
from leansd.anatomy.reading import read_anatomy
from leansd.evaluation.laps import check_count, check_timing, list_units
from leansd.evaluation.timing import Timing, wait_for
from leansd.runtime.hooks import ForwardHooks
from leansd.runtime.report import Stopwatch, start_stopwatch


@dataclass(frozen=True)
class UnitTimes:
    """Seconds of every unit, and part of one, in full calls of a UNet."""

    batch: int
    """Samples a call: 2 for one picture with guidance."""
    size: tuple[int, int]
    """Latent (height, width)."""
    tokens: int
    units: Mapping[str, Timing]
    """By address; the parts' time is in their unit's too."""
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
    laps: defaultdict[str, list[Stopwatch]] = defaultdict(list)

    def around(at: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        end = start_stopwatch(device)
        output = forward(*args, **kwargs)
        laps[at].append(end())
        return output

    def run_call() -> Stopwatch:
        end = start_stopwatch(device)
        unet(**inputs)
        wait_for(device)
        lap = end()
        on_call(lap())
        return lap

    with ForwardHooks(list_units(unet, read_anatomy(unet)), around):
        run_call()
        laps.clear()
        calls = [run_call() for _ in range(repeats)]
    return UnitTimes(
        batch,
        size,
        tokens,
        {at: Timing(tuple(lap() for lap in each)) for at, each in laps.items()},
        Timing(tuple(lap() for lap in calls)),
    )
