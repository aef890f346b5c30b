"""A net as a plain `UNet2DConditionModel`, which stock diffusers opens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from leansd.errors import LeansdError
from leansd.files import writing
from leansd.surgery.edits import read_name
from leansd.surgery.fold import fold
from leansd.surgery.light_unet import LightUNet2DConditionModel

MERGED, FORGOTTEN = "condconv", "gri"
"""Replacements that a plain net can do without: kernels that can be merged, and an attention
processor, which has no weights."""
TIMESTEPS = 1000
"""Of the noise schedule that UNets are trained on, all of which merged kernels have to serve."""


def to_plain(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The net itself where stock diffusers can hold it, or the plain one that is nearest to it.

    Conditional kernels are merged at the mean of their routings over all time steps; attention
    that was replaced by GRI runs in full. The result shares its weights with `unet`.

    Raises:
        LeansdError: stock diffusers cannot hold it; the message names the address.
    """
    if not isinstance(unet, LightUNet2DConditionModel):
        return unet
    structure: Any = unet.config.get("structure") or {}
    for at in structure.get("drop", ()):
        raise LeansdError(
            f"stock diffusers cannot hold a UNet without {at} only: no config of its says so; "
            "export to onnx, or open it with leansd.load_unet"
        )
    replaced: list[Mapping[str, Any]] = list(structure.get("replace", ()))
    for each in replaced:
        if each["by"] not in (MERGED, FORGOTTEN):
            raise LeansdError(
                f"stock diffusers cannot hold {read_name(each['by'])} at {each['at']}; export to "
                "onnx, or open it with leansd.load_unet"
            )
        if each["by"] == MERGED and each["options"].get("routing") == "image":
            raise LeansdError(
                f"stock diffusers cannot hold kernels routed by the image at {each['at']}: they "
                "cannot be merged beforehand; export to onnx, or open it with leansd.load_unet"
            )
    if any(each["by"] == MERGED for each in replaced):
        unet = fold(unet, range(TIMESTEPS))
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    config.pop("structure", None)
    with torch.device("meta"):
        plain = UNet2DConditionModel(**config)
    plain.load_state_dict(unet.state_dict(), assign=True)
    return plain.train(unet.training)


def describe_losses(unet: UNet2DConditionModel) -> tuple[str, ...]:
    """What the plain form of a net does otherwise, a sentence each."""
    replaced = (unet.config.get("structure") or {}).get("replace", ())
    places = {
        by: [each["at"] for each in replaced if each["by"] == by] for by in (MERGED, FORGOTTEN)
    }
    losses = {
        MERGED: "the kernels are merged at their mean routing over all time steps "
        "(leansd.surgery.fold.fold_segments makes one net for each stretch of them)",
        FORGOTTEN: "stock diffusers runs full attention, for which the net was not distilled",
    }
    return tuple(f"{' '.join(places[by])}: {text}" for by, text in losses.items() if places[by])


def write_plain(
    unet: UNet2DConditionModel,
    folder: Path,
    describe: Callable[[Path, UNet2DConditionModel], object] = lambda folder, plain: None,
) -> None:
    """Write a net as a folder that `UNet2DConditionModel.from_pretrained` opens.

    Args:
        describe: writes what else belongs into the folder, given the plain net.

    Raises:
        LeansdError: see `to_plain`.
    """
    plain = to_plain(unet)
    _require_described(plain)
    with writing(folder) as draft:
        draft.mkdir()
        plain.save_pretrained(draft)
        describe(draft, plain)


def _require_described(plain: UNet2DConditionModel) -> None:
    """Refuse a net whose files would not open: one that is quantised, or has a LoRA loaded."""
    config = {name: value for name, value in plain.config.items() if not name.startswith("_")}
    try:
        with torch.device("meta"):
            outline = UNet2DConditionModel(**config)
    except ValueError as error:  # an IP-Adapter leaves a config that no UNet can be built by
        raise LeansdError(
            f"stock diffusers builds no UNet of this config: {error}; unload the net's adapters"
        ) from error
    own = plain.state_dict()
    for name, tensor in outline.state_dict().items():
        if getattr(own.get(name), "shape", None) != tensor.shape:
            has = "has no such tensor" if name not in own else "has it in another form"
            raise LeansdError(
                f"stock diffusers wants {name} of shape {list(tensor.shape)}, and the net {has}: "
                "give the net before it was quantised, and unload its LoRAs"
            )
