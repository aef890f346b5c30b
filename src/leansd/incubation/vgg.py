"""A frozen VGG16, and pictures for it: latents projected to RGB.

Decoding latents by the autoencoder costs three calls of SD 1.5's UNet and more memory; a linear
projection, fitted once to its decodings, is enough for what a VGG is asked here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from leansd.emoji.location import model_folder
from leansd.errors import LeansdError

CONVOLUTIONS = (2, 2, 3, 3, 3)
"""Convolutions by stage; a stage ends before the pooling that halves the picture."""
STAGES = len(CONVOLUTIONS)
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of ImageNet's channels in [0, 1], which VGG was trained with."""
IMAGENET, EMOJI, RANDOM = "imagenet", "emoji", "random"
RANDOM_WIDTHS = (8, 16, 32, 32, 32)
_KERNEL = re.compile(r"features\.(\d+)\.weight")


class Vgg(nn.Module):
    """The convolutional stages of a VGG16, of any width, with torchvision's names of weights.

    Args:
        widths: channels of each stage; as many stages as there are widths.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, widths: Iterable[int]) -> None:
        try:
            from torchvision.models.vgg import make_layers
        except ImportError as error:
            raise LeansdError("the vgg loss needs torchvision: install leansd[train]") from error
        super().__init__()
        plan: list[str | int] = []
        for width, count in zip(widths, CONVOLUTIONS, strict=False):
            plan += [*[width] * count, "M"]
        self.features = make_layers(plan, batch_norm=False)  # type: ignore[arg-type]
        for each in self.features:
            if isinstance(each, nn.ReLU):
                each.inplace = False
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION)[:, None, None], persistent=False)
        self.requires_grad_(False)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """What each stage makes of pictures [B, 3, H, W] in [-1, 1], half as large every time."""
        hidden = (pictures / 2 + 0.5 - self.mean) / self.deviation
        seen: list[Tensor] = []
        for each in self.features:
            if isinstance(each, nn.MaxPool2d):
                seen.append(hidden)
                if min(hidden.shape[-2:]) < 2:  # a small latent runs out of pixels
                    break
            hidden = each(hidden)
        return seen


def load_vgg(weights: str | Path, *, stages: int = STAGES) -> Vgg:
    """A frozen VGG16, as deep as is asked for.

    Args:
        weights: `imagenet`, `emoji` (the embedded model's own), `random` (the same every time),
            or a safetensors file.

    Raises:
        LeansdError: the weights cannot be had, or are no VGG16's.
    """
    if weights == RANDOM:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Vgg(RANDOM_WIDTHS[:stages]).eval()
    state = _read_weights(weights)
    # Files have them by name, not by place: 10 comes before 2.
    places = {int(match[1]): name for name in state if (match := _KERNEL.fullmatch(name))}
    kernels = [state[name] for _, name in sorted(places.items()) if state[name].ndim == 4]
    firsts = [sum(CONVOLUTIONS[:stage]) for stage in range(stages)]
    if len(kernels) < sum(CONVOLUTIONS[:stages]):
        raise LeansdError(f"{weights} holds no VGG16: it has {len(kernels)} convolutions")
    vgg = Vgg([len(kernels[first]) for first in firsts])
    own = vgg.state_dict()
    wrong = [name for name in own if state.get(name, torch.empty(0)).shape != own[name].shape]
    if wrong:
        raise LeansdError(f"{weights} holds no VGG16: {wrong[0]} is missing or of another shape")
    vgg.load_state_dict({name: state[name].float() for name in own})
    return vgg.eval()


def _read_weights(weights: str | Path) -> Mapping[str, Tensor]:
    if weights == IMAGENET:
        from torchvision.models import VGG16_Weights

        try:
            return VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=False)
        except OSError as error:
            raise LeansdError(
                "ImageNet's VGG16 is neither cached nor within reach; give the path of its weights "
                "as a safetensors file"
            ) from error
    path = model_folder() / "vgg" / "vgg.safetensors" if weights == EMOJI else Path(weights)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise LeansdError(f"cannot read the VGG's weights {path}: {error}") from error


def fit_projection(latents: Tensor, pictures: Tensor) -> Tensor:
    """The affine map of a latent pixel to the mean colour it is decoded to, by least squares.

    Args:
        latents: in the UNet's scale, [N, C, h, w].
        pictures: the autoencoder's decodings of them, [N, 3, H, W] in [-1, 1].

    Returns:
        [C + 1, 3], the constant last, float32.
    """
    small = F.adaptive_avg_pool2d(pictures.cpu().double(), (latents.shape[-2], latents.shape[-1]))
    inputs = latents.cpu().double().movedim(1, -1).flatten(0, -2)
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=inputs.dtype)], dim=1)
    solved = torch.linalg.lstsq(inputs, small.movedim(1, -1).flatten(0, -2)).solution
    return solved.float()


def project_latents(projection: Tensor, latents: Tensor) -> Tensor:
    """Latents [B, C, h, w] as pictures [B, 3, h, w], about in [-1, 1]."""
    kernel = projection[:-1].T[:, :, None, None].contiguous()
    return F.conv2d(latents, kernel, projection[-1])


def save_projection(projection: Tensor, path: Path) -> None:
    """Write a projection as a safetensors file."""
    save_file({"projection": projection.contiguous()}, path)


def load_projection(path: str | Path) -> Tensor:
    """Read a projection.

    Raises:
        LeansdError: it is missing or none.
    """
    try:
        return load_file(Path(path))["projection"].clone()
    except (OSError, SafetensorError, KeyError) as error:
        raise LeansdError(f"cannot read a projection to RGB from {path}: {error}") from error
