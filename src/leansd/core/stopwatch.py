"""Timing of calls without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Stopwatch = Callable[[], float]
"""Gives the seconds of a call; on a GPU it waits for that call, so ask after the run."""


def start_stopwatch(device: torch.device) -> Callable[[], Stopwatch]:
    """Start timing a call; the returned function ends it and gives its `Stopwatch`."""
    if device.type == "cuda":
        first = torch.cuda.Event(enable_timing=True)
        last = torch.cuda.Event(enable_timing=True)
        first.record()

        def end_on_device() -> Stopwatch:
            last.record()
            return lambda: _measure_events(first, last)

        return end_on_device
    started = time.perf_counter()

    def end() -> Stopwatch:
        seconds = time.perf_counter() - started
        return lambda: seconds

    return end


def _measure_events(first: torch.cuda.Event, last: torch.cuda.Event) -> float:
    last.synchronize()
    return first.elapsed_time(last) / 1000
