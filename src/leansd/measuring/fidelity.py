"""Fidelity: how close a picture is to the full run's picture from the same seed.

Quality asks whether a picture is good; fidelity asks whether it is still the same one.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from leansd.errors import LeansdError

Pictures: TypeAlias = Tensor | Sequence[Image]

# Equal pictures have an infinite ratio; a ceiling keeps means and JSON finite.
CEILING = 100.0


def as_batch(pictures: Pictures) -> Tensor:
    """Pictures as floats in 0..1 of shape [n, 3, height, width]."""
    if isinstance(pictures, Tensor):
        if pictures.ndim != 4 or pictures.shape[1] != 3:
            raise LeansdError(
                f"pictures of shape {list(pictures.shape)}: a batch is [n, 3, height, width]"
            )
        return pictures.float()
    if not pictures:
        raise LeansdError("no pictures to compare: give at least one")
    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1:
        raise LeansdError(f"pictures of several sizes in one batch: {sorted(sizes)}")
    stacked = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255


def psnr(pictures: Pictures, reference: Pictures) -> Tensor:
    """Peak signal-to-noise ratio in dB, one a picture, shape [n]; at most `CEILING`."""
    ours, theirs = _pair(pictures, reference)
    ratio = peak_signal_noise_ratio(ours, theirs, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return ratio.clamp(max=CEILING)


def ssim(pictures: Pictures, reference: Pictures) -> Tensor:
    """Structural similarity (Gaussian window of 11), one a picture, shape [n]; 1 is equal."""
    ours, theirs = _pair(pictures, reference)
    height, width = ours.shape[-2:]
    if min(height, width) < 11:
        raise LeansdError(f"SSIM needs pictures of 11 x 11 pixels or more, not {width} x {height}")
    score = structural_similarity_index_measure(ours, theirs, data_range=1.0, reduction="none")
    assert isinstance(score, Tensor)
    return score.reshape(-1)


def latent_error(latents: Tensor, reference: Tensor) -> Tensor:
    """Root mean square error over the reference's own root mean square, one a sample, shape [n].

    Both are [n, channels, height, width]. 0 is equal; about 1.4 is unrelated.
    """
    if latents.shape != reference.shape:
        raise LeansdError(
            f"latents of shape {list(latents.shape)} cannot be compared with "
            f"{list(reference.shape)}"
        )
    ours, theirs = latents.float().flatten(1), reference.float().flatten(1)
    size = theirs.pow(2).mean(1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return (ours - theirs).pow(2).mean(1).sqrt() / size


def _pair(pictures: Pictures, reference: Pictures) -> tuple[Tensor, Tensor]:
    ours, theirs = as_batch(pictures), as_batch(reference)
    if ours.shape != theirs.shape:
        raise LeansdError(
            f"pictures of shape {list(ours.shape)} cannot be compared with {list(theirs.shape)}"
        )
    return ours, theirs.to(ours.device)
