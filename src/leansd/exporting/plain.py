"""A net as a plain `UNet2DConditionModel`, which stock diffusers opens."""

from __future__ import annotations

from pathlib import Path

from diffusers import UNet2DConditionModel

from leansd.errors import LeansdError
from leansd.exporting.folder import replace_folder


def to_plain(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The net itself where stock diffusers can hold it, or a net that gives the same.

    Raises:
        LeansdError: stock diffusers cannot hold it; the message names the address.
    """
    if type(unet) is UNet2DConditionModel:
        return unet
    raise LeansdError(f"stock diffusers cannot hold a {type(unet).__name__}")


def write_plain(unet: UNet2DConditionModel, folder: Path) -> None:
    """Write a net as a folder that `UNet2DConditionModel.from_pretrained` opens."""
    plain = to_plain(unet)
    with replace_folder(folder) as draft:
        plain.save_pretrained(draft)
