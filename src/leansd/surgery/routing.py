"""Routers: how far each expert of a conditional convolution is mixed in.

A router gives a routing [R, K], one row for the whole batch or one for each sample, between -1 and
1 for each of K experts. It starts at zero everywhere, where a conditional convolution is its own
plain one; its last layer learns from the first step, for what that layer reads is not zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn import functional as F

from leansd.errors import LeansdError

WIDTH = 64
"""Hidden units of a router by time."""


class TimeRouter(nn.Module):
    """A routing from the time embedding alone: as many rows as that has."""

    def __init__(self, channels: int, experts: int, width: int = WIDTH) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, width)
        self.output = _make_zero(nn.Linear(width, experts))

    def forward(self, features: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """The routing [R, K] for `temb` [R, C]; `features` are not read."""
        return torch.tanh(self.output(F.silu(self.hidden(F.silu(temb)))))


class ImageRouter(nn.Module):
    """A routing from the features, averaged over the picture, as in CondConv (arXiv 1904.04971)."""

    def __init__(self, channels: int, experts: int) -> None:
        super().__init__()
        self.output = _make_zero(nn.Linear(channels, experts))

    def forward(self, features: torch.Tensor, temb: torch.Tensor | None) -> torch.Tensor:
        """The routing [B, K] for `features` [B, C, H, W]; `temb` is not read."""
        return torch.tanh(self.output(features.mean((2, 3))))


def _make_zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _route_by_time(resnet: ResnetBlock2D, experts: int) -> TimeRouter:
    return TimeRouter(resnet.time_emb_proj.in_features, experts)


def _route_by_image(resnet: ResnetBlock2D, experts: int) -> ImageRouter:
    return ImageRouter(resnet.in_channels, experts)


ROUTERS: Mapping[str, Callable[[ResnetBlock2D, int], nn.Module]] = {
    "time": _route_by_time,
    "image": _route_by_image,
}
"""What a routing can follow from, by name."""


def build_router(routing: str, resnet: ResnetBlock2D, experts: int) -> nn.Module:
    """A router of `experts` experts for `resnet`, on its device and in its dtype.

    Raises:
        LeansdError: there is no such routing, or `resnet` has no time embedding to route by.
    """
    if routing not in ROUTERS:
        raise LeansdError(f"no routing {routing!r} (there are {', '.join(ROUTERS)})")
    if routing == "time" and resnet.time_emb_proj is None:
        raise LeansdError("a ResNet without a time embedding cannot be routed by time")
    return ROUTERS[routing](resnet, experts).to(resnet.conv1.weight)
