"""The inside of ComfyUI's UNet: its units by their addresses, and where nothing may inherit there.

The names of its classes and lists are all that is known here; nothing is imported from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from leansd.plans.anatomy import HEAD, STEM, Anatomy, Unit

KINDS = {
    "ResBlock": ("res", "resnet"),
    "SpatialTransformer": ("attn", "transformer"),
    "Downsample": ("down", "downsampler"),
    "Upsample": ("up", "upsampler"),
}
"""By a layer's class: the end of its address, and its kind. Others are of video or older models."""
PARTS = ("input_blocks", "middle_block", "output_blocks", "out")
BEFORE = ("input_block_patch", "input_block_patch_after_skip")
"""Patches that may give the blocks below another size at some steps."""
COMPILED = "torch_compile_kwargs"
"""Among a model's options, where ComfyUI has it compiled."""


@dataclass(frozen=True)
class Blocks:
    """The units of a UNet."""

    anatomy: Anatomy
    modules: Mapping[str, nn.Module]
    """By address; the head, which is the whole step, left out."""


def read_blocks(model: Any) -> Blocks | None:
    """The units of a model of ComfyUI; None where it is no UNet of the known kinds of layers."""
    if not all(isinstance(getattr(model, part, None), nn.Module) for part in PARTS):
        return None
    try:
        pairs = list(_walk(model))
    except _UnknownLayer:
        return None
    modules = {unit.at: module for unit, module in pairs if unit.at != HEAD}
    return Blocks(Anatomy(tuple(unit for unit, _ in pairs)), modules)


def explain_unsound(guider: Any) -> str:
    """Why nothing may inherit inside the model of a run, in words; empty where it may."""
    patcher = guider.model_patcher
    if getattr(patcher, "injections", {}):
        return "another pack puts layers of its own into the model, so only whole steps can inherit"
    if is_compiled(guider):
        return "the model is compiled, so only whole steps can inherit"
    if any(name in BEFORE for name in list_patches(guider)):
        return "a patch between the model's blocks may resize them, so only whole steps can inherit"
    return ""


def is_compiled(guider: Any) -> bool:
    """Whether the model of a run is compiled, by ComfyUI's own node or in another pack's way."""
    inner = guider.model_patcher.get_model_object("diffusion_model")
    options = getattr(guider, "model_options", {})
    return options.get(COMPILED) is not None or isinstance(inner, OptimizedModule)


def list_patches(guider: Any) -> list[str]:
    """The places in the model that patches lie at."""
    told = guider.model_options.get("transformer_options", {}).get("patches", {})
    return [name for name, patches in told.items() if patches]


class _UnknownLayer(Exception):
    pass


def _walk(model: Any) -> Iterator[tuple[Unit, nn.Module]]:
    """Follow the hidden state through the UNet, pushing and popping skips as its forward does."""
    first, *down = model.input_blocks
    if len(first) != 1:
        raise _UnknownLayer
    stem = first[0]
    yield _make_unit(stem, STEM, "input_blocks.0.0", (), 1), stem
    last, scale, skips = STEM, 1, [STEM]
    for number, ends, block, level, layer in _number(down, "down"):
        scale *= 2 if ends == ["down"] else 1
        for place, (end, module) in enumerate(zip(ends, block, strict=True)):
            at = f"dn{level}.down" if end == "down" else f"dn{level}.l{layer}.{end}"
            path = f"input_blocks.{number + 1}.{place}"
            yield _make_unit(module, at, path, (last,), scale), module
            last = at
        skips.append(last)
    layer = -1
    for place, module in enumerate(model.middle_block):
        end, _ = _name(module)
        layer += end == "res"
        at = f"mid.l{layer}.{end}"
        yield _make_unit(module, at, f"middle_block.{place}", (last,), scale), module
        last = at
    for number, ends, block, level, layer in _number(model.output_blocks, "up"):
        if not skips:
            raise _UnknownLayer
        for place, (end, module) in enumerate(zip(ends, block, strict=True)):
            at = f"up{level}.up" if end == "up" else f"up{level}.l{layer}.{end}"
            reads = (last,) if place else (last, skips.pop())
            scale //= 2 if end == "up" else 1
            yield _make_unit(module, at, f"output_blocks.{number}.{place}", reads, scale), module
            last = at
    if skips:
        raise _UnknownLayer
    head = model.out[-1]
    yield _make_unit(head, HEAD, f"out.{len(model.out) - 1}", (last,), scale), head


def _number(blocks: Any, change: str) -> Iterator[tuple[int, list[str], Any, int, int]]:
    """Each block with its layers' names, its level and its layer; `change` ends a level."""
    level = layer = 0
    for number, block in enumerate(blocks):
        ends = [_name(module)[0] for module in block]
        if ends[:1] != ["res"] and ends != ["down"]:
            raise _UnknownLayer
        yield number, ends, block, level, layer
        layer += 1
        if ends[-1] == change:
            level, layer = level + 1, 0


def _name(module: nn.Module) -> tuple[str, str]:
    found = KINDS.get(type(module).__name__)
    if found is None or getattr(module, "updown", False):
        raise _UnknownLayer
    return found


def _make_unit(module: Any, at: str, path: str, reads: tuple[str, ...], scale: int) -> Unit:
    if isinstance(module, nn.Conv2d):
        kind, given, made = "conv", module.in_channels, module.out_channels
    else:
        _, kind = _name(module)
        given = getattr(module, "channels", None) or module.in_channels
        made = getattr(module, "out_channels", None) or given
    params = sum(each.numel() for each in module.parameters())
    return Unit(at, kind, path, (given, made), scale, params, reads)
