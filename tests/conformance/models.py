"""Tiny pipelines of every kind that the suite runs, made in code.

Most UNets are cut down to two blocks a side with one layer each way down; the whole topologies of
Stable Diffusion are cases of their own.
"""

from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import (
    ControlNetModel,
    MultiAdapter,
    T2IAdapter,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from tiny import (
    LATENT,
    TOKENS,
    WIDTH,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_unet,
    tiny_vae,
    tiny_xl_unet,
)

SIDE = 4 * LATENT  # of a picture: the tiny autoencoder halves twice

small_unet = partial(
    tiny_unet,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    block_out_channels=(32, 64),
    layers_per_block=1,
)
sd2_unet = partial(small_unet, attention_head_dim=(2, 4), use_linear_projection=True)
inpaint_unet = partial(small_unet, in_channels=9)
# A pipeline's two text encoders are joined side by side.
xl_unet = partial(tiny_xl_unet, cross_attention_dim=2 * WIDTH, layers_per_block=1)


def make_pipeline(name: str, unet: UNet2DConditionModel, scheduler: Any, **parts: Any) -> Any:
    """A silent pipeline of the class `name` in diffusers; any part can be given by name."""
    defaults: dict[str, Any] = {
        "vae": tiny_vae(),
        "text_encoder": tiny_text_encoder(),
        "tokenizer": tiny_tokenizer(),
        "unet": unet,
        "scheduler": scheduler,
    }
    if "XL" in name:
        defaults |= {
            "text_encoder_2": tiny_projecting_text_encoder(),
            "tokenizer_2": tiny_tokenizer(),
            "add_watermarker": False,
        }
    else:
        defaults |= {
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
    pipe = getattr(diffusers, name)(**(defaults | parts))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_projecting_text_encoder() -> CLIPTextModelWithProjection:
    """SDXL's second text encoder, in small."""
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=100,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=1,
    )
    return CLIPTextModelWithProjection(config).eval()


def tiny_controlnet(unet: UNet2DConditionModel, seed: int = 0) -> ControlNetModel:
    """A ControlNet whose closing convolutions, zero in a new one, say something."""
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8))
    for layer in [*net.controlnet_down_blocks, net.controlnet_mid_block]:
        torch.nn.init.normal_(layer.weight, std=0.1)
    torch.nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight, std=0.1)
    return net.eval()


def tiny_adapter(unet: UNet2DConditionModel, seed: int = 0) -> T2IAdapter:
    """A T2I-Adapter with a feature for every down block of an SD 1.x UNet."""
    torch.manual_seed(seed)
    channels = list(unet.config.block_out_channels)
    return T2IAdapter(channels=channels, num_res_blocks=1, downscale_factor=4).eval()


def two_adapters(unet: UNet2DConditionModel) -> MultiAdapter:
    return MultiAdapter([tiny_adapter(unet, 0), tiny_adapter(unet, 1)])


def tiny_ip_adapter(unet: UNet2DConditionModel, seed: int = 0) -> dict[str, dict[str, Any]]:
    """The state of an IP-Adapter: four image tokens, keys and values for each cross-attention."""
    generator = torch.Generator().manual_seed(seed)
    tokens, width = 4, unet.config.cross_attention_dim

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    projection = {
        "proj.weight": draw(tokens * width, WIDTH),
        "proj.bias": draw(tokens * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    attention = {}
    number = 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            inner = unet.get_submodule(name.removesuffix(".processor")).inner_dim
            for part in ("to_k_ip", "to_v_ip"):
                attention[f"{number}.{part}.weight"] = draw(inner, width)
            number += 2  # counts the self-attentions too
    return {"image_proj": projection, "ip_adapter": attention}


def load_ip_adapter(pipe: Any) -> Any:
    pipe.load_ip_adapter(
        tiny_ip_adapter(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None
    )
    return pipe


def tiny_lora(
    unet: UNet2DConditionModel, *targets: str, rank: int = 2, seed: int = 0
) -> dict[str, torch.Tensor]:
    """A LoRA state dictionary as a file holds it, on the layers whose names end in `targets`."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for path, module in unet.named_modules():
        if path.endswith(targets) and isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            weight = module.weight
            down = (rank, *weight.shape[1:])
            up = (weight.shape[0], rank, *(1,) * (weight.dim() - 2))
            for part, shape in (("lora_A", down), ("lora_B", up)):
                tensor = torch.randn(*shape, generator=generator) * 0.3
                state[f"unet.{path}.{part}.weight"] = tensor
    return state


def draw_picture(seed: int = 0, side: int = SIDE) -> Image.Image:
    """A picture of noise."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (side, side, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def draw_mask() -> Image.Image:
    """The right half to be painted."""
    mask = Image.new("L", (SIDE, SIDE), 0)
    mask.paste(255, (SIDE // 2, 0, SIDE, SIDE))
    return mask
