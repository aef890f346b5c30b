"""Reading a diffusers UNet into an anatomy. Only here and in surgery are its attributes named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import sha256
from itertools import zip_longest
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.unets import unet_2d_blocks
from torch import nn

from leansd.errors import LeansdError
from leansd.plans.anatomy import HEAD, STEM, Anatomy, Unit

UNREADABLE = (
    unet_2d_blocks.KDownBlock2D,
    unet_2d_blocks.KCrossAttnDownBlock2D,
    unet_2d_blocks.KUpBlock2D,
    unet_2d_blocks.KCrossAttnUpBlock2D,
    unet_2d_blocks.SkipDownBlock2D,
    unet_2d_blocks.AttnSkipDownBlock2D,
    unet_2d_blocks.SkipUpBlock2D,
    unet_2d_blocks.AttnSkipUpBlock2D,
)
"""Blocks that hand over their outputs otherwise than Stable Diffusion's do."""

WORN_BY = {
    "UNetMotionModel": "AnimateDiff",
    "UNetSpatioTemporalConditionModel": "Stable Video Diffusion",
    "UNet3DConditionModel": "text-to-video",
    "I2VGenXLUNet": "I2VGen-XL",
    "Kandinsky3UNet": "Kandinsky 3",
    "StableCascadeUNet": "Stable Cascade",
    "UVit2DModel": "aMUSEd",
    "UNet2DModel": "unconditional generation",
}
"""UNets of diffusers that cannot be read, and whose they are."""


Layer = tuple[nn.Module, nn.Module | None]
"""A ResNet and, where there is one, its attention."""


class SkippedAttention(nn.Module):
    """Stands where a block's forward calls an attention that was dropped: no unit, no weight."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        return_dict: bool = True,
        **unused: Any,
    ) -> tuple[torch.Tensor] | Transformer2DModelOutput:
        """`hidden_states` [B, C, H, W] as they are, in the form that `Transformer2DModel` has."""
        if return_dict:
            return Transformer2DModelOutput(sample=hidden_states)
        return (hidden_states,)


def unwrap_module(module: Any) -> tuple[Any, nn.Module | None]:
    """What lies in the wrappers of `torch.compile` and of `DistributedDataParallel`.

    Returns:
        the module inside, and the wrapper that `torch.compile` made or None.
    """
    compiled = None
    while True:
        # By name: importing the class takes a second of torch's compiler.
        if type(module).__name__ == "OptimizedModule":
            compiled, module = module, module._orig_mod
        elif isinstance(module, nn.parallel.DistributedDataParallel):
            module = module.module
        else:
            return module, compiled


def find_unet(model: Any) -> UNet2DConditionModel:
    """The `UNet2DConditionModel` in `model`: itself, or what `torch.compile` or DDP wrapped.

    Raises:
        LeansdError: there is none, or its weights are sharded.
    """
    name, (found, _) = type(model).__name__, unwrap_module(model)
    if isinstance(found, nn.DataParallel):
        found, _ = unwrap_module(found.module)
    if type(found).__name__ in ("FullyShardedDataParallel", "DeepSpeedEngine"):
        raise LeansdError(f"{name} keeps the weights in shards; give the UNet before it is sharded")
    if isinstance(found, UNet2DConditionModel):
        return found
    if isinstance(found, DiffusionPipeline):
        inside = " (its UNet is `pipe.unet`)" if hasattr(found, "unet") else ", without a UNet"
        raise LeansdError(f"{name} is no UNet2DConditionModel but a pipeline{inside}")
    known = WORN_BY.get(name)
    whose = f" ({known})" if known else ""
    raise LeansdError(
        f"{name}{whose} is no UNet2DConditionModel; only those can be dissected: "
        "Stable Diffusion 1.x and 2.x, SDXL and what shares their UNet"
    )


def read_anatomy(unet: UNet2DConditionModel, *, name: str = "UNet") -> Anatomy:
    """The units of `unet` in running order, without their cost.

    Raises:
        LeansdError: it is no `UNet2DConditionModel`, or a block is built in a way not known here.
    """
    unet = find_unet(unet)
    units = _walk(unet)
    parts = tuple(part for row in units for part in _list_parts(unet, row))
    params = sum(parameter.numel() for parameter in unet.parameters())
    return Anatomy(units, parts, name=name, params=params)


class _Walk:
    """The units of a UNet, as the hidden state comes through them."""

    def __init__(self) -> None:
        self.units: list[Unit] = []
        self.scale = 1

    def add(self, module: Any, at: str, path: str, *skips: str) -> str:
        """A unit that takes what the last one gave, and skips; gives its address."""
        last = self.units[-1] if self.units else None
        reads = () if last is None else (last.at, *skips)
        self.units.append(_make_unit(module, at, path, self.scale, reads, last))
        return at

    def add_layer(self, layer: Layer, at: str, path: str, number: int, *skips: str) -> str:
        """A ResNet and, where there is one, its attention; gives the address of the last unit."""
        resnet, attention = layer
        end = self.add(resnet, f"{at}.res", f"{path}.resnets.{number}", *skips)
        if attention is not None:
            end = self.add(attention, f"{at}.attn", f"{path}.attentions.{number}")
        return end


def _walk(unet: Any) -> tuple[Unit, ...]:
    """Follow the hidden state through the UNet, pushing and popping skips as its forward does."""
    walk = _Walk()
    skips = [walk.add(unet.conv_in, STEM, "conv_in")]
    for index, block in enumerate(unet.down_blocks):
        at, path = f"dn{index}", f"down_blocks.{index}"
        for number, layer in enumerate(_list_layers(block, path)):
            skips.append(walk.add_layer(layer, f"{at}.l{number}", path, number))
        if block.downsamplers:
            walk.scale *= 2
            skips.append(walk.add(block.downsamplers[0], f"{at}.down", f"{path}.downsamplers.0"))
    if unet.mid_block is not None:
        # A ResNet, then pairs of attention and ResNet; the attention belongs to the layer before.
        layers = zip_longest(unet.mid_block.resnets, _list_attentions(unet.mid_block))
        for number, layer in enumerate(layers):
            walk.add_layer(layer, f"mid.l{number}", "mid_block", number)
    for index, block in enumerate(unet.up_blocks):
        at, path = f"up{index}", f"up_blocks.{index}"
        for number, layer in enumerate(_list_layers(block, path)):
            if not skips:
                raise LeansdError(
                    f"{at}.l{number} has no skip left to read: the blocks are unbalanced"
                )
            walk.add_layer(layer, f"{at}.l{number}", path, number, skips.pop())
        if block.upsamplers:
            walk.scale //= 2
            walk.add(block.upsamplers[0], f"{at}.up", f"{path}.upsamplers.0")
    if skips:
        raise LeansdError(
            f"the output of {skips[-1]} is read by no up block: the blocks are unbalanced"
        )
    walk.add(unet.conv_out, HEAD, "conv_out")
    return tuple(walk.units)


def _list_layers(block: nn.Module, path: str) -> list[Layer]:
    """The layers of a block: a ResNet each and, where there is one, its attention."""
    resnets = list(getattr(block, "resnets", ()))
    attentions = _list_attentions(block)
    fits = resnets and len(attentions) in (0, len(resnets))
    if isinstance(block, UNREADABLE) or not fits:
        raise LeansdError(f"{path} is a {type(block).__name__}, which is not known here")
    return list(zip_longest(resnets, attentions))


def _list_attentions(block: Any) -> list[nn.Module | None]:
    """A block's attentions, None for one that was dropped."""
    attentions = getattr(block, "attentions", ())
    return [None if isinstance(each, SkippedAttention) else each for each in attentions]


