"""The calls of a run: their steps, how noisy their latents are, what a sampler makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from leansd.core.devices import seed_generator
from leansd.errors import LeansdError

Prediction = Literal["noise", "flow"]
"""What sigma means in a sampler.

`noise`  latents = picture + sigma * noise (k-diffusion; eps and v prediction).
`flow`   latents = (1 - sigma) * picture + sigma * noise (rectified flow).
"""
Output = Literal["epsilon", "v_prediction", "flow_prediction", "sample", "noise"]
"""What a denoiser gives for its input, by which a denoised picture follows from the two.

The first four are words of diffusers, for inputs of variance 1 or, with a flow, as they are.
`noise`  (input - picture) / sigma of inputs as samplers of k-diffusion have them.
"""
LEAST = 1e-6
"""Noise below this share counts as this, so that the log-SNR of a last step is finite."""
MOST = 1 - 1e-3
"""Noise of a flow above this share counts as this: its first step has nothing else."""


UNKNOWN_OUTPUT = "what the denoiser predicts is not known, and so not the picture that it sees"


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
    output: Output | None = None
    """What the denoiser gives; None where that is not known."""

    def denoise(self, call: int) -> tuple[float, float]:
        """The weights of input and output in the denoised picture that they show.

        Raises:
            LeansdError: what the denoiser gives is not known.
        """
        if self.output is None:
            raise LeansdError(UNKNOWN_OUTPUT)
        level = self.log_snr[call]
        signal = max(1 / (1 + math.exp(-level)), LEAST) ** 0.5
        noise = max(1 / (1 + math.exp(level)), LEAST) ** 0.5
        sigma = 1 / (1 + math.exp(level / 2))  # of a flow
        return {
            "epsilon": (1 / signal, -noise / signal),
            "v_prediction": (signal, -noise),
            "flow_prediction": (1.0, -sigma),
            "sample": (0.0, 1.0),
            "noise": (1.0, -noise / signal),
        }[self.output]


def lay_out_calls(
    sigmas: Sequence[float],
    prediction: Prediction = "noise",
    *,
    rows: Sequence[int] | None = None,
    steps: int | None = None,
    output: Output | None = None,
) -> CallSchedule:
    """The schedule of a run that calls the denoiser once at every sigma.

    Args:
        sigmas: of the calls, in their order, as plain numbers; the 0 that ends most schedules is
            no call.
        rows: the plan's row of each call, where a step makes several or a run starts late.
        steps: of the sampler; by default as many as there are rows.
        output: what the denoiser gives, for plans that inherit denoised pictures.

    Raises:
        LeansdError: there is no call.
    """
    calls = list(sigmas)
    if rows is None and len(calls) > 1 and calls[-1] == 0:
        calls.pop()
    if not calls:
        raise LeansdError("a run without sigmas has no call")
    placed = tuple(range(len(calls)) if rows is None else rows)
    levels = list_log_snr(calls, prediction)
    return lay_out_levels(levels, calls, rows=placed, steps=steps, output=output)


def lay_out_levels(
    log_snr: Sequence[float],
    moments: Sequence[float] | None = None,
    *,
    rows: Sequence[int] | None = None,
    steps: int | None = None,
    output: Output | None = None,
) -> CallSchedule:
    """Lay out a run by the log-SNR of every call, where no sigma is known.

    Args:
        moments: numbers that are equal where two calls are at the same; by default the log-SNR.

    Raises:
        LeansdError: there is no call.
    """
    if not log_snr:
        raise LeansdError("a run without noise levels has no call")
    placed = tuple(range(len(log_snr)) if rows is None else rows)
    count = max(placed) + 1 if steps is None else steps
    return CallSchedule(None, tuple(moments or log_snr), placed, count, tuple(log_snr), output)


def list_log_snr(sigmas: Sequence[float], prediction: Prediction = "noise") -> tuple[float, ...]:
    """log(signal power / noise power) at each sigma."""
    if prediction == "noise":
        return tuple(-2 * math.log(max(sigma, LEAST)) for sigma in sigmas)
    shares = (min(max(sigma, LEAST), MOST) for sigma in sigmas)
    return tuple(2 * math.log((1 - share) / share) for share in shares)


def find_denoised_output(prediction: Prediction) -> Output:
    """What `Player.play_denoised` makes of denoised latents."""
    return "noise" if prediction == "noise" else "flow_prediction"


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


# -- what a sampler does ---------------------------------------------------------------------------

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
        noise = torch.randn(1, 1, 2, 2, generator=seed_generator(0)) * sigmas[0]
        sample(denoise, noise, torch.tensor(list(sigmas), dtype=torch.float32))
    return tuple(calls)


def place_calls(
    calls: Sequence[float],
    sigmas: Sequence[float],
    prediction: Prediction = "noise",
    *,
    first: int = 0,
    steps: int | None = None,
    output: Output | None = None,
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
            return lay_out_calls(calls, prediction, rows=placed, steps=total, output=output)
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


def adds_noise(sample: Sample, sigmas: Sequence[float]) -> bool:
    """Whether a sampler draws noise at its steps."""
    return bool(_record_latents(sample, sigmas, torch.zeros(1)).abs().max() > 0)


def _record_latents(sample: Sample, sigmas: Sequence[float], outputs: torch.Tensor) -> torch.Tensor:
    """[n + 1]: the latents before every call and at the end, from 0 on, for given outputs, the last
    of which goes on; as precisely as these are."""
    seen: list[torch.Tensor] = []

    def denoise(latents: torch.Tensor, sigma: torch.Tensor, **_: object) -> torch.Tensor:
        output = outputs[min(len(seen), len(outputs) - 1)]
        seen.append(latents.reshape(-1)[0].clone())
        return latents - sigma.reshape(-1)[0] * output

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        start = torch.zeros(1, 1, 1, 1, dtype=outputs.dtype)
        last = sample(denoise, start, torch.tensor(list(sigmas), dtype=outputs.dtype))
    return torch.stack([*seen, last.reshape(-1)[0]]).double()
