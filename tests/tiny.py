"""Tiny random models of the right topology: a forward takes milliseconds, nothing is downloaded."""

import io
import json
import pickle
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH = 32  # of the text embedding
TOKENS = 77  # of a prompt
LATENT = 8  # side of the latents; a picture is 32 x 32
MOULDS = 16  # of the nets asked for last, some ten megabytes each


class Mould(pickle.Pickler):
    """A net as it was made; to cast it again takes an eighth of the time."""

    def __init__(self, net: torch.nn.Module) -> None:
        self.after = torch.get_rng_state()
        self.weights: list[torch.Tensor] = []
        content = io.BytesIO()
        super().__init__(content)
        self.dump(net)
        self.content = content.getvalue()

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, torch.nn.Parameter):
            return None
        self.weights.append(obj.detach().clone())
        return len(self.weights) - 1

    def cast(self) -> Any:
        caster = Caster(io.BytesIO(self.content))
        caster.weights = self.weights
        net = caster.load()
        torch.set_rng_state(self.after)  # as if the weights had been drawn
        return net


class Caster(pickle.Unpickler):
    weights: list[torch.Tensor]

    def persistent_load(self, pid: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(self.weights[pid].clone())


def _draws_plainly() -> bool:
    """Whether a net made now is the processor's own, in single precision, and no fake one."""
    plain = torch.get_default_device().type == "cpu" and torch.get_default_dtype() == torch.float32
    return plain and _get_current_dispatch_mode() is None


def drawn_once(make: Callable[..., Any]) -> Callable[..., Any]:
    """Each call gives a net of its own; equal calls draw their equal weights once."""
    moulds: dict[str, Mould] = {}

    @wraps(make)
    def give(*args: Any, **options: Any) -> Any:
        if not _draws_plainly():
            return make(*args, **options)
        words = repr((args, sorted(options.items())))
        if words not in moulds:
            moulds[words] = Mould(make(*args, **options))
            if len(moulds) > MOULDS:
                del moulds[next(iter(moulds))]
        return moulds[words].cast()

    return give


@drawn_once
def tiny_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """A UNet with the SD 1.x topology, all 44 units and 2 ends."""
    options: dict[str, Any] = {
        "sample_size": LATENT,
        "block_out_channels": (32, 32, 64, 64),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    torch.manual_seed(seed)
    return UNet2DConditionModel(**(options | changes)).eval()


SHALLOW: dict[str, Any] = {
    "block_out_channels": (32,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "layers_per_block": 1,
}
"""One block a side: where what is tested is the same in every unit, and each of them takes long."""


def shallow_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """A UNet of 6 units and 2 ends; its one transformer is in the middle."""
    return tiny_unet(seed, **(SHALLOW | changes))


@drawn_once
def tiny_xl_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """A UNet with the SDXL topology, all 32 units and 2 ends."""
    options: dict[str, Any] = {
        "sample_size": LATENT,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (32, 32, 64),
        "transformer_layers_per_block": (1, 2, 2),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": (2, 4, 8),
        "norm_num_groups": 8,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
    }
    torch.manual_seed(seed)
    return UNet2DConditionModel(**(options | changes)).eval()


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that spells every word by its letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + list("0123456789,.-")
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({word: i for i, word in enumerate(words)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=TOKENS)


def tiny_text_encoder(seed: int = 0) -> CLIPTextModel:
    """A CLIP text model of two layers."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=100,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=1,
    )
    return CLIPTextModel(config).eval()


def tiny_vae(seed: int = 0) -> AutoencoderTiny:
    """A tiny autoencoder that halves the side twice."""
    torch.manual_seed(seed)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    ).eval()


def tiny_scheduler() -> DDIMScheduler:
    """DDIM on the schedule of Stable Diffusion."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def tiny_pipeline(seed: int = 0, **parts: Any) -> StableDiffusionPipeline:
    """A whole text-to-image pipeline, silent; any part can be given by name."""
    defaults: dict[str, Any] = {
        "vae": tiny_vae(seed),
        "text_encoder": tiny_text_encoder(seed),
        "tokenizer": tiny_tokenizer(),
        "unet": tiny_unet(seed),
        "scheduler": tiny_scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    pipe = StableDiffusionPipeline(**(defaults | parts))
    pipe.set_progress_bar_config(disable=True)
    return pipe
