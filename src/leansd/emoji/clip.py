"""The tiny CLIP that the embedded model carries, and how pictures and captions reach it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
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
