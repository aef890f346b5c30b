"""The denoiser: a narrow UNet of Stable Diffusion 1's shape, and how denoisers learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr

from models.emoji.muon import make_optimizer
from models.emoji.sidecar import Batch, Sidecar, backpropagate
from models.emoji.stages import draw_generator, set_rate

# Stable Diffusion's own noise schedule.
NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}
EMPTY_SHARE = 0.1  # captions left out, for classifier-free guidance
SNR_CAP = 5.0
WARM = 200


def build_unet(
    channels: Sequence[int], heads: Sequence[int], *, latent: int, text_width: int, colours: int = 4
) -> UNet2DConditionModel:
    """Build the SD 1.x topology, 44 units and two ends, with fewer channels."""
    return UNet2DConditionModel(
        sample_size=latent,
        in_channels=colours,
        out_channels=colours,
        block_out_channels=tuple(channels),
        layers_per_block=2,
        cross_attention_dim=text_width,
        # diffusers reads this as the number of heads of each block, as in SD 1.x.
        attention_head_dim=tuple(heads),
        norm_num_groups=8,
    )


class LatentSet:
    """Cached latents and caption embeddings."""

    def __init__(
        self, latents: torch.Tensor, texts: Sequence[torch.Tensor], empty: torch.Tensor
    ) -> None:
        """Take latents (pictures, 4, h, w), for each picture its caption embeddings
        (variants, tokens, width), and the empty caption's (tokens, width).
        """
        self.latents, self.empty = latents, empty
        self.first = torch.tensor([0, *(len(t) for t in texts)]).cumsum(0)
        self.texts = torch.cat(list(texts))

    def draw(self, batch: int, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw latents (batch, 4, h, w) and their captions (batch, tokens, width).

        Every picture is shown once before any is shown again: batches cut a shuffled epoch.
        """
        generator = draw_generator(seed, step)
        places = torch.arange(step * batch, (step + 1) * batch)
        epochs = places // len(self.latents)
        rows = torch.empty(batch, dtype=torch.long)
        for epoch in epochs.unique().tolist():
            order = torch.randperm(
                len(self.latents), generator=draw_generator(seed + 1, int(epoch))
            )
            own = epochs == epoch
            rows[own] = order[places[own] % len(self.latents)]
        # The plain caption most of the time; every variant often enough to be understood.
        variants = self.first[rows + 1] - self.first[rows]
        drawn = torch.rand(batch, generator=generator)
        drawn = ((drawn - 0.5).clamp_min(0) * 2 * variants).long()
        texts = self.texts[self.first[rows] + drawn]
        dropped = torch.rand(batch, generator=generator) < EMPTY_SHARE
        texts = torch.where(dropped[:, None, None], self.empty, texts)
        return self.latents[rows], texts


DrawBatch = Callable[[LatentSet, int, int, int], Batch]
"""Pictures, batch, seed, step: what a denoiser is called with, its answer and each one's weight."""


def draw_noises(pictures: LatentSet, batch: int, seed: int, step: int) -> Batch:
    """Draw noisy latents, time steps and captions; the noise is the answer, weighed by min-SNR."""
    latents, texts = pictures.draw(batch, seed, step)
    generator = draw_generator(seed + 2, step)
    noise = torch.randn(latents.shape, generator=generator)
    schedule = DDPMScheduler(**NOISE)
    steps = (draw_strata(batch, generator) * schedule.config.num_train_timesteps).long()
    noisy = schedule.add_noise(latents, noise, steps)
    snr = compute_snr(schedule, steps)
    return noisy, steps, texts, noise, snr.clamp(max=SNR_CAP) / snr


def draw_strata(batch: int, generator: torch.Generator) -> torch.Tensor:
    """Draw one place from each of `batch` equal parts of [0, 1): less noise in the gradient."""
    strata = torch.randperm(batch, generator=generator)
    return (strata + torch.rand(batch, generator=generator)) / batch


