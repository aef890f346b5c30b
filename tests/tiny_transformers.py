"""Tiny random pipelines of diffusion transformers, silent, called with embeddings of no text."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

WIDTH, TOKENS, SIDE = 16, 6, 8


def draw_embedding(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_vae(channels: int = 4) -> AutoencoderKL:
    """Halves the side three times."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        norm_num_groups=1,
        layers_per_block=1,
        shift_factor=0.0,
    ).eval()


def make_sd3(kind: Any = StableDiffusion3Pipeline, scheduler: Any = None) -> Any:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=SIDE, patch_size=1, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=2, caption_projection_dim=WIDTH,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, pos_embed_max_size=SIDE,
    ).eval()  # fmt: skip
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
    return kind(
        transformer=transformer,
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_vae(),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


SD3 = {
    "prompt_embeds": draw_embedding(1, TOKENS, WIDTH),
    "negative_prompt_embeds": draw_embedding(1, TOKENS, WIDTH, seed=2),
    "pooled_prompt_embeds": draw_embedding(1, WIDTH),
    "negative_pooled_prompt_embeds": draw_embedding(1, WIDTH, seed=2),
}


def make_flux() -> Any:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    ).eval()  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        transformer=transformer, vae=make_vae(), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip


FLUX = {
    "prompt_embeds": draw_embedding(1, TOKENS, WIDTH),
    "pooled_prompt_embeds": draw_embedding(1, WIDTH),
    "height": SIDE * 8,
    "width": SIDE * 8,
}


def make_pixart() -> Any:
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=SIDE, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2,
        in_channels=4, out_channels=8, cross_attention_dim=WIDTH, caption_channels=WIDTH,
        use_additional_conditions=False,
    ).eval()  # fmt: skip
    return PixArtSigmaPipeline(
        transformer=transformer, vae=make_vae(), text_encoder=None, tokenizer=None,
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001),
    )  # fmt: skip


MASK = torch.ones(1, TOKENS)
PIXART = {
    "prompt": None,
    "negative_prompt": None,
    "prompt_embeds": draw_embedding(1, TOKENS, WIDTH),
    "negative_prompt_embeds": draw_embedding(1, TOKENS, WIDTH, seed=2),
    "prompt_attention_mask": MASK,
    "negative_prompt_attention_mask": MASK,
    "use_resolution_binning": False,
    "height": SIDE * 8,
    "width": SIDE * 8,
}


def make_sana() -> Any:
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2,
        attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8,
        cross_attention_dim=WIDTH, caption_channels=WIDTH, sample_size=SIDE,
    ).eval()  # fmt: skip
    vae = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock"), decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        downsample_block_type="conv", upsample_block_type="interpolate",
        decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41,
    ).eval()  # fmt: skip
    return SanaPipeline(
        transformer=transformer, vae=vae, text_encoder=None, tokenizer=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


SANA = {**PIXART, "height": 32, "width": 32}


def make_qwen() -> Any:
    """Two calls a step, whose guided output gets the conditional one's norm."""
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=(8, 4, 4),
    ).eval()  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()  # fmt: skip
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        transformer=transformer, vae=vae, text_encoder=None, tokenizer=None,
    )  # fmt: skip


QWEN = {
    "prompt_embeds": draw_embedding(1, TOKENS, WIDTH),
    "negative_prompt_embeds": draw_embedding(1, TOKENS, WIDTH, seed=2),
    "prompt_embeds_mask": MASK.long(),
    "negative_prompt_embeds_mask": MASK.long(),
    "height": SIDE * 8,
    "width": SIDE * 8,
}


def make_z_image() -> Any:
    """Latents, text states and outputs are lists of rows."""
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=WIDTH, axes_dims=[8, 4, 4], axes_lens=[64, 32, 32],
    ).eval()  # fmt: skip
    for name, weight in transformer.named_parameters():
        if "pad_token" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=transformer,
        vae=make_vae(), text_encoder=None, tokenizer=None,
    )  # fmt: skip


Z_IMAGE = {
    "prompt_embeds": [draw_embedding(TOKENS, WIDTH)],
    "negative_prompt_embeds": [draw_embedding(TOKENS, WIDTH, seed=2)],
    "cfg_normalization": 1.0,
    "height": SIDE * 8,
    "width": SIDE * 8,
}

PIPELINES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "sd3": (make_sd3, SD3),
    "flux": (make_flux, FLUX),
    "pixart": (make_pixart, PIXART),
    "sana": (make_sana, SANA),
    "qwen": (make_qwen, QWEN),
    "z-image": (make_z_image, Z_IMAGE),
}


def make_sd3_img2img() -> Any:
    return make_sd3(StableDiffusion3Img2ImgPipeline)


def draw(pipe: Any, arguments: dict[str, Any], steps: int, **changes: Any) -> torch.Tensor:
    """The last latents of a call from a fixed seed."""
    pipe.set_progress_bar_config(disable=True)
    given = {**arguments, **changes}
    generator = torch.Generator().manual_seed(3)
    return pipe(
        num_inference_steps=steps, generator=generator, output_type="latent", **given
    ).images
