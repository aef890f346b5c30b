"""What a UNet costs: multiply-accumulates by unit, attention's matrix products included.

Published figures for Stable Diffusion often leave those out (thop-style counts: 338.6 G for SD 1.5,
where 401.6 G are computed).
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from accelerate.hooks import ModelHook, remove_hook_from_module
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from leansd.anatomy.reading import read_anatomy
from leansd.plans.anatomy import Anatomy

TOKENS = 77
"""Text tokens of CLIP, what Stable Diffusion is conditioned on."""


@dataclass(frozen=True)
class Ledger:
    """Multiply-accumulates of one forward on one sample."""

    by_path: Mapping[str, int]
    """By module path in the UNet, every level of it; `""` is the whole."""
    size: tuple[int, int]
    """Latent (height, width)."""
    tokens: int

    @property
    def total(self) -> int:
        return self.by_path[""]

    def __getitem__(self, path: str) -> int:
        return self.by_path.get(path, 0)


def dissect(
    unet: UNet2DConditionModel,
    *,
    latent: int | tuple[int, int] | None = None,
    tokens: int = TOKENS,
    name: str = "UNet",
) -> Anatomy:
    """Read a UNet into an anatomy, with the cost of every unit.

    Args:
        latent: height (and width) in latent pixels; by default the UNet's own sample size.
        tokens: length of the text condition.
        name: what the anatomy calls the UNet where it is printed.

    Raises:
        LeansdError: it is no `UNet2DConditionModel`, or a block is built in a way not known here.
    """
    anatomy = read_anatomy(unet, name=name)
    ledger = count_macs(unet, latent=latent, tokens=tokens)
    units = tuple(replace(unit, macs=ledger[unit.path]) for unit in anatomy)
    parts = tuple(replace(part, macs=ledger[part.path]) for part in anatomy.parts)
    counted = replace(anatomy, units=units, parts=parts, macs=ledger.total)
    return replace(counted, size=ledger.size, tokens=tokens)


def count_macs(
    unet: UNet2DConditionModel,
    *,
    latent: int | tuple[int, int] | None = None,
    tokens: int = TOKENS,
) -> Ledger:
    """Run the UNet's shapes on the meta device and count every matrix product and convolution.

    Counted are multiply-accumulates of one forward on one sample, attention's products included.

    Args:
        latent: height (and width) in latent pixels; by default the UNet's own sample size.
        tokens: length of the text condition.
    """
    size = pick_size(unet, latent)
    skeleton = copy_skeleton(unet)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        skeleton(**make_inputs(unet, size=size, tokens=tokens, device="meta"))
    counts: defaultdict[str, int] = defaultdict(int)
    for path, by_operator in counter.get_flop_counts().items():
        # The counter prefixes the class name; "Global" is its own name for the whole.
        inner = "" if path == "Global" else path.partition(".")[2]
        if inner or path == "Global":
            counts[inner] = sum(by_operator.values()) // 2
    return Ledger(dict(counts), size, tokens)


def copy_skeleton(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy of `unet` on the meta device that takes no memory, its structure as it is now."""
    tensors = chain(unet.parameters(), unet.buffers())
    # deepcopy takes what the memo holds for an object, so no weight is ever copied.
    memo: dict[int, Any] = {id(tensor): _to_meta(tensor) for tensor in tensors}
    # Offloading keeps the weights in hooks, and would look for them when the copy runs.
    hooks = (getattr(module, "_hf_hook", None) for module in unet.modules())
    memo |= {id(hook): ModelHook() for hook in hooks if hook is not None}
    skeleton = copy.deepcopy(unet, memo)
    remove_hook_from_module(skeleton, recurse=True)
    return skeleton


def make_inputs(
    unet: UNet2DConditionModel,
    *,
    size: tuple[int, int],
    tokens: int = TOKENS,
    batch: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> dict[str, Any]:
    """Random keyword arguments for one call of `unet`: `sample` [B, C, H, W] and its conditions."""
    config = unet.config

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, generator=generator)

    inputs: dict[str, Any] = {
        "sample": draw(batch, config.in_channels, *size),
        "timestep": torch.full((), 500, device=device),
        "encoder_hidden_states": draw(batch, tokens, _get_text_width(config.cross_attention_dim)),
    }
    if config.addition_embed_type == "text_time":
        time_ids = 6
        pooled = (
            config.projection_class_embeddings_input_dim - time_ids * config.addition_time_embed_dim
        )
        inputs["added_cond_kwargs"] = {
            "text_embeds": draw(batch, pooled),
            "time_ids": draw(batch, time_ids),
        }
    return inputs


def pick_size(unet: UNet2DConditionModel, latent: int | tuple[int, int] | None) -> tuple[int, int]:
    """Latent (height, width): what was asked for, or the UNet's own."""
    chosen = latent if latent is not None else unet.config.sample_size or 64
    if isinstance(chosen, int):
        return chosen, chosen
    height, width = chosen
    return height, width


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    meta = tensor.detach().to("meta")
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(meta, requires_grad=False)
    return meta


def _get_text_width(width: int | tuple[int, ...]) -> int:
    return width if isinstance(width, int) else width[0]
