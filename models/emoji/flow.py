"""A small flow model, not shipped: a Stable Diffusion 3 on the embedded model's latents.

It is there to hold plans of whole steps against their rivals on a transformer that draws. It has
the embedded model's autoencoder and text tower, and learns the velocity from picture to noise
(rectified flow, Esser et al., arXiv 2403.03206).
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from models.emoji.data import Pictures
from models.emoji.denoiser import DenoiserLearner, LatentSet, draw_strata
from models.emoji.recipe import cache_latents
from models.emoji.sidecar import Batch
from models.emoji.stages import (
    Report,
    draw_generator,
    load_state,
    save_json,
    train_stage,
)

WIDTH, HEADS, LAYERS, PATCH = 192, 3, 6, 2
BATCH, RATE, SEED = 32, 2e-3, 200
DECAY_SHARE = 0.4
"""Of the training, at its end, in which the rate goes down to 0."""
BLANKS = 1
"""Tokens that the pipeline adds for the T5 that is not there: give its calls this
`max_sequence_length`, for by default it adds 256."""
ENDS = ("pos_embed", "time_text_embed", "context_embedder", "norm", "proj_out")


def build_flow_pipeline(pipe: StableDiffusionPipeline) -> StableDiffusion3Pipeline:
    """Build the pipeline with an untrained transformer around `pipe`'s autoencoder and tower."""
    vae, tower = pipe.vae, pipe.text_encoder
    vae.register_to_config(shift_factor=0.0)
    text = project_text(tower)
    width = 2 * tower.config.hidden_size
    torch.manual_seed(SEED)
    transformer = SD3Transformer2DModel(
        sample_size=pipe.unet.config.sample_size,
        patch_size=PATCH,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        caption_projection_dim=WIDTH,
        joint_attention_dim=width,
        pooled_projection_dim=width,
        pos_embed_max_size=pipe.unet.config.sample_size // PATCH,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=text,
        tokenizer=pipe.tokenizer,
        text_encoder_2=text,
        tokenizer_2=pipe.tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def project_text(tower: CLIPTextModel) -> CLIPTextModelWithProjection:
    """Return the tower as Stable Diffusion 3 takes it, its pooled state as it is."""
    text = CLIPTextModelWithProjection(tower.config)
    text.text_model.load_state_dict(tower.state_dict())
    torch.nn.init.eye_(text.text_projection.weight)
    return text.eval()


@torch.no_grad()
def embed_texts(pipe: StableDiffusion3Pipeline, captions: list[str]) -> torch.Tensor:
    """Embed captions as the pipeline does: (captions, tokens + 1, width), the pooled state last."""
    states, _, pooled, _ = pipe.encode_prompt(
        prompt=captions,
        prompt_2=None,
        prompt_3=None,
        do_classifier_free_guidance=False,
        max_sequence_length=BLANKS,
    )
    return torch.cat([states, pooled[:, None]], 1)


def draw_flows(pictures: LatentSet, batch: int, seed: int, step: int) -> Batch:
    """Draw noisy latents, captions and times; the velocity is the answer.

    Times are logit-normal, so that most lie in the middle.
    """
    latents, texts = pictures.draw(batch, seed, step)
    generator = draw_generator(seed + 2, step)
    noise = torch.randn(latents.shape, generator=generator)
    times = torch.special.ndtri(draw_strata(batch, generator).clamp(1e-4, 1 - 1e-4)).sigmoid()
    noisy = latents.lerp(noise, times[:, None, None, None])
    return noisy, texts[:, :-1], texts[:, -1], 1000 * times, noise - latents, torch.ones(batch)


def train_flow(
    pipe: StableDiffusion3Pipeline,
    pictures: Pictures,
    out: Path,
    steps: int,
    *,
    device: str = "cpu",
    report: Report | None = None,
) -> None:
    """Train the pipeline's transformer, from the checkpoint in `out` if there is one."""
    learner = DenoiserLearner(
        pipe.transformer,
        cache_latents(out / "latents.pt", pipe.vae, pictures, partial(embed_texts, pipe)),
        draw=draw_flows,
        ends=ENDS,
        batch=BATCH,
        rate=RATE,
        seed=SEED,
        decay=(round((1 - DECAY_SHARE) * steps), round(DECAY_SHARE * steps)),
        device=device,
    )
    train_stage(learner, out / "flow", steps, report=report)
    state = load_state(out / "flow" / "state.pt")["learner"]["averages"]
    pipe.transformer.load_state_dict(next(iter(state.values())), strict=False)
    pipe.transformer.cpu().eval()


def save_flow(pipe: StableDiffusion3Pipeline, folder: Path) -> None:
    """Write the pipeline, its absent parts named, so that this package opens it as it is."""
    pipe.save_pretrained(folder)
    path = folder / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    absent = [name for name, part in pipe.components.items() if part is None]
    save_json({**index, **{name: [None, None] for name in absent}}, path)
