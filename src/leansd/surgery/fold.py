"""Folding: a conditional UNet as plain ones, each right for a stretch of time steps.

Where the routing follows from the time step alone, the kernels of a stretch of steps can be merged
beforehand, at its mean routing. What comes out runs anywhere, without this package.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from leansd.errors import LeansdError
from leansd.surgery.light_unet import build_outline, read_config
from leansd.surgery.parts.condconv import CondConvResnet, TimeRouter, merge_kernels

REPLACED_BY = "condconv"


@torch.no_grad()
def fold(
    unet: UNet2DConditionModel, timesteps: Sequence[float] | torch.Tensor
) -> UNet2DConditionModel:
    """`unet` with the kernels of its conditional convolutions merged at one routing.

    That is the mean of their routings at `timesteps`; for one time step the fold is exact. The
    result is a plain `UNet2DConditionModel` unless something else was replaced or taken out that
    diffusers has no config for. It shares with `unet` every weight that is not merged: copy it
    before training it.

    Raises:
        LeansdError: a routing, or the time embedding, follows from more than the time step; or no
            time step is given.
    """
    times = torch.as_tensor(timesteps).flatten()
    if not len(times):
        raise LeansdError("no time steps to fold for: give those of a scheduler")
    state = unet.state_dict()
    for name, resnet in _list_conditionals(unet):
        _fold_resnet(state, name, resnet, embed_times(unet, times))
    plain = _build_plain(unet)
    plain.load_state_dict(state, assign=True)
    plain.set_attn_processor(dict(unet.attn_processors))
    return plain.train(unet.training)


def fold_segments(
    unet: UNet2DConditionModel, timesteps: Sequence[float] | torch.Tensor, count: int
) -> list[UNet2DConditionModel]:
    """`unet` folded for each of `count` stretches of a scheduler's time steps, in their order.

    The stretches are as long as each other, to a step. What is not merged is shared by all.

    Raises:
        LeansdError: there are fewer time steps than stretches, or as `fold`.
    """
    times = torch.as_tensor(timesteps).flatten()
    if not 0 < count <= len(times):
        raise LeansdError(f"{len(times)} time steps cannot be {count} stretches")
    return [fold(unet, segment) for segment in times.tensor_split(count)]


def embed_times(unet: UNet2DConditionModel, timesteps: torch.Tensor) -> torch.Tensor:
    """The time embedding [T, C] that the ResNets of `unet` read at `timesteps` [T].

    Raises:
        LeansdError: it holds more than the time: the pooled text of SDXL, or a class.
    """
    config = unet.config
    for entry in ("addition_embed_type", "class_embed_type", "num_class_embeds"):
        if config.get(entry) is not None:
            raise LeansdError(
                f"the time embedding of this UNet follows from more than time ({entry} "
                f"{config[entry]}), so that its kernels cannot be merged beforehand"
            )
    sample = torch.empty(len(timesteps), 1, device=unet.device, dtype=unet.dtype)
    temb = unet.time_embedding(unet.get_time_embed(sample, timesteps.to(unet.device)))
    return temb if unet.time_embed_act is None else unet.time_embed_act(temb)


def _list_conditionals(unet: UNet2DConditionModel) -> Iterator[tuple[str, CondConvResnet]]:
    for name, module in unet.named_modules():
        if isinstance(module, CondConvResnet):
            if not isinstance(module.router, TimeRouter):
                raise LeansdError(
                    f"{name} is routed by the image, so that its kernels cannot be merged "
                    "beforehand; only those routed by time can"
                )
            yield name, module


def _fold_resnet(
    state: dict[str, Any], name: str, resnet: CondConvResnet, temb: torch.Tensor
) -> None:
    """Put merged kernels into `state` and take experts and router out."""
    routing = resnet.router(None, temb).mean(0, keepdim=True)
    for conv in ("conv1", "conv2"):
        own, experts = f"{name}.{conv}.weight", state.pop(f"{name}.{conv}.experts")
        (state[own],) = merge_kernels(state[own], experts, routing)
    for tensor in resnet.router.state_dict():
        del state[f"{name}.router.{tensor}"]


def _build_plain(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """What `unet` is without its conditional convolutions, on the meta device."""
    config = read_config(unet)
    structure = config.pop("structure", None) or {}
    left = [each for each in structure.get("replace", ()) if each["by"] != REPLACED_BY]
    is_light = left or structure.get("drop")
    return build_outline(config, {**structure, "replace": left} if is_light else None)
