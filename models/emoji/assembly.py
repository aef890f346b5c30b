"""The trained parts put together as a stock Stable Diffusion pipeline, and written to disk."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from leansd.errors import LeansdError
from leansd.files import writing
from models.emoji.denoiser import NOISE
from models.emoji.stages import save_json
from models.emoji.text import save_tokenizer

LIMIT_MB = 40


def build_scheduler() -> DPMSolverMultistepScheduler:
    """Return the default sampler: DPM-Solver++ 2M over Stable Diffusion's noise schedule."""
    # What this sampler does not know is kept for those made from its configuration: as in Stable
    # Diffusion's own, else DDIM and DDPM would clip the latents as if they were pixels.
    others = {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True}
    own = {"algorithm_type": "dpmsolver++", "solver_order": 2, "steps_offset": 1}
    return DPMSolverMultistepScheduler.from_config({**NOISE, **own, **others})


def assemble_pipeline(
    vae: AutoencoderKL, text: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """Return the pipeline, in evaluation mode, sharing the given modules."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for module in (vae, text, unet):
        module.eval()
    return pipe


def save_model(pipe: StableDiffusionPipeline, folder: Path, clip: CLIPModel | None = None) -> float:
    """Write pipeline and CLIP as fp16 safetensors, return their MB; one move replaces `folder`.

    The modules stay as they were: only their files are in half precision.
    """
    with writing(folder) as part:
        part.mkdir()
        for name in ("vae", "unet", "text_encoder"):
            _save_half(getattr(pipe, name), part / name)
        if clip is not None:
            _save_half(clip, part / "clip")
        pipe.scheduler.save_pretrained(part / "scheduler")
        save_tokenizer(pipe.tokenizer, part / "tokenizer")
        pipe.save_config(part)
        size = sum(path.stat().st_size for path in part.rglob("*.safetensors")) / 1e6
        if size > LIMIT_MB:
            raise LeansdError(f"the model takes {size:.1f} MB: the limit is {LIMIT_MB}")
    return size


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    """Load a trained model as the stock pipeline, in float32, without a look at the network."""
    if not (folder / "model_index.json").is_file():
        raise LeansdError(f"no model in {folder}: `python -m models.emoji assemble` writes one")
    return StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)


def _save_half(module: torch.nn.Module, folder: Path) -> None:
    half = copy.deepcopy(module).cpu().to(memory_format=torch.contiguous_format).half()
    half.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # transformers would load what the file says; half precision does not run on every CPU.
    if "dtype" in config:
        config["dtype"] = "float32"
    save_json(config, path)
