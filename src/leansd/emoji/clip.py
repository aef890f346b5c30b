"""The tiny CLIP that the embedded model carries, and how pictures and captions reach it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import CLIPModel, CLIPTokenizer

MAX_TOKENS = 24
_MEAN, _STD = 0.75, 0.33  # of white-backed pictures, in [0, 1]


def load_clip(folder: Path) -> tuple[CLIPModel, CLIPTokenizer]:
    """Load the tiny CLIP and its tokenizer from a model folder, in float32."""
    clip = CLIPModel.from_pretrained(folder / "clip", dtype=torch.float32).eval()
    return clip, CLIPTokenizer.from_pretrained(folder / "tokenizer")


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> torch.Tensor:
    """Return token ids, (captions, 24), padded and cut as the pipeline does it."""
    batch = tokenizer(
        list(captions),
        padding="max_length",
        max_length=MAX_TOKENS,
        truncation=True,
        return_tensors="pt",
    )
    return batch.input_ids


def normalize_floats(pictures: torch.Tensor) -> torch.Tensor:
    """Map pictures (batch, 3, side, side) in [0, 1] to the vision tower's float range."""
    return pictures.sub(_MEAN).div(_STD)


@torch.no_grad()
def embed_images(clip: CLIPModel, pictures: torch.Tensor, batch: int = 100) -> torch.Tensor:
    """Embed uint8 pictures (count, 3, side, side) as unit vectors (count, width)."""
    device = next(clip.parameters()).device
    rows = []
    for part in pictures.split(batch):
        pixels = normalize_floats(part.to(device).float().div(255))
        pooled = clip.vision_model(pixel_values=pixels).pooler_output
        rows.append(F.normalize(clip.visual_projection(pooled), dim=-1))
    return torch.cat(rows).cpu()


@torch.no_grad()
def embed_texts(clip: CLIPModel, tokenizer: CLIPTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Embed captions as unit vectors (captions, width)."""
    device = next(clip.parameters()).device
    pooled = clip.text_model(input_ids=tokenize(tokenizer, texts).to(device)).pooler_output
    return F.normalize(clip.text_projection(pooled), dim=-1).cpu()


def clip_score(
    clip: CLIPModel, tokenizer: CLIPTokenizer, pictures: torch.Tensor, texts: Sequence[str]
) -> list[float]:
    """Return 100 x cosine similarity of each uint8 picture (count, 3, side, side) and its text."""
    likeness = embed_images(clip, pictures) * embed_texts(clip, tokenizer, texts)
    return (100 * likeness.sum(1)).tolist()
