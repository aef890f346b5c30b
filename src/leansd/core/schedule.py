"""The calls of a run: which step each belongs to, and how noisy its latents are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from leansd.errors import LeansdError

Prediction = Literal["noise", "flow"]
"""What sigma means in a sampler.

`noise`  latents = picture + sigma * noise (k-diffusion; eps and v prediction).
`flow`   latents = (1 - sigma) * picture + sigma * noise (rectified flow).
"""
LEAST = 1e-6
"""Noise below this share counts as this, so that the log-SNR of a last step is finite."""
MOST = 1 - 1e-3
"""As does a flow's noise above this share, where it begins with nothing else."""


@dataclass(frozen=True, eq=False)
class CallSchedule:
    """The calls of the denoiser in a run, as its sampler has laid them out."""

    timesteps: torch.Tensor | None
    """The scheduler's own tensor [calls]; held so that its identity stays the run's."""
    moments: tuple[float, ...]
    """Time step of each call, or its sigma: equal where two calls are at the same."""
    rows: tuple[int, ...]
    """Step of the sampler that each call belongs to: the row of the plan."""
    steps: int
    """Step count of the sampler."""
    log_snr: Sequence[float]
    """log(signal power / noise power) at each call."""


def lay_out_calls(
    sigmas: Sequence[float],
    prediction: Prediction = "noise",
    *,
    rows: Sequence[int] | None = None,
    steps: int | None = None,
) -> CallSchedule:
    """The schedule of a run that calls the denoiser once at every sigma.

    Args:
        sigmas: of the calls, in their order, as plain numbers; the 0 that ends most schedules is
            no call.
        rows: the plan's row of each call, where a step makes several or a run starts late.
        steps: of the sampler; by default as many as there are rows.

    Raises:
        LeansdError: there is no call.
    """
    calls = list(sigmas)
    if rows is None and len(calls) > 1 and calls[-1] == 0:
        calls.pop()
    if not calls:
        raise LeansdError("a run without sigmas has no call")
    placed = tuple(range(len(calls)) if rows is None else rows)
    count = max(placed) + 1 if steps is None else steps
    return CallSchedule(None, tuple(calls), placed, count, list_log_snr(calls, prediction))


def list_log_snr(sigmas: Sequence[float], prediction: Prediction = "noise") -> tuple[float, ...]:
    """log(signal power / noise power) at each sigma."""
    if prediction == "noise":
        return tuple(-2 * math.log(max(sigma, LEAST)) for sigma in sigmas)
    shares = (min(max(sigma, LEAST), MOST) for sigma in sigmas)
    return tuple(2 * math.log((1 - share) / share) for share in shares)


def assign_rows(calls: int, steps: int, order: int = 1) -> tuple[int, ...] | None:
    """The sampler's step of each of `calls` calls; None where the pattern is not known.

    One call a step; two but for the last step (Heun, KDPM2, DPM-Solver SDE), or three; a second
    call in the first step (PNDM as Stable Diffusion sets it); four calls in each of the first three
    (PNDM's own Runge-Kutta start).
    """
    if calls == steps:
        return tuple(range(steps))
    if order > 1 and calls == order * (steps - 1) + 1:
        return tuple(call // order for call in range(calls))
    if calls == steps + 1:
        return tuple(max(0, call - 1) for call in range(calls))
    if calls == steps + 9:
        return tuple(call // 4 if call < 12 else call - 9 for call in range(calls))
    return None
