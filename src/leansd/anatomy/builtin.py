"""UNets by name on the meta device: shapes without weights, for counting and planning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from leansd.errors import LeansdError

_SD1: Mapping[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}

BUILTIN: dict[str, Mapping[str, Any]] = {
    "sd15": _SD1,
    "sd21-base": {
        **_SD1,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""Configurations of the published UNets, by name; what is not named is diffusers' default."""


def open_builtin(name: str, **changes: Any) -> UNet2DConditionModel:
    """A UNet of a built-in configuration on the meta device, with `changes` to its configuration.

    Raises:
        LeansdError: there is no such name.
    """
    if name not in BUILTIN:
        raise LeansdError(f"no built-in UNet {name!r} (there are {', '.join(BUILTIN)})")
    with torch.device("meta"):
        return UNet2DConditionModel(**{**BUILTIN[name], **changes})
