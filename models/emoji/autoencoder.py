"""The autoencoder: a slim `AutoencoderKL` of factor 8, whose latents are made white."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from models.emoji.muon import make_optimizer
from models.emoji.stages import draw_generator, set_rate, warm_then_decay

SPREAD = 0.05  # standard deviation of the posterior, in latents of unit variance
ENDS = ("conv_in", "conv_out", "quant_conv")
SHAKE = 0.08  # of the noise that the decoder learns to forgive


def build_autoencoder(channels: Sequence[int], size: int, latent: int = 4) -> AutoencoderKL:
    """Build one that shrinks a side by 2 ** (len(channels) - 1)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=tuple(channels),
        layers_per_block=1,
        latent_channels=latent,
        norm_num_groups=4,
        sample_size=size,
        scaling_factor=1.0,
        # It learns from crops: nothing may depend on where in the picture a part lies.
        mid_block_add_attention=False,
    )


def scale_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """Map uint8 (batch, 3, side, side) to float in [-1, 1], the pipeline's range."""
    return pixels.float().div(127.5).sub(1)


@torch.no_grad()
def encode_pixels(vae: AutoencoderKL, pixels: torch.Tensor, batch: int = 32) -> torch.Tensor:
    """Encode uint8 (pictures, 3, side, side) to the means (pictures, 4, side/f, side/f)."""
    device = next(vae.parameters()).device
    rows = [vae.encode(scale_pixels(p.to(device))).latent_dist.mean for p in pixels.split(batch)]
    return torch.cat(rows).float()


@torch.no_grad()
def whiten_latents(vae: AutoencoderKL, pixels: torch.Tensor) -> None:
    """Make the latents of `pixels` zero-mean, unit-variance and uncorrelated, exactly.

    The affine map is folded into `quant_conv`, its inverse into `post_quant_conv`: what is decoded
    stays the same. The posterior's spread becomes the constant `SPREAD`.
    """
    latents = encode_pixels(vae, pixels).double()
    flat = latents.movedim(1, 0).flatten(1)
    mean, count = flat.mean(1), len(flat)
    values, vectors = torch.linalg.eigh(torch.cov(flat))
    forward = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    inverse = vectors @ torch.diag(values.sqrt()) @ vectors.T
    last, first = vae.quant_conv, vae.post_quant_conv
    own, out = last.weight[:count, :, 0, 0].double(), first.weight[:, :, 0, 0].double()
    last.bias[:count] = (forward @ (last.bias[:count].double() - mean)).float()
    last.weight[:count, :, 0, 0] = (forward @ own).float()
    last.weight[count:] = 0.0
    last.bias[count:] = 2 * math.log(SPREAD)
    first.bias.add_((out @ mean).float())
    first.weight[:, :, 0, 0] = (out @ inverse).float()


@torch.no_grad()
def measure_psnr(vae: AutoencoderKL, pixels: torch.Tensor, batch: int = 32) -> list[float]:
    """Return the reconstruction PSNR in dB of each picture of (pictures, 3, side, side), uint8."""
    device = next(vae.parameters()).device
    values: list[float] = []
    for part in pixels.split(batch):
        target = scale_pixels(part.to(device))
        shown = vae.decode(vae.encode(target).latent_dist.mean).sample.clamp(-1, 1)
        mse = (shown - target).div(2).square().flatten(1).mean(1).clamp_min(1e-10)
        values += (-10 * torch.log10(mse)).tolist()
    return values


def measure_edges(shown: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return how far the differences between neighbouring pixels are from the target's."""
    error = shown - target
    return (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2


class AutoencoderLearner:
    """Trains both halves on crops, makes the latents white, then the decoder on whole pictures."""

    def __init__(
        self,
        vae: AutoencoderKL,
        pixels: torch.Tensor,
        judged: torch.Tensor,
        *,
        crop: int,
        batch: int,
        rate: float,
        steps: int,
        freeze_at: int,
        seed: int,
        device: str = "cpu",
    ) -> None:
        """Take uint8 pictures (count, 3, side, side) to learn from; those in `judged`, which are
        the denoiser's, are the ones whose latents are made white.
        """
        self.vae = vae.to(device, memory_format=torch.channels_last).train()
        self.pixels, self.judged = pixels, judged
        self.crop, self.batch, self.rate = crop, batch, rate
        self.steps, self.freeze_at, self.seed, self.device = steps, freeze_at, seed, device
        self.frozen = False
        self.optimizer = make_optimizer(vae, rate, ENDS)

    def learn(self, step: int) -> dict[str, float]:
        """Take one step on random crops, or on a few whole pictures once the encoder stands."""
        if step >= self.freeze_at and not self.frozen:
            whiten_latents(self.vae, self.judged)
            self._freeze()
        generator = draw_generator(self.seed, step)
        target = scale_pixels(self._draw(generator).to(self.device))
        with torch.set_grad_enabled(not self.frozen):
            latents = self.vae.encode(target).latent_dist.mean
        spread = latents.detach().std((0, 2, 3), keepdim=True)
        noise = torch.randn(latents.shape, generator=generator).to(self.device)
        # A denoiser's latents are never exact: the decoder must forgive a little noise.
        shown = self.vae.decode(latents + SHAKE * spread * noise).sample
        mse, edges = F.mse_loss(shown, target), measure_edges(shown, target)
        loss = mse + 0.1 * F.l1_loss(shown, target) + 0.3 * edges
        if self.frozen:
            factor = warm_then_decay(
                step - self.freeze_at, self.steps - self.freeze_at, warm=50, decay_from=0.2
            )
        else:
            # Half-size latents must decode to the half-size picture: smoother latents, which a
            # denoiser learns sooner.
            small = self.vae.decode(F.avg_pool2d(latents, 2)).sample
            loss = loss + 0.25 * F.mse_loss(small, F.avg_pool2d(target, 2))
            loss = loss + 1e-5 * latents.square().mean()
            factor = warm_then_decay(step, self.freeze_at, warm=100, decay_from=0.5)
        set_rate(self.optimizer, self.rate * factor)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        self.optimizer.step()
        return {"loss": loss.item(), "mse": mse.item(), "edges": edges.item()}

    def state_dict(self) -> dict[str, Any]:
        """Return weights, optimizer and phase."""
        return {
            "vae": self.vae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "frozen": self.frozen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.vae.load_state_dict(state["vae"])
        if state["frozen"]:
            self._freeze()
        self.optimizer.load_state_dict(state["optimizer"])

    def _draw(self, generator: torch.Generator) -> torch.Tensor:
        side = self.pixels.shape[-1]
        crop = side if self.frozen else min(self.crop, side)
        # The same number of pixels a step in both phases.
        count = max(1, self.batch * min(self.crop, side) ** 2 // crop**2)
        rows = torch.randint(len(self.pixels), (count,), generator=generator)
        corners = torch.randint(side - crop + 1, (count, 2), generator=generator).tolist()
        turned = torch.rand(count, generator=generator) < 0.5
        parts = [
            self.pixels[row, :, top : top + crop, left : left + crop]
            for row, (top, left) in zip(rows.tolist(), corners, strict=True)
        ]
        drawn = torch.stack(parts)
        return torch.where(turned[:, None, None, None], drawn.flip(-1), drawn)

    def _freeze(self) -> None:
        self.frozen = True
        for half in (self.vae.encoder, self.vae.quant_conv):
            half.requires_grad_(False)
        self.vae.zero_grad(set_to_none=True)  # the encoder's last gradient must not be clipped with
        self.optimizer = make_optimizer(self.vae, self.rate, ENDS)
