"""Inputs for one call of a UNet: a sample and every condition that its configuration asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models import embeddings

TOKENS = 77
"""Text tokens of CLIP, what Stable Diffusion is conditioned on."""

PATCHES = 257
"""What CLIP's image encoder gives for a picture, where an IP-Adapter reads all of it."""

TIME_IDS = 6
"""Numbers of SDXL's size and crop."""

HINT = 4
"""Channels of a sample that the UNet makes of a hint itself."""


def make_inputs(
    unet: UNet2DConditionModel,
    *,
    size: tuple[int, int],
    tokens: int = TOKENS,
    batch: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Any]:
    """Random keyword arguments for one call of `unet`: `sample` [B, C, H, W] and its conditions.

    Args:
        unet: its configuration decides which conditions there are: class labels, added text, time
            and image embeddings, an IP-Adapter's images, a guidance embedding, a hint.
        size: latent (height, width).
        dtype: by default the UNet's own.
    """
    config: Any = unet.config
    dtype = dtype or unet.dtype

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, device=device, dtype=dtype, generator=generator)

    hint = HINT if config.addition_embed_type == "image_hint" else 0
    inputs: dict[str, Any] = {
        "sample": draw(_count_channels(unet) - hint, *size),
        "timestep": torch.full((), 500, device=device),
        "encoder_hidden_states": draw(tokens, _get_text_width(unet)),
    }
    labels = _get_label_width(unet)
    if labels is not None:
        inputs["class_labels"] = (
            draw(labels) if labels else torch.zeros(batch, dtype=torch.long, device=device)
        )
    if config.time_cond_proj_dim is not None:
        inputs["timestep_cond"] = draw(config.time_cond_proj_dim)
    added = _draw_added(unet, size, draw)
    if added:
        inputs["added_cond_kwargs"] = added
    return inputs


def _draw_added(
    unet: UNet2DConditionModel, size: tuple[int, int], draw: Callable[..., torch.Tensor]
) -> dict[str, Any]:
    """The conditions beside text and time that a UNet asks for.

    Args:
        draw: gives random numbers [B, *shape].
    """
    config: Any = unet.config
    added: dict[str, Any] = {}
    width = _get_first(config.cross_attention_dim)
    match config.addition_embed_type:
        case "text_time":
            pooled = config.projection_class_embeddings_input_dim
            pooled -= TIME_IDS * config.addition_time_embed_dim
            added["text_embeds"] = draw(pooled)
            added["time_ids"] = draw(TIME_IDS)
        case "text_image":
            added["text_embeds"] = draw(width)
            added["image_embeds"] = draw(width)
        case "image" | "image_hint":
            added["image_embeds"] = draw(config.encoder_hid_dim)
    if config.addition_embed_type == "image_hint":
        added["hint"] = draw(3, 8 * size[0], 8 * size[1])
    match config.encoder_hid_dim_type:
        case "text_image_proj":
            added["image_embeds"] = draw(width)
        case "image_proj":
            added["image_embeds"] = draw(config.encoder_hid_dim)
        case "ip_image_proj":
            added["image_embeds"] = [
                draw(1, *shape) for shape in _list_image_shapes(unet.encoder_hid_proj)
            ]
    return added


def pick_size(unet: UNet2DConditionModel, latent: int | tuple[int, int] | None) -> tuple[int, int]:
    """Latent (height, width): what was asked for, or the UNet's own."""
    config: Any = unet.config
    chosen = latent if latent is not None else config.sample_size or 64
    if isinstance(chosen, int):
        return chosen, chosen
    height, width = chosen
    return height, width


def _count_channels(unet: UNet2DConditionModel) -> int:
    """Channels that the UNet's stem reads; one may be wider than its configuration says."""
    stem = getattr(unet, "conv_in", None)  # an exported UNet has none
    stem = getattr(stem, "base_layer", stem)  # of a convolution that has a LoRA
    config: Any = unet.config
    return getattr(stem, "in_channels", config.in_channels)


def _get_first(width: int | tuple[int, ...]) -> int:
    return width if isinstance(width, int) else width[0]


def _get_text_width(unet: UNet2DConditionModel) -> int:
    config: Any = unet.config
    # Kolors keeps its projection of the text beside an IP-Adapter's of the images.
    projected = getattr(unet, "text_encoder_hid_proj", None) is not None
    if projected or config.encoder_hid_dim_type in ("text_proj", "text_image_proj"):
        return config.encoder_hid_dim
    if config.addition_embed_type == "text" and config.encoder_hid_dim is not None:
        return config.encoder_hid_dim
    return _get_first(config.cross_attention_dim)


def _get_label_width(unet: UNet2DConditionModel) -> int | None:
    """Width of a class label; 0 where it is a single number, None where there are no classes."""
    config: Any = unet.config
    match config.class_embed_type:
        case None:
            return None if config.num_class_embeds is None else 0
        case "timestep":
            return 0
        case "identity":
            factor = 2 if config.time_embedding_type == "fourier" else 4
            return config.time_embedding_dim or config.block_out_channels[0] * factor
        case _:
            return config.projection_class_embeddings_input_dim


def _list_image_shapes(projection: Any) -> list[tuple[int, ...]]:
    """Shape of one picture's embedding for each IP-Adapter: (width,) or (patches, width)."""
    shapes: list[tuple[int, ...]] = []
    for layer in projection.image_projection_layers:
        whole = isinstance(
            layer,
            embeddings.IPAdapterPlusImageProjection | embeddings.IPAdapterFullImageProjection,
        )
        width = next(part.in_features for part in layer.modules() if hasattr(part, "in_features"))
        shapes.append((PATCHES, width) if whole else (width,))
    return shapes
