"""The embedded model of leansd for ComfyUI's own nodes: a model, a text encoder, a decoder.

A newcomer sees the nodes work without a download; and every claim about this pack was measured on
it, in ComfyUI's own UNet and samplers.
"""

from __future__ import annotations

import json
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.modules.attention import CrossAttention
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from safetensors.torch import load_file

from leansd.emoji.location import model_folder

Conditioning = list[list[Any]]


class EmbeddedConfig(comfy.supported_models.SD15):
    """Stable Diffusion 1.x in small, whose latents are of unit scale."""

    latent_format = comfy.latent_formats.LatentFormat


def load_model() -> Any:
    """The UNet as a model of ComfyUI, which computes by its own code."""
    folder = model_folder() / "unet"
    told = json.loads((folder / "config.json").read_text())
    widths, heads, groups = (
        told[name] for name in ("block_out_channels", "attention_head_dim", "norm_num_groups")
    )
    crossed = [int(kind.startswith("CrossAttn")) for kind in told["down_block_types"]]
    depths = [each for each in crossed for _ in range(told["layers_per_block"])]
    config: dict[str, Any] = {
        "image_size": 32,
        "in_channels": told["in_channels"],
        "out_channels": told["out_channels"],
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": [told["layers_per_block"]] * len(widths),
        "transformer_depth": depths,
        "transformer_depth_output": [
            each for each in crossed for _ in range(told["layers_per_block"] + 1)
        ],
        "transformer_depth_middle": 1,
        "use_spatial_transformer": True,
        "context_dim": told["cross_attention_dim"],
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
        "use_temporal_attention": False,
        "num_heads": heads[0],
        "num_head_channels": -1,
        "legacy": False,
        "dtype": torch.float32,
    }
    load, wait = (
        comfy.model_management.get_torch_device(),
        comfy.model_management.unet_offload_device(),
    )
    model = comfy.model_base.BaseModel(EmbeddedConfig(config), device=wait)
    by_width = dict(zip(widths, heads, strict=True))
    for module in model.diffusion_model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = groups
        if isinstance(module, CrossAttention):
            width = module.to_q.in_features
            module.heads = by_width[width]
            module.dim_head = width // by_width[width]
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    names = comfy.utils.unet_to_diffusers(config)
    own = {names[key]: value.float() for key, value in weights.items()}
    model.diffusion_model.load_state_dict(own)
    model.eval()
    return comfy.model_patcher.ModelPatcher(model, load_device=load, offload_device=wait)


class EmbeddedText:
    """The text encoder, as the node CLIP Text Encode calls one."""

    def __init__(self) -> None:
        from transformers import CLIPTextModel, CLIPTokenizer

        folder = model_folder()
        self._encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").float().eval()
        self._tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")

    def tokenize(self, text: str, **_: Any) -> torch.Tensor:
        """Token ids [1, tokens]."""
        longest = self._encoder.config.max_position_embeddings
        told = self._tokenizer(
            [text], padding="max_length", max_length=longest, truncation=True, return_tensors="pt"
        )
        return told.input_ids

    def encode_from_tokens_scheduled(self, tokens: torch.Tensor, **_: Any) -> Conditioning:
        """Text states [1, tokens, width] as ComfyUI's conditioning."""
        with torch.no_grad():
            given = self._encoder(tokens)
        return [[given.last_hidden_state, {"pooled_output": given.pooler_output}]]


class EmbeddedDecoder:
    """The autoencoder, as the nodes VAE Decode and VAE Encode call one."""

    def __init__(self) -> None:
        from leansd.loading import load_vae

        self._vae = load_vae(model_folder(), dtype=torch.float32).eval()

    def decode(self, samples: torch.Tensor, **_: Any) -> torch.Tensor:
        """Pictures [B, H, W, 3] from 0 to 1 of latents [B, 4, h, w]."""
        with torch.no_grad():
            pictures = self._vae.decode(samples.float().cpu()).sample
        return (pictures / 2 + 0.5).clamp(0, 1).movedim(1, -1)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Latents [B, 4, h, w] of pictures [B, H, W, 3] from 0 to 1."""
        seen = pixels[..., :3].float().cpu().movedim(-1, 1) * 2 - 1
        with torch.no_grad():
            return retrieve_latents(self._vae.encode(seen), sample_mode="argmax")
