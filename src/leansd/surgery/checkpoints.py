"""UNets on disk: whole in a folder, or as a delta checkpoint beside another; weights held once.

An assembled student has its teacher's deep part. On disk a delta checkpoint holds only what the
other net lacks; in memory `share_weights` lets both hold the common tensors once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from leansd.anatomy.reading import read_anatomy
from leansd.errors import LeansdError
from leansd.plans.anatomy import Anatomy
from leansd.surgery.light_unet import LightUNet2DConditionModel

CONFIG, OWN = "config.json", "own.safetensors"
CLASSES: dict[str, type[UNet2DConditionModel]] = {
    each.__name__: each for each in (UNet2DConditionModel, LightUNet2DConditionModel)
}
Shape = tuple[int, ...]


def build_outline(config: dict[str, Any], what: str) -> UNet2DConditionModel:
    """A saved UNet on the meta device.

    Raises:
        LeansdError: its class is none that is known here.
    """
    name = config.get("_class_name", "no class")
    if name not in CLASSES:
        raise LeansdError(
            f"{what} is a {name}, not a UNet2DConditionModel: "
            "Stable Diffusion 1.x, 2.x and SDXL have one"
        )
    with torch.device("meta"):
        outline: Any = CLASSES[name].from_config(config)
    return outline


def open_unet(folder: Path, dtype: torch.dtype) -> UNet2DConditionModel:
    """A UNet from its folder.

    Raises:
        LeansdError: it is no UNet's, or config and weights disagree.
        OSError, ValueError, SafetensorError: a file is missing or damaged.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise LeansdError(
            f"no UNet in {folder}: give a folder with config.json and safetensors weights"
        )
    config = json.loads(file.read_text(encoding="utf-8"))
    outline = build_outline(config, f"what is in {folder}")
    found = find_variant(folder, what=f"the UNet in {folder}")
    variant = None if None in found else found[0]
    check_shapes(folder, read_shapes(folder, variant), outline)
    unet = type(outline).from_pretrained(
        folder, use_safetensors=True, local_files_only=True, torch_dtype=dtype, variant=variant
    )
    for parameter in unet.parameters():
        # Mapped from the file they lie unaligned, and kernels then round otherwise.
        parameter.data = parameter.data.clone()
    return unet.eval()


POINTER = "is a pointer of Git LFS, not weights: run `git lfs pull` where it was cloned"
_PICKLED = (".bin", ".ckpt", ".pt", ".pth")
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_SHARD = re.compile(r"-\d+-of-\d+")


def find_variant(folder: Path, *, what: str) -> tuple[str | None, ...]:
    """The variants that a network's weights are there in: None for plain names, `fp16`.

    Args:
        what: the network, for the message.

    Raises:
        LeansdError: there are no safetensors weights, or one of them is a pointer of Git LFS.
    """
    found: dict[str | None, None] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stem, _, variant = _SHARD.sub("", file.name.removesuffix(".safetensors")).partition(".")
        if stem in _STEMS:
            if is_pointer(file):
                raise LeansdError(f"{file} {POINTER}")
            found[variant or None] = None
    if found:
        return tuple(found)
    pickled = sorted(each.name for each in folder.iterdir() if each.suffix in _PICKLED)
    if not pickled:
        raise LeansdError(f"no weights of {what}: there is no .safetensors file in {folder}")
    raise LeansdError(
        f"the weights of {what} are only there as {pickled[0]}, which may run code when it is "
        "opened: if you trust it, convert it with diffusers, "
        "`DiffusionPipeline.from_pretrained(folder).save_pretrained(new_folder)`"
    )


def is_pointer(file: Path) -> bool:
    """Whether Git LFS left a pointer in the place of a file."""
    with file.open("rb") as opened:
        return opened.read(24).startswith(b"version https://git-lfs")


def read_shapes(folder: Path, variant: str | None = None) -> dict[str, Shape]:
    """The shapes of all tensors in a UNet's safetensors files, from their headers."""
    shapes: dict[str, Shape] = {}
    for file in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
        name = _SHARD.sub("", file.name.removesuffix(".safetensors"))
        if (name.partition(".")[2] or None) != variant:
            continue
        with safe_open(file, framework="pt") as weights:
            shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
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


def save_delta(unet: UNet2DConditionModel, other: UNet2DConditionModel, folder: Path) -> Path:
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


def open_delta(folder: Path, other: UNet2DConditionModel) -> UNet2DConditionModel:
    """A UNet from what `save_delta` wrote and the one that it was written beside.

    It is in the other's precision, on its device, and shares no memory with it.

    Raises:
        LeansdError: it was written beside another UNet.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    unet = build_outline(config, f"what is in {folder}")
    there, own = other.state_dict(), load_file(folder / OWN)
    device, dtype = other.device, other.dtype  # diffusers looks through all modules for each
    tensors: dict[str, torch.Tensor] = {}
    for name, outline in unet.state_dict().items():
        found = own.get(name, there.get(name))
        if found is None or found.shape != outline.shape:
            raise LeansdError(
                f"{folder} holds a UNet without {name}, and the one beside it has none that fits: "
                "open it beside the UNet that it was saved beside"
            )
        tensors[name] = found.detach().to(device, dtype, copy=True)
    unet.load_state_dict(tensors, assign=True)
    return unet.eval()


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.to(other.device, other.dtype), other)


@torch.no_grad()
def share_weights(unet: UNet2DConditionModel, other: UNet2DConditionModel) -> int:
    """Let a UNet hold another's tensors wherever they are the same, bit for bit.

    Afterwards it is on the other's device, in its precision. What is shared must not be trained;
    moving one of the two to another device gives it tensors of its own again.

    Returns:
        the bytes that are held once now.
    """
    # That of `nn.Module`: diffusers' own warns where it has nothing to warn of.
    nn.Module.to(unet, dtype=other.dtype)
    device = other.device
    there: dict[object, list[nn.Parameter]] = {}
    for parameter in other.parameters():
        there.setdefault(_sign(parameter), []).append(parameter)
    shared = 0
    for parameter in unet.parameters():
        alike = there.get(_sign(parameter), [])
        same = (each for each in alike if torch.equal(each.to(parameter.device), parameter))
        twin = next(same, None)
        if twin is None:
            parameter.data = parameter.data.to(device)
        else:
            parameter.data = twin.data
            shared += parameter.nbytes
    nn.Module.to(unet, device=device)  # buffers
    return shared


def _sign(tensor: Tensor) -> object:
    """What tensors that are equal have in common, and others hardly ever."""
    return tuple(tensor.shape), tuple(tensor.detach().flatten()[:4].tolist())
