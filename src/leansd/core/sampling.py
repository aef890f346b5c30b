"""What a sampler does with its denoiser, found out by running it on a stand-in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from leansd.core.schedule import CallSchedule, Prediction, lay_out_calls

Denoise = Callable[..., torch.Tensor]
"""`denoise(latents, sigma, ...)`, as samplers of k-diffusion call it."""
Sample = Callable[[Denoise, torch.Tensor, torch.Tensor], torch.Tensor]
"""`sample(denoise, noise, sigmas)` gives the last latents: any sampler, its options bound."""

NEAR = 0.35
"""How far, in log sigma, the first call of a step may lie from the step's sigma (churn)."""


def probe_calls(sample: Sample, sigmas: Sequence[float]) -> tuple[float, ...]:
    """The sigma of every call that a sampler makes of its denoiser; none where that depends on what
    the denoiser gives.

    The sampler runs on four numbers, twice. The state of torch's generators is put back.
    """
    first, second = (_record_calls(sample, sigmas, gain) for gain in (0.0, 0.7))
    return first if first == second else ()


def _record_calls(sample: Sample, sigmas: Sequence[float], gain: float) -> tuple[float, ...]:
    calls: list[float] = []

    def denoise(
        latents: torch.Tensor, sigma: torch.Tensor, *_: object, **__: object
    ) -> torch.Tensor:
        calls.append(float(sigma.reshape(-1)[0]))
        return gain * torch.cos(latents)

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(1, 1, 2, 2, generator=generator) * sigmas[0]
        sample(denoise, noise, torch.tensor(list(sigmas), dtype=torch.float32))
    return tuple(calls)


def place_calls(
    calls: Sequence[float],
    sigmas: Sequence[float],
    prediction: Prediction = "noise",
    *,
    first: int = 0,
    steps: int | None = None,
) -> CallSchedule | None:
    """The schedule of a run whose sampler makes these calls; None where the pattern is not known.

    One, two or three calls belong to each step, and only one to the last where that ends at 0.

    Args:
        calls: sigma of each.
        sigmas: of the steps, with that which the last one leads to.
        first: the plan's row of the first step, where the run is the later part of a longer one.
        steps: of the whole run, `first` and those after the last one included.
    """
    count = len(sigmas) - 1
    for each in (1, 2, 3):
        if len(calls) not in (each * count, each * (count - 1) + 1):
            continue
        rows = [call // each for call in range(len(calls))]
        starts = zip(calls[::each], sigmas, strict=False)
        if all(
            abs(math.log(max(call, 1e-9) / sigma)) < NEAR for call, sigma in starts if sigma > 0
        ):
            total = first + count if steps is None else steps
            placed = [first + row for row in rows]
            return lay_out_calls(calls, prediction, rows=placed, steps=total)
    return None
