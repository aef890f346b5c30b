"""Runs of ComfyUI that nodes make by themselves, and what compares them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.utils
import latent_preview
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from leansd.evaluation.fidelity import psnr, ssim
from leansd.tuning.front import Front

LOG = logging.getLogger("leansd")


@dataclass(frozen=True)
class Request:
    """What a sampler node is given, less the model."""

    positive: Any
    negative: Any
    sampler: Any
    sigmas: torch.Tensor
    cfg: float
    latent: dict[str, Any]


def draw(model: Any, request: Request, seed: int, sigmas: torch.Tensor | None = None) -> Any:
    """Latents [B, C, H, W] of one run, drawn as the node SamplerCustom draws them."""
    sigmas = request.sigmas if sigmas is None else sigmas
    latent = comfy.sample.fix_empty_latent_channels(model, request.latent["samples"])
    noise = comfy.sample.prepare_noise(latent, seed, request.latent.get("batch_index"))
    callback = latent_preview.prepare_callback(model, len(sigmas) - 1)
    return comfy.sample.sample_custom(
        model, noise, request.cfg, request.sampler, sigmas, request.positive, request.negative,
        latent, noise_mask=request.latent.get("noise_mask"), callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=seed,
    )  # fmt: skip


def thin_out(sigmas: torch.Tensor, steps: int) -> torch.Tensor:
    """A schedule of the same kind with fewer steps: read off the curve of its sigmas."""
    ends_at_zero = bool(sigmas[-1] == 0)
    noisy = sigmas[:-1] if ends_at_zero else sigmas
    count = max(steps + (0 if ends_at_zero else 1), 1)
    places = torch.linspace(0, len(noisy) - 1, count, dtype=torch.float64)
    low = places.long().clamp(max=max(len(noisy) - 2, 0))
    logs = noisy.double().cpu().log()
    high = (low + 1).clamp(max=len(noisy) - 1)
    picked = (logs[low] + (logs[high] - logs[low]) * (places - low)).exp().to(sigmas.dtype)
    return torch.cat([picked, sigmas.new_zeros(1).cpu()]) if ends_at_zero else picked


def measure_psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    """dB between pictures [B, H, W, C] from 0 to 1; the mean over them."""
    return float(psnr(_turn(one), _turn(other)).mean())


def measure_ssim(one: torch.Tensor, other: torch.Tensor) -> float:
    """Structural similarity of pictures [B, H, W, C] from 0 to 1; the mean over them."""
    return float(ssim(_turn(one), _turn(other)).mean())


def take_one(latent: dict[str, Any]) -> dict[str, Any]:
    """A latent node's first picture alone."""
    kept = {"samples": latent["samples"][:1]}
    return kept | ({"noise_mask": latent["noise_mask"][:1]} if "noise_mask" in latent else {})


def show_pictures(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, H, W] from 0 to 1 of latents [B, C, h, w]."""
    return _turn(vae.decode(latents))


def _turn(pictures: torch.Tensor) -> torch.Tensor:
    """ComfyUI's pictures [B, H, W, C] as everybody else's, [B, 3, H, W]."""
    return pictures[..., :3].movedim(-1, 1)


def open_progress() -> Callable[[str, float], None]:
    """Tells ComfyUI's progress bar, and stops where its user has pressed stop."""
    bar = comfy.utils.ProgressBar(1000)

    def tell(text: str, share: float) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(round(share * 1000))
        LOG.info("Lean Tune: %s", text)

    return tell


def draw_front(front: Front) -> torch.Tensor:
    """Speed-up against dB as a picture [1, H, W, 3]: tuned plans, and plain runs of fewer steps."""
    figure = Figure(figsize=(6, 4), dpi=120)
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    for name, mark, plain in (("tuned plans", "o", False), ("fewer steps", "x", True)):
        points = [each for each in (*front.points, *front.dominated) if each.is_plain == plain]
        axes.plot([p.speedup for p in points], [p.psnr for p in points], mark, label=name)
    axes.set(xlabel="speed-up of sampling", ylabel="dB to the full run")
    axes.legend()
    canvas.draw()
    return torch.tensor(np.asarray(canvas.buffer_rgba())[None, ..., :3] / 255).float()
