"""The denoiser: a narrow UNet of Stable Diffusion 1's shape, and how it learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr

from leansd.emoji.sidecar import Batch, Sidecar, backpropagate
from leansd.emoji.training import draw_generator, set_rate, warm_stable_decay

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


def build_unet(
    channels: Sequence[int], heads: Sequence[int], *, latent: int, text_width: int
) -> UNet2DConditionModel:
    """Build the SD 1.x topology, 44 units and two ends, with fewer channels."""
    return UNet2DConditionModel(
        sample_size=latent,
        in_channels=4,
        out_channels=4,
        block_out_channels=tuple(channels),
        layers_per_block=2,
        cross_attention_dim=text_width,
        # diffusers reads this as the number of heads of each block, as in SD 1.x.
        attention_head_dim=tuple(heads),
        norm_num_groups=8,
    )


class LatentSet:
    """Cached latents and caption embeddings, drawn by style."""

    def __init__(
        self,
        latents: torch.Tensor,
        texts: Sequence[torch.Tensor],
        empty: torch.Tensor,
        styles: Sequence[int],
    ) -> None:
        """Take latents (pictures, 4, h, w), for each picture its caption embeddings
        (variants, tokens, width), the empty caption's (tokens, width) and a style number.
        """
        self.latents, self.empty = latents, empty
        self.first = torch.tensor([0, *(len(t) for t in texts)]).cumsum(0)
        self.texts = torch.cat(list(texts))
        numbers = torch.tensor(styles)
        self.rows = [torch.nonzero(numbers == n).flatten() for n in range(int(numbers.max()) + 1)]

    def draw(
        self, count: int, shares: Sequence[float], generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw latents (count, 4, h, w) and their captions (count, tokens, width)."""
        weights = torch.tensor(list(shares), dtype=torch.float32)
        which = torch.multinomial(weights, count, replacement=True, generator=generator)
        places = torch.rand(count, generator=generator)
        picked = [
            self.rows[w][int(p * len(self.rows[w]))]
            for w, p in zip(which.tolist(), places.tolist(), strict=True)
        ]
        rows = torch.stack(picked)
        # The plain caption most of the time; every variant often enough to be understood.
        variants = self.first[rows + 1] - self.first[rows]
        drawn = torch.rand(count, generator=generator)
        drawn = ((drawn - 0.5).clamp_min(0) * 2 * variants).long()
        texts = self.texts[self.first[rows] + drawn]
        dropped = torch.rand(count, generator=generator) < EMPTY_SHARE
        texts = torch.where(dropped[:, None, None], self.empty, texts)
        return self.latents[rows], texts


class DenoiserLearner:
    """Trains the UNet to name the noise, and keeps a moving average of its weights."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        pictures: LatentSet,
        *,
        batch: int,
        rate: float,
        seed: int,
        narrow: Sequence[float],
        wide: Sequence[float],
        widen_at: float,
        decay_from: float = 0.7,
        average: float = 0.998,
        device: str = "cpu",
        sidecars: int = 0,
    ) -> None:
        self.unet = unet.to(device).train()
        self.pictures, self.batch, self.rate, self.seed = pictures, batch, rate, seed
        self.narrow, self.wide, self.widen_at = narrow, wide, widen_at
        self.decay_from, self.device = decay_from, device
        self.noise = DDPMScheduler(**NOISE)
        self.average = EMAModel(unet.parameters(), decay=average, foreach=True)
        self.optimizer = torch.optim.AdamW(
            unet.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        self.threads = torch.get_num_threads()
        self.share = max(1, self.threads // (sidecars + 1))
        # Last, since the weights move to shared memory.
        self.sidecars = [Sidecar(unet, self.share) for _ in range(sidecars)]

    def learn(self, step: int, progress: float) -> dict[str, float]:
        """Take one step on a random batch."""
        generator = draw_generator(self.seed, step)
        shares = self.narrow if progress < self.widen_at else self.wide
        latents, texts = self.pictures.draw(self.batch, shares, generator)
        noise = torch.randn(latents.shape, generator=generator)
        # One time step from each of `batch` equal strata: less noise in the gradient.
        strata = torch.arange(self.batch) + torch.rand(self.batch, generator=generator)
        steps = (strata / self.batch * self.noise.config.num_train_timesteps).long()
        noisy = self.noise.add_noise(latents, noise, steps)
        snr = compute_snr(self.noise, steps)
        weight = snr.clamp(max=SNR_CAP) / snr
        batch = tuple(part.to(self.device) for part in (noisy, steps, texts, noise, weight))
        error = self._backward(batch)
        loss = (weight * error).mean()
        factor = warm_stable_decay(progress, warm=0.01, decay_from=self.decay_from)
        norm = torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        set_rate(self.optimizer, self.rate * factor)
        self.optimizer.step()
        self.average.step(self.unet.parameters())
        return {"loss": loss.item(), "error": error.mean().item(), "norm": norm.item()}

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

    def close(self) -> None:
        """End the other processes."""
        for sidecar in self.sidecars:
            sidecar.close()

    def average_weights(self) -> dict[str, torch.Tensor]:
        """Return the moving average as a state dict of the UNet."""
        names = [name for name, _ in self.unet.named_parameters()]
        return dict(zip(names, self.average.shadow_params, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return weights, moving average and optimizer."""
        return {
            "unet": self.unet.state_dict(),
            "average": self.average_weights(),
            "average_step": self.average.optimization_step,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.unet.load_state_dict(state["unet"])
        self.average.optimization_step = int(state["average_step"])
        for shadow, kept in zip(self.average.shadow_params, state["average"].values(), strict=True):
            shadow.copy_(kept)
        self.optimizer.load_state_dict(state["optimizer"])
