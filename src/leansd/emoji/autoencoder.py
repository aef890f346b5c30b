"""The autoencoder: a tiny one whose latents are made white for the denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny

from leansd.emoji.training import draw_generator, set_rate, warm_stable_decay

FREEZE_AT = 0.6  # share of the budget after which the encoder stands still


def build_autoencoder(width: int, encoder_blocks: Sequence[int]) -> AutoencoderTiny:
    """Build an autoencoder that shrinks a side by 2 ** (len(encoder_blocks) - 1)."""
    stages = len(encoder_blocks)
    return AutoencoderTiny(
        encoder_block_out_channels=(width,) * stages,
        decoder_block_out_channels=(width,) * stages,
        num_encoder_blocks=tuple(encoder_blocks),
        num_decoder_blocks=tuple(reversed(encoder_blocks)),
    )


def scale_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """Map uint8 (batch, 3, side, side) to float in [-1, 1], the pipeline's range."""
    return pixels.float().div(127.5).sub(1)


@torch.no_grad()
def encode_pixels(vae: AutoencoderTiny, pixels: torch.Tensor, batch: int = 128) -> torch.Tensor:
    """Encode uint8 (pictures, 3, side, side) to float32 latents (pictures, 4, side/f, side/f)."""
    device = next(vae.parameters()).device
    rows = [vae.encode(scale_pixels(part.to(device))).latents for part in pixels.split(batch)]
    return torch.cat(rows).float()


@torch.no_grad()
def whiten_latents(vae: AutoencoderTiny, pixels: torch.Tensor) -> None:
    """Make the latents of `pixels` zero-mean, unit-variance and uncorrelated, exactly.

    The affine map is folded into the encoder's last convolution, its inverse into the decoder's
    first one (there only near zero, since the decoder squashes its input: train it on).
    """
    latents = encode_pixels(vae, pixels).double()
    flat = latents.movedim(1, 0).flatten(1)
    mean = flat.mean(1)
    values, vectors = torch.linalg.eigh(torch.cov(flat))
    forward = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    inverse = vectors @ torch.diag(values.sqrt()) @ vectors.T
    last, first = vae.encoder.layers[-1], vae.decoder.layers[0]
    weight = torch.einsum("oi,ihjk->ohjk", forward, last.weight.double())
    bias = forward @ (last.bias.double() - mean)
    last.weight.copy_(weight)
    last.bias.copy_(bias)
    first.bias.add_(torch.einsum("oihw,i->o", first.weight.double(), mean))
    first.weight.copy_(torch.einsum("oihw,ij->ojhw", first.weight.double(), inverse))


@torch.no_grad()
def measure_psnr(vae: AutoencoderTiny, pixels: torch.Tensor, batch: int = 128) -> list[float]:
    """Return the reconstruction PSNR in dB of each picture of (pictures, 3, side, side), uint8."""
    device = next(vae.parameters()).device
    values: list[float] = []
    for part in pixels.split(batch):
        target = scale_pixels(part.to(device))
        error = (vae.decode(vae.encode(target).latents).sample.clamp(-1, 1) - target).div(2)
        mse = error.square().flatten(1).mean(1).clamp_min(1e-10)
        values += (-10 * torch.log10(mse)).tolist()
    return values


class AutoencoderLearner:
    """Trains both halves, makes the latents white, then trains the decoder alone."""

    def __init__(
        self,
        vae: AutoencoderTiny,
        pixels: torch.Tensor,
        *,
        batch: int,
        rate: float,
        seed: int,
        device: str = "cpu",
    ) -> None:
        self.vae = vae.to(device, memory_format=torch.channels_last)
        self.pixels, self.batch, self.rate = pixels, batch, rate
        self.seed, self.device = seed, device
        self.frozen = False
        self.optimizer = torch.optim.AdamW(vae.parameters(), lr=rate, weight_decay=0.0, fused=True)

    def learn(self, step: int, progress: float) -> dict[str, float]:
        """Take one step on a random batch."""
        if progress >= FREEZE_AT and not self.frozen:
            self.vae.eval()
            whiten_latents(self.vae, self.pixels)
            self._freeze()
        generator = draw_generator(self.seed, step)
        rows = torch.randint(len(self.pixels), (self.batch,), generator=generator)
        target = scale_pixels(self.pixels[rows].to(self.device))
        target = target.contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(not self.frozen):
            latents = self.vae.encode(target).latents
        spread = latents.detach().std((0, 2, 3), keepdim=True)
        noise = torch.randn(latents.shape, generator=generator).to(self.device)
        # A denoiser's latents are never exact: the decoder must forgive a little noise.
        shown = self.vae.decode(latents + 0.08 * spread * noise).sample
        mse = F.mse_loss(shown, target)
        loss = mse + 0.1 * F.l1_loss(shown, target)
        if not self.frozen:
            # Half-size latents must decode to the half-size picture: smoother latents, which a
            # denoiser learns sooner.
            small = self.vae.decode(F.avg_pool2d(latents, 2)).sample
            loss = loss + 0.5 * F.mse_loss(small, F.avg_pool2d(target, 2))
        if self.frozen:
            factor = 0.5 * min(1.0, (1 - progress) / (1 - FREEZE_AT) * 1.2)
        else:
            factor = warm_stable_decay(progress / FREEZE_AT, warm=0.03, decay_from=0.6)
        set_rate(self.optimizer, self.rate * max(factor, 0.01))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        self.optimizer.step()
        return {"loss": loss.item(), "mse": mse.item()}

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

    def _freeze(self) -> None:
        self.frozen = True
        self.vae.encoder.requires_grad_(False)
        self.vae.zero_grad(set_to_none=True)  # the encoder's last gradient must not be clipped with
        self.optimizer = torch.optim.AdamW(
            self.vae.decoder.parameters(), lr=self.rate, weight_decay=0.0, fused=True
        )
