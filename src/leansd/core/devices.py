"""What devices do in their own ways: tensors taken in, double precision, random numbers, timing
without waits."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def send(
    tensor: torch.Tensor, device: torch.device | str, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The tensor on a device; work that is under way there goes on meanwhile.

    CUDA copies from ordinary memory once all work before it is done, and the host waits for that.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, dtype, non_blocking=True)
    return tensor.to(device, dtype)


WITHOUT_DOUBLES = ("mps",)
"""Kinds of devices that have no double precision: Apple's."""


def make_exact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the most precise type that its device has."""
    single = tensor.device.type in WITHOUT_DOUBLES
    return tensor.to(torch.float32 if single else torch.float64)


def seed_generator(seed: int) -> torch.Generator:
    """A source of random numbers: on the CPU, so that a seed is the same on every device."""
    return torch.Generator("cpu").manual_seed(seed)


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
            return end_after_wait

        def end_after_wait() -> float:
            last.synchronize()
            return first.elapsed_time(last) / 1000

        return end_on_device
    started = time.perf_counter()

    def end() -> Stopwatch:
        seconds = time.perf_counter() - started
        return lambda: seconds

    return end
