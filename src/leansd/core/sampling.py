"""What a sampler does with its denoiser, found out by running it on a stand-in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from leansd.core.schedule import CallSchedule, Prediction, lay_out_calls
from leansd.errors import LeansdError

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


def measure_response(sample: Sample, sigmas: Sequence[float]) -> torch.Tensor:
    """[n + 1, n]: how much of the output of call j is in the latents before call k, and at the end.

    Outputs e are as models of noise or of flow give them: the sampler is told x - sigma * e. It
    runs on one number, once for each call, with the same noise of its own every time.

    Raises:
        LeansdError: the sampler is not linear in the outputs, or draws other noise every time.
    """
    calls = len(probe_calls(sample, sigmas))
    nothing = torch.zeros(calls, dtype=torch.float64)
    rest = _record_latents(sample, sigmas, nothing)
    columns = [_record_latents(sample, sigmas, each) - rest for each in torch.eye(calls).double()]
    if not calls or any(len(column) != calls + 1 for column in columns):
        raise LeansdError("how often the sampler calls its model depends on what it gives")
    response = torch.stack(columns, dim=1)
    outputs = torch.cos(torch.arange(calls).double() * 2.3)
    missed = (_record_latents(sample, sigmas, outputs) - rest - response @ outputs).abs().max()
    if not missed <= 1e-4 * response.abs().max():
        raise LeansdError(
            "the sampler is not linear in the model's outputs, or its noise is another every time, "
            "so what forecasts do to its pictures cannot be told beforehand"
        )
    return response


def _record_latents(sample: Sample, sigmas: Sequence[float], outputs: torch.Tensor) -> torch.Tensor:
    """[n + 1]: the latents before every call and at the end, from 0 on, for given outputs."""
    seen: list[torch.Tensor] = []

    def denoise(latents: torch.Tensor, sigma: torch.Tensor, **_: object) -> torch.Tensor:
        output = outputs[min(len(seen), len(outputs) - 1)]
        seen.append(latents.reshape(-1)[0].clone())
        return latents - sigma.reshape(-1)[0] * output

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        start = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        last = sample(denoise, start, torch.tensor(list(sigmas), dtype=torch.float64))
    return torch.stack([*seen, last.reshape(-1)[0]]).double()
