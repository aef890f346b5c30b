"""UNets in folders: opened where their weights are what their config says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open

from leansd.anatomy import read_anatomy
from leansd.errors import LeansdError
from leansd.plans.anatomy import Anatomy
from leansd.surgery.light import LightUNet2DConditionModel

CLASSES: dict[str, type[UNet2DConditionModel]] = {
    each.__name__: each for each in (UNet2DConditionModel, LightUNet2DConditionModel)
}
Shape = tuple[int, ...]


def find_class(config: Mapping[str, Any], what: str) -> type[UNet2DConditionModel]:
    """The class of a saved UNet.

    Raises:
        LeansdError: it is none that is known here.
    """
    name = config.get("_class_name", "no class")
    if name not in CLASSES:
        raise LeansdError(
            f"{what} is a {name}, not a UNet2DConditionModel: "
            "Stable Diffusion 1.x, 2.x and SDXL have one"
        )
    return CLASSES[name]


def open_unet(folder: Path, dtype: torch.dtype) -> UNet2DConditionModel:
    """A UNet from its folder.

    Raises:
        LeansdError: it is no UNet's, or config and weights disagree.
        OSError, ValueError, SafetensorError: a file is missing or damaged.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise LeansdError(
            f"no UNet in {folder}: give a folder with config.json and safetensors weights"
        )
    config = json.loads(file.read_text(encoding="utf-8"))
    kind = find_class(config, f"what is in {folder}")
    with torch.device("meta"):
        outline = kind.from_config(config)
    check_shapes(folder, read_shapes(folder), outline)
    unet = kind.from_pretrained(
        folder, use_safetensors=True, local_files_only=True, torch_dtype=dtype
    )
    for parameter in unet.parameters():
        # Mapped from the file they lie unaligned, and kernels then round otherwise.
        parameter.data = parameter.data.clone()
    return unet.eval()


def read_shapes(folder: Path) -> dict[str, Shape]:
    """The shapes of all tensors in a folder's safetensors files, from their headers."""
    shapes: dict[str, Shape] = {}
    for file in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    if not shapes:
        raise LeansdError(f"no weights in {folder}: there is no .safetensors file")
    return shapes


def check_shapes(folder: Path, shapes: Mapping[str, Shape], outline: UNet2DConditionModel) -> None:
    """Refuse weights that are not those of the network that the config describes."""
    anatomy = read_anatomy(outline)
    wanted = {name: tuple(tensor.shape) for name, tensor in outline.state_dict().items()}
    for name, shape in wanted.items():
        if shapes.get(name) != shape:
            found = f"is {shapes[name]}" if name in shapes else "is missing"
            raise LeansdError(
                f"{find_address(name, anatomy)}: by its config the UNet in {folder} has {name} of "
                f"shape {shape}, which {found} in its weights; {_REMEDY}"
            )
    for name in shapes:
        if name not in wanted:
            raise LeansdError(
                f"{find_address(name, anatomy)}: the weights of the UNet in {folder} have {name}, "
                f"which by its config there is not; {_REMEDY}"
            )


_REMEDY = "put the config.json there that it was saved with, or operate on the whole UNet anew"


def find_address(name: str, anatomy: Anatomy) -> str:
    """The unit that a tensor lies in; its own name, where that is none of the UNet's."""
    for unit in anatomy:
        if name.startswith(unit.path + "."):
            return unit.at
    parts = name.split(".")
    sides = {"down_blocks": "dn", "up_blocks": "up"}
    if parts[0] not in sides or len(parts) < 4:
        return name
    layer = {"resnets": f"l{parts[3]}.res", "attentions": f"l{parts[3]}.attn"}
    unit = layer.get(parts[2], {"downsamplers": "down", "upsamplers": "up"}.get(parts[2], ""))
    return f"{sides[parts[0]]}{parts[1]}.{unit}".rstrip(".")
