"""Noise and time steps of a batch, and the diffusion schedule that mixes them in.

Every sample has a generator of its own, from the seed and the number of the sample, so what is
drawn depends neither on how many processes share a batch nor on where a run was resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leansd.core.devices import seed_generator
from leansd.errors import LeansdError

Parts = tuple[int | str, ...]


def hash_repr(parts: Parts) -> bytes:
    """The hash for noise, and for latents that are random."""
    return blake2b(repr(parts).encode(), digest_size=8).digest()


def hash_words(parts: Parts) -> bytes:
    """The hash for data: what a cache holds and a run has seen follows from it."""
    return sha256(" ".join(map(str, parts)).encode()).digest()[:8]


def make_generator(*parts: int | str, by: Callable[[Parts], bytes] = hash_repr) -> torch.Generator:
    """A generator that only `parts` decide: a seed, what it is for, a number.

    Args:
        by: makes eight bytes of them. There are two, since runs and caches that are there are gone
            on from bit for bit.
    """
    return seed_generator(int.from_bytes(by(parts), "big") >> 1)


class NoiseDraw(NamedTuple):
    """What is drawn for a batch."""

    timesteps: Tensor
    """[B], whole numbers."""
    noise: Tensor
    """[B, C, h, w]."""


def draw_noise(
    seed: int, numbers: Sequence[int], shape: Sequence[int], *, strata: int, timesteps: int
) -> NoiseDraw:
    """Time steps and noise of the samples `numbers`, on the CPU.

    Args:
        shape: of one sample's latents, (C, h, w).
        strata: samples of one optimizer step: each draws its time step from a share of its own of
            all of them, which leaves less chance in the gradient.
        timesteps: how many time steps the schedule has.
    """
    moments: list[int] = []
    noises: list[Tensor] = []
    for number in numbers:
        generator = make_generator(seed, "noise", number)
        place = float(torch.rand((), generator=generator, dtype=torch.float64))
        moments.append(int((number % strata + place) / strata * timesteps))
        noises.append(torch.randn(tuple(shape), generator=generator))
    return NoiseDraw(torch.tensor(moments), torch.stack(noises))


Mix = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""A mix of two tensors [B, C, h, w] by the shares of signal and noise [B, 1, 1, 1]."""

TARGETS: dict[str, Mix] = {
    "epsilon": lambda clean, noise, signal, deviation: noise,
    "v_prediction": lambda clean, noise, signal, deviation: signal * noise - deviation * clean,
    "sample": lambda clean, noise, signal, deviation: clean,
}
"""What a UNet is to predict, from clean latents and noise."""
CLEAN: dict[str, Mix] = {
    "epsilon": lambda noised, output, signal, deviation: (noised - deviation * output) / signal,
    "v_prediction": lambda noised, output, signal, deviation: signal * noised - deviation * output,
    "sample": lambda noised, output, signal, deviation: output,
}
"""The clean latents that a prediction means, from noised latents and output."""


@dataclass(frozen=True)
class DiffusionSchedule:
    """The diffusion that a teacher was trained for."""

    alphas: Tensor
    """Share of the signal's variance at every time step (alpha-bar), [T], float32."""
    prediction: str

    @classmethod
    def read(cls, scheduler: Any) -> DiffusionSchedule:
        """The schedule of a diffusers scheduler.

        Raises:
            LeansdError: it is none of variance-preserving diffusion.
        """
        prediction = scheduler.config.get("prediction_type", "epsilon")
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if alphas is None or prediction not in TARGETS:
            raise LeansdError(
                f"{type(scheduler).__name__} with prediction {prediction!r} is no schedule to "
                f"train for; there are {', '.join(TARGETS)}"
            )
        return cls(torch.as_tensor(alphas, dtype=torch.float32), prediction)

    def __len__(self) -> int:
        return len(self.alphas)

    def to(self, device: torch.device | str) -> DiffusionSchedule:
        """The schedule on another device."""
        return DiffusionSchedule(self.alphas.to(device), self.prediction)

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noised latents [B, C, h, w] at `timesteps` [B]."""
        signal, deviation = self._shares(timesteps)
        return signal * clean + deviation * noise

    def make_target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a UNet is to predict, [B, C, h, w]."""
        return TARGETS[self.prediction](clean, noise, *self._shares(timesteps))

    def predict_clean(self, noised: Tensor, output: Tensor, timesteps: Tensor) -> Tensor:
        """The clean latents [B, C, h, w] that a UNet's output [B, C, h, w] means (x0)."""
        return CLEAN[self.prediction](noised, output, *self._shares(timesteps))

    def predict_velocity(self, noised: Tensor, output: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity [B, C, h, w] that a UNet's output [B, C, h, w] means (arXiv 2202.00512)."""
        signal, deviation = self._shares(timesteps)
        clean = CLEAN[self.prediction](noised, output, signal, deviation)
        return (signal * noised - clean) / deviation

    def _shares(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        alphas = self.alphas[timesteps][:, None, None, None]
        return alphas.sqrt(), (1 - alphas).sqrt()
