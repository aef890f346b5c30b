"""The CLIP that the embedded model carries: small, trained on emoji, and always there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from leansd.emoji.location import model_folder
from leansd.evaluation.extractors import Extractor, Look, look_through
from leansd.evaluation.quality import Embedder
from leansd.loading import silent_loading

NAME = "tiny CLIP"


def open_own_clip(folder: Path, name: str) -> Embedder:
    """The CLIP in a model's folder, as the embedded model has one."""
    from leansd.emoji.clip import load_clip, normalize_floats, tokenize

    own, tokenizer = load_clip(folder)
    side: Any = own.vision_model.config.image_size
    return Embedder(name, own, side, normalize_floats, lambda prompts: tokenize(tokenizer, prompts))


def open_tiny_clip(folder: Path, device: torch.device) -> Look:
    """The tiny CLIP on a device, from its `clip` folder."""
    with silent_loading():
        embedder = open_own_clip(folder.parent, NAME)
    return look_through(embedder, device)


TINY_CLIP = Extractor(
    "the embedded model",
    lambda: model_folder() / "clip",
    open_tiny_clip,
    lambda _, __: NAME,
    form="folder",
)
