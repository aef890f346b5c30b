"""Reading a diffusers UNet into an anatomy. Only here and in surgery are its attributes named."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

from diffusers import UNet2DConditionModel
from torch import nn

from leansd.anatomy.absent import Absent
from leansd.errors import LeansdError
from leansd.plans.anatomy import HEAD, STEM, Anatomy, Unit


def read_anatomy(unet: UNet2DConditionModel, *, name: str = "UNet") -> Anatomy:
    """The units of `unet` in running order, without their cost.

    Raises:
        LeansdError: it is no `UNet2DConditionModel`, or a block is built in a way not known here.
    """
    if not isinstance(unet, UNet2DConditionModel):
        raise LeansdError(
            f"{type(unet).__name__} is no UNet2DConditionModel; only those can be dissected"
        )
    units = tuple(_walk(unet))
    parts = tuple(part for row in units for part in _list_parts(unet, row))
    params = sum(parameter.numel() for parameter in unet.parameters())
    return Anatomy(units, parts, name=name, params=params)


def _walk(unet: UNet2DConditionModel) -> Iterator[Unit]:
    """Follow the hidden state through the UNet, pushing and popping skips as its forward does."""
    scale = 1
    stem = _make_unit(unet.conv_in, STEM, "conv_in", scale, ())
    yield stem
    last, skips = stem, [stem]
    for index, block in enumerate(unet.down_blocks):
        at, path = f"dn{index}", f"down_blocks.{index}"
        for number, layer in enumerate(_list_layers(block, path)):
            for unit in _walk_layer(layer, f"{at}.l{number}", path, number, scale, (last.at,)):
                yield unit
                last = unit
            skips.append(last)
        if block.downsamplers:
            scale *= 2
            last = _make_unit(
                block.downsamplers[0],
                f"{at}.down",
                f"{path}.downsamplers.0",
                scale,
                (last.at,),
                last,
            )
            yield last
            skips.append(last)
    if unet.mid_block is not None:
        for unit in _walk_mid(unet.mid_block, scale, last):
            yield unit
            last = unit
    for index, block in enumerate(unet.up_blocks):
        at, path = f"up{index}", f"up_blocks.{index}"
        for number, layer in enumerate(_list_layers(block, path)):
            if not skips:
                raise LeansdError(
                    f"{at}.l{number} has no skip left to read: the blocks are unbalanced"
                )
            reads = (last.at, skips.pop().at)
            for unit in _walk_layer(layer, f"{at}.l{number}", path, number, scale, reads):
                yield unit
                last = unit
        if block.upsamplers:
            scale //= 2
            last = _make_unit(
                block.upsamplers[0], f"{at}.up", f"{path}.upsamplers.0", scale, (last.at,), last
            )
            yield last
    if skips:
        raise LeansdError(
            f"the output of {skips[-1].at} is read by no up block: the blocks are unbalanced"
        )
    yield _make_unit(unet.conv_out, HEAD, "conv_out", scale, (last.at,))


def _list_layers(block: nn.Module, path: str) -> list[tuple[nn.Module, nn.Module | None]]:
    """The layers of a block: a ResNet each and, where there is one, its attention."""
    resnets = list(getattr(block, "resnets", ()))
    attentions = _list_attentions(block)
    if not resnets or len(attentions) not in (0, len(resnets)):
        raise LeansdError(f"{path} is a {type(block).__name__}, which is not known here")
    return list(zip_longest(resnets, attentions))


def _list_attentions(block: nn.Module) -> list[nn.Module | None]:
    """A block's attentions, None for one that was dropped."""
    attentions = getattr(block, "attentions", ())
    return [None if isinstance(each, Absent) else each for each in attentions]


def _walk_layer(
    layer: tuple[nn.Module, nn.Module | None],
    at: str,
    path: str,
    number: int,
    scale: int,
    reads: tuple[str, ...],
) -> Iterator[Unit]:
    resnet, attention = layer
    unit = _make_unit(resnet, f"{at}.res", f"{path}.resnets.{number}", scale, reads)
    yield unit
    if attention is not None:
        path = f"{path}.attentions.{number}"
        yield _make_unit(attention, f"{at}.attn", path, scale, (unit.at,), unit)


def _walk_mid(block: nn.Module, scale: int, last: Unit) -> Iterator[Unit]:
    """A ResNet, then pairs of attention and ResNet; the attention belongs to the layer before."""
    attentions = _list_attentions(block)
    for number, resnet in enumerate(block.resnets):
        last = _make_unit(
            resnet, f"mid.l{number}.res", f"mid_block.resnets.{number}", scale, (last.at,)
        )
        yield last
        attention = attentions[number] if number < len(attentions) else None
        if attention is not None:
            path = f"mid_block.attentions.{number}"
            last = _make_unit(attention, f"mid.l{number}.attn", path, scale, (last.at,), last)
            yield last


PARTS = {"attn1": "sa", "attn2": "ca", "ff": "ff"}


def _list_parts(unet: UNet2DConditionModel, unit: Unit) -> Iterator[Unit]:
    """The attentions and feed-forwards of a transformer's blocks."""
    transformer = unet.get_submodule(unit.path)
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
    module: nn.Module,
    at: str,
    path: str,
    scale: int,
    reads: tuple[str, ...],
    before: Unit | None = None,
) -> Unit:
    """A row for `module`; one that states no channels has those of the unit before it."""
    inner = getattr(module, "base_layer", module)  # of a convolution that has a LoRA
    if isinstance(inner, nn.Conv2d):
        channels = (inner.in_channels, inner.out_channels)
    elif isinstance(getattr(module, "in_channels", None), int):
        channels = (module.in_channels, module.out_channels or module.in_channels)
    elif before is not None:
        channels = (before.channels[1], before.channels[1])
    else:
        raise LeansdError(f"{path} is a {type(module).__name__}, whose channels are not known here")
    params = sum(parameter.numel() for parameter in module.parameters())
    return Unit(at, KINDS[at.rsplit(".", 1)[-1]], path, channels, scale, params, reads)
