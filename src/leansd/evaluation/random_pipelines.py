"""Pipelines of published sizes with random weights: what they cost is real, what they draw is not.

Time does not depend on what the weights are, so a model that is not on this machine can be
profiled by its shape alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from leansd.anatomy.builtin import BUILTIN
from leansd.anatomy.inputs import TOKENS
from leansd.emoji.location import model_folder
from leansd.errors import LeansdError
from leansd.loading import check_vae, find_device, find_dtype

TEXT: Mapping[str, Mapping[str, Any]] = {
    "sd15": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "sd21-base": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
    },
}
"""Text encoders of the built-in UNets that one stands for: CLIP ViT-L/14 and OpenCLIP ViT-H/14."""

VAE: Mapping[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
"""Stable Diffusion's autoencoder."""

NOISE: Mapping[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def build_stand_in(name: str, *, device: str | None = None) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline of a built-in size, for timing only.

    Raises:
        LeansdError: there is none of that name.
    """
    check_stand_in(name)
    torch.manual_seed(0)
    # Ids of any vocabulary do: its embedding is a look-up.
    tokenizer = CLIPTokenizer.from_pretrained(model_folder() / "tokenizer")
    tokenizer.model_max_length = TOKENS
    parts: dict[str, Any] = {
        "vae": AutoencoderKL(**VAE).eval(),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT[name])).eval(),
        "tokenizer": tokenizer,
        "unet": UNet2DConditionModel(**BUILTIN[name]).eval(),
        "scheduler": DDIMScheduler(**NOISE),
        "safety_checker": None,
        "feature_extractor": None,
    }
    pipe: Any = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    where = find_device(device)
    return pipe.to(where, find_dtype(where))


def check_stand_in(name: str) -> str:
    """The name itself if a pipeline of that size can be built."""
    if name not in TEXT:
        raise LeansdError(
            f"no random pipeline {name!r} (there are {', '.join(TEXT)}); profile a model's folder"
        )
    return name


def build_tiny_vae(pipe: DiffusionPipeline) -> AutoencoderTiny:
    """The small autoencoder TAESD with random weights, for timing only.

    Raises:
        LeansdError: the pipeline's latents are not of Stable Diffusion's kind.
    """
    vae: Any = AutoencoderTiny(latent_channels=pipe.vae.config.latent_channels).eval()
    check_vae(pipe, vae)
    return vae.to(device=pipe.device, dtype=pipe.dtype)
