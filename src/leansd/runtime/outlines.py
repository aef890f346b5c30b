"""Outlines: what the units of a UNet will give, told by the size of its sample."""

from __future__ import annotations

import inspect

import torch
from diffusers import UNet2DConditionModel

from leansd.plans.anatomy import Anatomy
from leansd.runtime.store import Shape


class Outlines:
    """What the units of a UNet give, told by the size of its sample."""

    def __init__(self, unet: UNet2DConditionModel, anatomy: Anatomy) -> None:
        self._rows: dict[str, tuple[int, int, bool]] = {}
        for unit in (*anatomy.units, *anatomy.parts):
            takes = inspect.signature(unet.get_submodule(unit.path).forward).parameters
            self._rows[unit.at] = (
                unit.channels[1],
                unit.scale,
                "return_dict" in takes,
            )
        self._scale = max(unit.scale for unit in anatomy)
        # Padded on all sides, a downsampler halves and rounds up.
        self._rounds_up = unet.config.get("downsample_padding") == 1

    def suit(self, sample: torch.Tensor) -> bool:
        """Whether they are known for this sample [B, C, H, W]."""
        return self._rounds_up or all(side % self._scale == 0 for side in sample.shape[-2:])

    def make_shapes(self, sample: torch.Tensor) -> dict[str, Shape]:
        """The shape of each unit's output; of a part's, only whether it is in a tuple."""
        batch, _, height, width = sample.shape
        return {
            at: Shape(
                (batch, channels, -(-height // scale), -(-width // scale)),
                sample.dtype,
                sample.device,
                in_tuple,
            )
            for at, (channels, scale, in_tuple) in self._rows.items()
        }
