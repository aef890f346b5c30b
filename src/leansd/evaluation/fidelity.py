"""Fidelity: how close a picture is to the full run's picture from the same seed.

Quality asks whether a picture is good; fidelity asks whether it is still the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from leansd.errors import LeansdError
from leansd.evaluation.records import Record

Pictures: TypeAlias = Tensor | Sequence[Image.Image]
Lpips: TypeAlias = Callable[[Pictures, Pictures], Tensor]
"""Learned perceptual distance (arXiv 1801.03924), one a picture, shape [n]; 0 is equal."""

# Equal pictures have an infinite ratio; a ceiling keeps means and JSON finite.
CEILING = 100.0

# AlexNet of torchvision, under LPIPS; its heads come with torchmetrics.
LPIPS_WEIGHTS = "alexnet-owt-7be5be79.pth"
LPIPS_SOURCE = f"https://download.pytorch.org/models/{LPIPS_WEIGHTS}"


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


def as_images(pictures: Tensor) -> list[Image.Image]:
    """8-bit pictures [n, 3, H, W] as PIL has them."""
    return [Image.fromarray(each.permute(1, 2, 0).contiguous().numpy()) for each in pictures]


def psnr(pictures: Pictures, reference: Pictures) -> Tensor:
    """Peak signal-to-noise ratio in dB, one a picture, shape [n]; at most `CEILING`.

    Args:
        pictures: [n, 3, H, W] in 0..1, or a list of PIL images.
        reference: as many, of the same size.

    Raises:
        LeansdError: they differ in number or size.
    """
    ours, theirs = _pair(pictures, reference)
    ratio = peak_signal_noise_ratio(ours, theirs, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return ratio.clamp(max=CEILING)


def ssim(pictures: Pictures, reference: Pictures) -> Tensor:
    """Structural similarity (Gaussian window of 11), one a picture, shape [n]; 1 is equal.

    Args:
        pictures: [n, 3, H, W] in 0..1, or a list of PIL images.
        reference: as many, of the same size.

    Raises:
        LeansdError: they differ in number or size, or are under 11 pixels a side.
    """
    ours, theirs = _pair(pictures, reference)
    height, width = ours.shape[-2:]
    if min(height, width) < 11:
        raise LeansdError(f"SSIM needs pictures of 11 x 11 pixels or more, not {width} x {height}")
    score = structural_similarity_index_measure(ours, theirs, data_range=1.0, reduction="none")
    assert isinstance(score, Tensor)
    return score.reshape(-1)


def find_lpips_weights() -> Path | None:
    """The AlexNet weights in torch's own cache, where they and torchvision are there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_WEIGHTS
    return path if path.is_file() and find_spec("torchvision") is not None else None


def explain_missing_lpips() -> str:
    """How to get what LPIPS needs, in a line."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    library = "" if find_spec("torchvision") is not None else "install torchvision and "
    return f"no LPIPS: {library}put {LPIPS_SOURCE} into {folder}, or give its path"


def open_lpips(weights: str | Path, device: str | torch.device = "cpu") -> Lpips:
    """LPIPS with AlexNet, from a file of torchvision's AlexNet weights; nothing is downloaded.

    Raises:
        LeansdError: torchvision is not installed, or the file is not there or something else.
    """
    if not Path(weights).is_file():
        raise LeansdError(f"no LPIPS weights at {weights}: get them from {LPIPS_SOURCE}")
    if find_spec("torchvision") is None:
        raise LeansdError("LPIPS needs torchvision: pip install torchvision")
    # torchmetrics has no public way to give it weights from a path.
    from torchmetrics.functional.image.lpips import _LPIPS

    net = _LPIPS(net="alex", pnet_rand=True)
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        for name, value in net.net.state_dict().items():
            value.copy_(state[f"features.{name.split('.', 1)[1]}"])
    except Exception as error:  # whatever a file that is something else brings about
        raise LeansdError(
            f"{weights} does not hold torchvision's AlexNet: get it from {LPIPS_SOURCE}"
        ) from error
    net.to(device)

    @torch.no_grad()
    def lpips(pictures: Pictures, reference: Pictures) -> Tensor:
        ours, theirs = _pair(pictures, reference)
        return net(ours.to(device), theirs.to(device), normalize=True).reshape(-1).cpu()

    return lpips


def latent_error(latents: Tensor, reference: Tensor) -> Tensor:
    """Root mean square error over the reference's own root mean square, one a sample, shape [n].

    Both are [n, channels, height, width]. 0 is equal; about 1.4 is unrelated.

    Raises:
        LeansdError: their shapes differ.
    """
    if latents.shape != reference.shape:
        raise LeansdError(
            f"latents of shape {list(latents.shape)} cannot be compared with "
            f"{list(reference.shape)}"
        )
    ours, theirs = latents.float().flatten(1), reference.float().flatten(1)
    size = theirs.pow(2).mean(1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return (ours - theirs).pow(2).mean(1).sqrt() / size


@dataclass(frozen=True)
class FidelityMetric:
    """A number for each sample: of its picture or of its latents, beside those of a reference."""

    name: str
    unit: str
    compare: Callable[[Tensor, Tensor], Tensor]
    """Values [n] of two sets [n, C, h, w]; pictures are in 0..1."""
    of: Literal["pictures", "latents"] = "pictures"


PSNR = FidelityMetric("psnr", "dB", psnr)
SSIM = FidelityMetric("ssim", "", ssim)
LATENT_ERROR = FidelityMetric("latent_error", "", latent_error, "latents")


def list_metrics(lpips: Lpips | None = None) -> tuple[FidelityMetric, ...]:
    """All metrics, LPIPS where its network is given."""
    perceptual = (FidelityMetric("lpips", "", lpips),) if lpips is not None else ()
    return PSNR, SSIM, *perceptual, LATENT_ERROR


@dataclass(frozen=True)
class Measure:
    """A metric of one case: a value a picture, or one for the whole set."""

    metric: str
    unit: str
    values: Tensor  # [n], or [1] for a whole set
    fields: Mapping[str, Any]

    @property
    def mean(self) -> float:
        return float(self.values.double().mean())

    def list_values(self, base: Mapping[str, Any]) -> Iterator[Record]:
        """A record a picture; none of a whole set."""
        if len(self.values) == 1:
            return
        for place, value in enumerate(self.values.tolist()):
            facts = {**base, **self.fields, "seed": base["seed"] + place, "picture": place}
            facts.pop("seed_spread", None)
            yield Record(**facts, metric=self.metric, value=value, unit=self.unit)

    def summarise(self, base: Mapping[str, Any]) -> Record:
        """The mean as a record, with its standard error over the pictures."""
        values = self.values.double()
        facts = {**base, **self.fields}
        if len(values) > 1:
            facts["standard_error"] = float(values.std() / len(values) ** 0.5)
        return Record(**facts, metric=self.metric, value=self.mean, unit=self.unit)


def _pair(pictures: Pictures, reference: Pictures) -> tuple[Tensor, Tensor]:
    ours, theirs = as_batch(pictures), as_batch(reference)
    if ours.shape != theirs.shape:
        raise LeansdError(
            f"pictures of shape {list(ours.shape)} cannot be compared with {list(theirs.shape)}"
        )
    return ours, theirs.to(ours.device)
