"""The numbers of the model card: reconstruction, caption retrieval, Fréchet distance."""

from __future__ import annotations

import datetime
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPModel, CLIPTokenizer

from leansd.emoji.autoencoder import measure_psnr
from leansd.emoji.card import GRID_PROMPTS
from leansd.emoji.clip import embed_pixels, embed_tokens, normalize_pixels, tokenize
from leansd.emoji.data import STYLES, Pair, write_captions
from leansd.emoji.drawing import draw_captions
from leansd.emoji.recipe import Pictures
from leansd.version import __version__

CHOICES = 100  # captions a picture is matched against
GUIDANCE = 7.5  # the pipeline's own default


@torch.no_grad()
def embed_images(clip: CLIPModel, pictures: torch.Tensor, batch: int = 100) -> torch.Tensor:
    """Embed uint8 pictures (count, 3, side, side) as unit vectors (count, width)."""
    device = next(clip.parameters()).device
    parts = [embed_pixels(clip, normalize_pixels(p.to(device))) for p in pictures.split(batch)]
    return torch.cat(parts).cpu()


@torch.no_grad()
def embed_texts(clip: CLIPModel, tokenizer: CLIPTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Embed captions as unit vectors (captions, width)."""
    device = next(clip.parameters()).device
    return embed_tokens(clip, tokenize(tokenizer, texts).to(device)).cpu()


def clip_score(
    clip: CLIPModel, tokenizer: CLIPTokenizer, pictures: torch.Tensor, texts: Sequence[str]
) -> list[float]:
    """Return 100 x cosine similarity of each uint8 picture (count, 3, side, side) and its text."""
    likeness = embed_images(clip, pictures) * embed_texts(clip, tokenizer, texts)
    return (100 * likeness.sum(1)).tolist()


def rank_captions(images: torch.Tensor, texts: torch.Tensor, choices: int = CHOICES) -> list[int]:
    """Return the rank, 0 is best, of each picture's own caption among `choices` captions.

    Both are unit vectors (count, width); rows are matched within groups of `choices` rows.
    """
    ranks: list[int] = []
    for some, own in zip(images.split(choices), texts.split(choices), strict=True):
        likeness = some @ own.T
        ranks += (likeness > likeness.diagonal()[:, None]).sum(1).tolist()
    return ranks


def measure_frechet(clip: CLIPModel, real: torch.Tensor, other: torch.Tensor) -> float:
    """Return the Fréchet distance of two uint8 picture sets (count, 3, side, side)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Features(clip))
    for pictures, is_real in ((real, True), (other, False)):
        for part in pictures.split(100):
            metric.update(part, real=is_real)
    return float(metric.compute())


def choose_pairs(pairs: Sequence[Pair], count: int, seed: int) -> list[int]:
    """Return the places of `count` pairs drawn without looking at them."""
    return sorted(random.Random(seed).sample(range(len(pairs)), min(count, len(pairs))))


def evaluate_model(
    pipe: StableDiffusionPipeline,
    clip: CLIPModel,
    pictures: Pictures,
    *,
    count: int = 200,
    steps: int = 30,
    guidance: float = GUIDANCE,
    seed: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Measure the model on `count` training captions and `count` held-out pairs."""
    decibels = measure_psnr(pipe.vae, pictures.held_out)
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": read_versions(),
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "scheduler": type(pipe.scheduler).__name__,
        "choices": CHOICES,
        "pictures": {
            "train": len(pictures.split.train),
            "held_out": len(pictures.split.held_out),
            "emojis": len({p.emoji for p in (*pictures.split.train, *pictures.split.held_out)}),
        },
        "grid_held_out": _find_held_out(pictures, GRID_PROMPTS),
        "vae_psnr": {
            "held_out_mean": round(statistics.fmean(decibels), 2),
            "held_out_median": round(statistics.median(decibels), 2),
            "held_out_worst": round(min(decibels), 2),
        },
        # How far apart two sets of real pictures are: what the distances below can be read against.
        "frechet_real_held_out_to_real_train": round(
            measure_frechet(clip, pictures.train, pictures.held_out), 3
        ),
    }
    sets = (
        ("train", pictures.split.train, pictures.train),
        ("held_out", pictures.split.held_out, pictures.held_out),
    )
    for name, pairs, pixels in sets:
        places = choose_pairs(pairs, count, seed)
        chosen = [pairs[place] for place in places]
        captions = [write_captions(pair)[0] for pair in chosen]
        # Shuffled, or each group of choices would be neighbours in code: look-alikes.
        order = random.Random(seed + 1).sample(range(len(chosen)), len(chosen))
        chosen, captions = [chosen[i] for i in order], [captions[i] for i in order]
        real = pixels[[places[i] for i in order]]
        drawn = draw_captions(
            pipe, captions, steps=steps, guidance=guidance, seed=seed, on_batch=on_batch
        )
        texts = embed_texts(clip, pipe.tokenizer, captions)
        result[name] = {
            "count": len(chosen),
            "generated": _summarize(embed_images(clip, drawn), texts, chosen),
            "real": _summarize(embed_images(clip, real), texts, chosen),
            "frechet_to_real_train": round(measure_frechet(clip, pictures.train, drawn), 3),
        }
        ceiling = result[name]["real"]["top1"]
        result[name]["top1_of_ceiling"] = round(
            result[name]["generated"]["top1"] / max(ceiling, 1e-9), 3
        )
    return result


def read_versions() -> dict[str, str]:
    """Return the versions a result depends on."""
    from importlib.metadata import version

    names = ("torch", "diffusers", "transformers", "torchmetrics")
    return {"leansd": __version__, **{name: version(name) for name in names}}


def _summarize(images: torch.Tensor, texts: torch.Tensor, pairs: Sequence[Pair]) -> dict[str, Any]:
    ranks = rank_captions(images, texts)
    scores = (100 * (images * texts).sum(1)).tolist()
    summary: dict[str, Any] = {
        "top1": _share(ranks, 1),
        "top5": _share(ranks, 5),
        "clip_score": round(statistics.fmean(scores), 2),
    }
    summary["by_style"] = {
        style: {"count": len(own), "top1": _share(own, 1), "top5": _share(own, 5)}
        for style in STYLES
        if (own := [r for r, pair in zip(ranks, pairs, strict=True) if pair.style == style])
    }
    return summary


def _find_held_out(pictures: Pictures, prompts: Sequence[str]) -> list[str]:
    captions = {write_captions(pair)[0] for pair in pictures.split.held_out}
    return [prompt for prompt in prompts if prompt in captions]


def _share(ranks: Sequence[int], best: int) -> float:
    return round(sum(rank < best for rank in ranks) / len(ranks), 3)


class _Features(torch.nn.Module):
    """The vision tower's pooled features of uint8 pictures, as torchmetrics wants them."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip
        self.num_features = clip.config.vision_config.hidden_size

    @torch.no_grad()
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """(batch, 3, side, side) uint8 to (batch, width)."""
        device = next(self.clip.parameters()).device
        pixels = normalize_pixels(pictures.to(device))
        return self.clip.vision_model(pixel_values=pixels).pooler_output.cpu()
