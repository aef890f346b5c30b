"""Tiny random pipelines of diffusion transformers, silent, called with embeddings of no text."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
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
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tiny import tiny_tokenizer

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


def make_sd3(
    kind: Any = StableDiffusion3Pipeline, scheduler: Any = None, width: int = WIDTH
) -> Any:
    """Args: width: of what its text encoders give together."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=SIDE, patch_size=1, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=2, caption_projection_dim=WIDTH,
        joint_attention_dim=width, pooled_projection_dim=width, pos_embed_max_size=SIDE,
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


def make_flux(blocks: int = 1) -> Any:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=blocks, num_single_layers=1, attention_head_dim=16,
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


def make_pixart(side: int = SIDE) -> Any:
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=side, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2,
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


def make_sana(side: int = SIDE, levels: int = 2) -> Any:
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2,
        attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8,
        cross_attention_dim=WIDTH, caption_channels=WIDTH, sample_size=side,
    ).eval()  # fmt: skip
    vae = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2,
        encoder_block_types=("ResBlock",) * levels, decoder_block_types=("ResBlock",) * levels,
        encoder_block_out_channels=(8,) * levels, decoder_block_out_channels=(8,) * levels,
        encoder_qkv_multiscales=((),) * levels, decoder_qkv_multiscales=((),) * levels,
        encoder_layers_per_block=(1,) * levels, decoder_layers_per_block=(1,) * levels,
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


# -- text encoders, for models in folders ----------------------------------------------------------

LETTERS = [*map(chr, range(ord("a"), ord("z") + 1)), *"0123456789,.-"]
LAYERS: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip


def make_clip_config() -> CLIPTextConfig:
    sizes = {name: value for name, value in LAYERS.items() if name[:4] not in ("head", "voca")}
    del sizes["num_key_value_heads"]
    return CLIPTextConfig(
        vocab_size=100, max_position_embeddings=77, bos_token_id=0, eos_token_id=1,
        projection_dim=WIDTH, **sizes,
    )  # fmt: skip


def make_qwen_tokenizer() -> Any:
    words = ["<|endoftext|>", *LETTERS, "\u0120"]
    template = "{{ messages[0]['content'] }}"
    vocabulary = {word: place for place, word in enumerate(words)}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], chat_template=template)


def make_t5() -> tuple[Any, Any]:
    torch.manual_seed(0)
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": WIDTH, "num_layers": 1, "num_heads": 2}
    words = ["<pad>", "</s>", "<unk>", "\u2581", *LETTERS]
    tokenizer = T5Tokenizer(vocab=[(word, -1.0) for word in words], extra_ids=0)
    return T5EncoderModel(T5Config(vocab_size=64, **sizes)), tokenizer


def add_sd3_text(pipe: Any) -> None:
    """Both CLIPs, and no T5."""
    torch.manual_seed(0)
    first, second = (CLIPTextModelWithProjection(make_clip_config()) for _ in range(2))
    pipe.register_modules(
        text_encoder=first, tokenizer=tiny_tokenizer(),
        text_encoder_2=second, tokenizer_2=tiny_tokenizer(),
    )  # fmt: skip


def add_flux_text(pipe: Any) -> None:
    encoder, tokenizer = make_t5()
    pipe.register_modules(
        text_encoder=CLIPTextModel(make_clip_config()), tokenizer=tiny_tokenizer(),
        text_encoder_2=encoder, tokenizer_2=tokenizer,
    )  # fmt: skip


def add_pixart_text(pipe: Any) -> None:
    encoder, tokenizer = make_t5()
    pipe.register_modules(text_encoder=encoder, tokenizer=tokenizer)


def add_sana_text(pipe: Any) -> None:
    torch.manual_seed(0)
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "\u2581", *LETTERS]
    vocabulary = {word: place for place, word in enumerate(words)}
    pipe.register_modules(
        text_encoder=Gemma2Model(Gemma2Config(**LAYERS)),
        tokenizer=GemmaTokenizer(vocab=vocabulary, merges=[]),
    )


def add_qwen_text(pipe: Any) -> None:
    torch.manual_seed(0)
    turns = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    sight = {"depth": 1, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_heads": 2}
    config = Qwen2_5_VLConfig(
        text_config={**LAYERS, "rope_scaling": turns},
        vision_config={**sight, "out_hidden_size": WIDTH},
    )
    encoder = Qwen2_5_VLForConditionalGeneration(config)
    pipe.register_modules(text_encoder=encoder, tokenizer=make_qwen_tokenizer())


def add_z_image_text(pipe: Any) -> None:
    torch.manual_seed(0)
    encoder = Qwen3Model(Qwen3Config(**LAYERS))
    pipe.register_modules(text_encoder=encoder, tokenizer=make_qwen_tokenizer())


TEXTS: dict[str, Callable[[Any], None]] = {
    "sd3": add_sd3_text,
    "flux": add_flux_text,
    "pixart": add_pixart_text,
    "sana": add_sana_text,
    "qwen": add_qwen_text,
    "z-image": add_z_image_text,
}


WHOLE_MODELS: dict[str, Callable[[], Any]] = {
    "sd3": partial(make_sd3, width=2 * WIDTH),
    # Their pipelines draw at the nearest size of those that they were trained at.
    "pixart": partial(make_pixart, side=32),
    "sana": partial(make_sana, side=16, levels=6),
}


def save_model(name: str, folder: Path) -> Path:
    """A whole model as users have it, with text encoders of two layers."""
    pipe = WHOLE_MODELS.get(name, PIPELINES[name][0])()
    TEXTS[name](pipe)
    pipe.save_pretrained(folder)
    return folder


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
