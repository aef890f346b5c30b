"""UNets on disk without what another one has: an assembled net is kept as its own tensors only."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from leansd.errors import LeansdError
from leansd.surgery.folders import find_class

CONFIG, OWN = "config.json", "own.safetensors"


def save_thin(unet: UNet2DConditionModel, other: UNet2DConditionModel, folder: Path) -> Path:
    """Write a UNet's config, and of its tensors those that another has not under the same name."""
    there = other.state_dict()
    own = {
        name: tensor.contiguous()
        for name, tensor in unet.state_dict().items()
        if name not in there or not _is_same(tensor, there[name])
    }
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(unet.to_json_string())
    config.pop("_name_or_path", None)  # where it lay is nobody's affair
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(own, folder / OWN, metadata={"format": "pt"})
    return folder


def open_thin(folder: Path, other: UNet2DConditionModel) -> UNet2DConditionModel:
    """A UNet from what `save_thin` wrote and the one that it was written beside.

    It is in the other's precision, on its device, and shares no memory with it.

    Raises:
        LeansdError: it was written beside another UNet.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    with torch.device("meta"):
        unet = find_class(config, f"what is in {folder}").from_config(config)
    there, own = other.state_dict(), load_file(folder / OWN)
    tensors: dict[str, torch.Tensor] = {}
    for name, outline in unet.state_dict().items():
        found = own.get(name, there.get(name))
        if found is None or found.shape != outline.shape:
            raise LeansdError(
                f"{folder} holds a UNet without {name}, and the one beside it has none that fits: "
                "open it beside the UNet that it was saved beside"
            )
        tensors[name] = found.detach().to(other.device, other.dtype, copy=True)
    unet.load_state_dict(tensors, assign=True)
    return unet.eval()


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.to(other.device, other.dtype), other)
