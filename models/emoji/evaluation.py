"""The numbers of the model card: the judge's, reconstruction, Fréchet distance, loss by time."""

from __future__ import annotations

import datetime
import random
import statistics
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from transformers import CLIPModel, CLIPTokenizer

from leansd.core.devices import seed_generator
from leansd.emoji.prompts import GRID_PROMPTS
from leansd.evaluation.quality import frechet_distance, measure_gaussian
from models.emoji.autoencoder import measure_psnr
from models.emoji.data import STYLES, Pair, Pictures, write_captions
from models.emoji.denoiser import NOISE
from models.emoji.drawing import draw_captions
from models.emoji.eyes import embed_images, embed_texts
from models.emoji.judge import Judge, look_at, rank_names

GUIDANCE = 7.5  # the pipeline's own default
CHOICES = 100  # captions among which the CLIP must find a picture's own
SLICES = 10  # of the time steps


def measure_frechet(judge: Judge, real: torch.Tensor, other: torch.Tensor) -> float:
    """Return the Fréchet distance of two uint8 picture sets (count, 3, side, side).

    In the judge's features: it is FID's distance, and no FID.
    """
    return frechet_distance(*(measure_gaussian(look_at(judge, each)) for each in (real, other)))


@torch.no_grad()
def measure_losses(
    pipe: StableDiffusionPipeline,
    latents: torch.Tensor,
    texts: torch.Tensor,
    *,
    draws: int = 2,
    seed: int = 0,
    batch: int = 32,
) -> list[float]:
    """Return the mean squared error of the noise in each of ten slices of the time steps.

    Takes latents (count, 4, h, w) and plain captions (count, tokens, width).
    """
    noise_of = DDPMScheduler(**NOISE)
    span = noise_of.config.num_train_timesteps // SLICES
    means = []
    for place in range(SLICES):
        generator = seed_generator(seed + place)
        errors = []
        for _ in range(draws):
            for own, text in zip(latents.split(batch), texts.split(batch), strict=True):
                noise = torch.randn(own.shape, generator=generator)
                steps = torch.randint(span, (len(own),), generator=generator) + place * span
                named = pipe.unet(noise_of.add_noise(own, noise, steps), steps, text).sample
                errors += (named - noise).square().flatten(1).mean(1).tolist()
        means.append(round(statistics.fmean(errors), 5))
    return means


def find_neighbours(
    judge: Judge, drawn: torch.Tensor, train: torch.Tensor
) -> tuple[list[int], list[int]]:
    """Return, for each drawn uint8 picture, its nearest of `train`: in pixels, in features."""
    pixels = torch.cdist(drawn.float().flatten(1), train.float().flatten(1)).argmin(1)
    features = torch.cdist(look_at(judge, drawn), look_at(judge, train)).argmin(1)
    return pixels.tolist(), features.tolist()


def choose_pairs(pairs: Sequence[Pair], count: int, seed: int) -> list[int]:
    """Return the places of `count` pairs drawn without looking at them."""
    return sorted(random.Random(seed).sample(range(len(pairs)), min(count, len(pairs))))


def evaluate_model(
    pipe: StableDiffusionPipeline,
    judge: Judge,
    pictures: Pictures,
    latents: dict[str, torch.Tensor],
    *,
    clip: tuple[CLIPModel, CLIPTokenizer] | None = None,
    count: int = 200,
    steps: int = 30,
    guidance: float = GUIDANCE,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure the model on `count` training captions and as many held-out pairs as there are.

    `latents` is the run's cache: latents and texts of both sets.
    """
    decibels = measure_psnr(pipe.vae, pictures.held_out)
    split = pictures.split
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "scheduler": type(pipe.scheduler).__name__,
        "pictures": {
            "train": len(split.train),
            "held_out": len(split.held_out),
            "concepts": len(judge.concepts),
        },
        "grid_held_out": find_held_out(pictures, GRID_PROMPTS),
        "vae_psnr": {
            "mean": round(statistics.fmean(decibels), 2),
            "median": round(statistics.median(decibels), 2),
            "worst": round(min(decibels), 2),
        },
        "frechet_real": round(measure_frechet(judge, pictures.train, pictures.held_out), 3),
        "losses": {
            name: measure_losses(
                pipe,
                latents[f"{prefix}latents"][:count],
                torch.stack([texts[0] for texts in latents[f"{prefix}texts"][:count]]),
            )
            for name, prefix in (("train", ""), ("held_out", "held_out_"))
        },
    }
    sets = (
        ("train", split.train, pictures.train),
        ("held_out", split.held_out, pictures.held_out),
    )
    for name, pairs, pixels in sets:
        places = choose_pairs(pairs, count, seed)
        chosen = [pairs[place] for place in places]
        say(f"drawing {len(chosen)} pictures: {name}")
        drawn = draw_captions(
            pipe,
            [write_captions(pair)[0] for pair in chosen],
            steps=steps,
            guidance=guidance,
            seed=seed,
        )
        captions = [write_captions(pair)[0] for pair in chosen]
        generated = summarize_ranks(rank_names(judge, drawn, _name(chosen)), chosen)
        real = summarize_ranks(rank_names(judge, pixels, _name(pairs)), pairs)
        result[name] = {
            "count": len(chosen),
            "generated": generated,
            "real": real,
            "of_ceiling": round(generated["top1"] / max(real["top1"], 1e-9), 3),
            "frechet": round(measure_frechet(judge, pictures.train, drawn), 3),
        }
        if clip:
            result[name]["retrieval"] = {
                "choices": min(CHOICES, len(chosen)),
                "drawn": retrieve_captions(clip, drawn, captions),
                "real": retrieve_captions(clip, pixels[places], captions),
            }
    return result


def retrieve_captions(
    clip: tuple[CLIPModel, CLIPTokenizer], pixels: torch.Tensor, captions: Sequence[str]
) -> float:
    """Return how often the model's own CLIP finds a uint8 picture's caption among a hundred."""
    net, tokenizer = clip
    # Shuffled, or a group of choices would be neighbours by name: look-alikes.
    order = torch.randperm(len(captions), generator=seed_generator(1))
    images = embed_images(net, pixels)[order]
    texts = embed_texts(net, tokenizer, captions)[order]
    hits = 0
    for own, all_texts in zip(images.split(CHOICES), texts.split(CHOICES), strict=True):
        hits += int(((own @ all_texts.T).argmax(1) == torch.arange(len(own))).sum())
    return round(hits / len(captions), 3)


def summarize_ranks(ranks: Sequence[int], pairs: Sequence[Pair]) -> dict[str, Any]:
    """Return the shares of first and of first five places, and the first by style."""

    def share(own: Sequence[int], best: int) -> float:
        return round(sum(rank < best for rank in own) / max(1, len(own)), 3)

    by_style = {
        style: [rank for rank, pair in zip(ranks, pairs, strict=True) if pair.style == style]
        for style in STYLES
    }
    return {
        "top1": share(ranks, 1),
        "top5": share(ranks, 5),
        "by_style": {style: share(own, 1) for style, own in by_style.items()},
    }


def find_held_out(pictures: Pictures, prompts: Sequence[str]) -> list[str]:
    """Return those of the prompts whose picture was held out of training."""
    captions = {write_captions(pair)[0] for pair in pictures.split.held_out}
    return [prompt for prompt in prompts if prompt in captions]


def _name(pairs: Sequence[Pair]) -> list[str]:
    return [pair.concept.name for pair in pairs]