class DenoiserLearner:
    """Trains a denoiser, and keeps moving averages of its weights.

    The rate stays constant, so that training can go on for ever; `decay`, (first step, steps),
    takes it down to 0 on a branch, and what comes out of that is the model. `ends` are the parts
    that AdamW moves.
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        pictures: LatentSet,
        *,
        draw: DrawBatch = draw_noises,
        ends: Sequence[str] = ("conv_in", "conv_out", "time_embedding"),
        batch: int,
        rate: float,
        seed: int,
        averages: Sequence[float] = (0.998, 0.9995),
        decay: tuple[int, int] | None = None,
        device: str = "cpu",
        sidecars: int = 0,
    ) -> None:
        self.unet = unet.to(device).train()
        self.pictures, self.batch, self.rate, self.seed = pictures, batch, rate, seed
        self.decay, self.device, self.draw = decay, device, draw
        self.averages = {keep: [p.detach().clone() for p in unet.parameters()] for keep in averages}
        self.optimizer = make_optimizer(unet, rate, ends, others_scale=1 / 3, weight_decay=0.02)
        self.threads = torch.get_num_threads()
        self.share = max(1, self.threads // (sidecars + 1))
        # Last, since the weights move to shared memory.
        self.sidecars = [Sidecar(unet, self.share) for _ in range(sidecars)]

    def learn(self, step: int) -> dict[str, float]:
        """Take one step on a random batch."""
        drawn = self.draw(self.pictures, self.batch, self.seed, step)
        batch = tuple(part.to(self.device) for part in drawn)
        error = self._backward(batch)
        weight = batch[-1].cpu()
        norm = torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        set_rate(self.optimizer, self.rate * self._factor(step))
        self.optimizer.step()
        self._average(step)
        return {
            "loss": (weight * error).mean().item(),
            "error": error.mean().item(),
            "norm": norm.item(),
        }

    def _factor(self, step: int) -> float:
        factor = min(1.0, (step + 1) / WARM)
        if self.decay:
            first, steps = self.decay
            factor *= min(1.0, max(0.0, 1 - (step - first) / steps))
        return factor

    def _backward(self, batch: Batch) -> torch.Tensor:
        # Gradients of the whole batch into the UNet; its errors (batch,) out.
        count = len(self.sidecars) + 1
        mine, *others = zip(*(part.tensor_split(count) for part in batch), strict=True)
        for sidecar, part in zip(self.sidecars, others, strict=True):
            sidecar.send(part, self.batch)
        self.unet.zero_grad(set_to_none=True)
        torch.set_num_threads(self.share)
        errors = [backpropagate(self.unet, mine, self.batch)]
        parameters = list(self.unet.parameters())
        errors += [sidecar.collect(parameters) for sidecar in self.sidecars]
        torch.set_num_threads(self.threads)
        return torch.cat(errors)

    @torch.no_grad()
    def _average(self, step: int) -> None:
        own = list(self.unet.parameters())
        for keep, average in self.averages.items():
            # Short at first: the untrained weights must be forgotten.
            moved = 1 - min(keep, (1 + step) / (10 + step))
            torch._foreach_lerp_(average, own, moved)

    def close(self) -> None:
        """End the other processes."""
        for sidecar in self.sidecars:
            sidecar.close()

    def state_dict(self) -> dict[str, Any]:
        """Return weights, moving averages and optimizer."""
        names = [name for name, _ in self.unet.named_parameters()]
        return {
            "unet": self.unet.state_dict(),
            "averages": {
                str(keep): dict(zip(names, average, strict=True))
                for keep, average in self.averages.items()
            },
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.unet.load_state_dict(state["unet"])
        for keep, average in self.averages.items():
            for own, kept in zip(average, state["averages"][str(keep)].values(), strict=True):
                own.copy_(kept)
        self.optimizer.load_state_dict(state["optimizer"])