PARTS = {"attn1": "sa", "attn2": "ca", "ff": "ff"}


def _list_parts(unet: UNet2DConditionModel, unit: Unit) -> Iterator[Unit]:
    """The attentions and feed-forwards of a transformer's blocks."""
    transformer: Any = unet.get_submodule(unit.path)
    for number, block in enumerate(getattr(transformer, "transformer_blocks", ())):
        for attribute, name in PARTS.items():
            module = getattr(block, attribute, None)
            if module is not None:
                at = f"{unit.at}.t{number}.{name}"
                path = f"{unit.path}.transformer_blocks.{number}.{attribute}"
                yield _make_unit(module, at, path, unit.scale, (unit.at,), unit)


KINDS = {
    "res": "resnet",
    "attn": "transformer",
    "down": "downsampler",
    "up": "upsampler",
    STEM: "conv",
    HEAD: "conv",
    "sa": "self-attention",
    "ca": "cross-attention",
    "ff": "feed-forward",
}


def _make_unit(
    module: Any,
    at: str,
    path: str,
    scale: int,
    reads: tuple[str, ...],
    before: Unit | None,
) -> Unit:
    """A row for `module`; attentions and samplers that state no channels have those before."""
    kind = KINDS[at.rsplit(".", 1)[-1]]
    inner: Any = getattr(module, "base_layer", module)  # of a convolution that has a LoRA
    if isinstance(inner, nn.Conv2d):
        channels = (inner.in_channels, inner.out_channels)
    elif isinstance(getattr(module, "in_channels", None), int):
        channels = (module.in_channels, module.out_channels or module.in_channels)
    elif before is not None and kind not in ("resnet", "conv"):
        channels = (before.channels[1], before.channels[1])
    else:
        raise LeansdError(f"{path} is a {type(module).__name__}, whose channels are not known here")
    params = sum(parameter.numel() for parameter in module.parameters())
    return Unit(at, kind, path, channels, scale, params, reads)


# -- fingerprints of weights -----------------------------------------------------------------------

SAMPLED = 64
"""Values of every weight that a fingerprint looks at."""


def fingerprint_module(
    module: torch.nn.Module, originals: Mapping[str, torch.Tensor] = MappingProxyType({})
) -> str:
    """Sixteen hex digits of a network: its class, the shapes and a sample of all its weights.

    The same in single and in half precision.

    Args:
        originals: weights that stand for those of the module, by their names.
    """
    digest = sha256(type(module).__name__.encode())
    for key, present in module.state_dict().items():
        value = originals.get(key, present)
        digest.update(f"{key} {list(value.shape)}".encode())
        digest.update(encode_tensor(sample_weight(value).half()))
    return digest.hexdigest()[:16]


def sample_weight(value: torch.Tensor) -> torch.Tensor:
    """Some values of a weight, evenly spread; training changes them all."""
    if value.is_meta or not value.numel():
        return torch.empty(0, dtype=value.dtype)
    flat = value.reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLED)]


def encode_tensor(value: torch.Tensor) -> bytes:
    """The values of a tensor as bytes."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
