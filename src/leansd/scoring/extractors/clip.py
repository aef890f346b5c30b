"""A CLIP of the user's, in the layout of transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from leansd.evaluation.quality import (
    Embedder,
    clip_score,
    embed_pictures,
    embed_prompts,
    open_clip,
)
from leansd.loading import silent_loading
from leansd.scoring.extractors.extractor import Extractor, Look
from leansd.scoring.samples import Shown

USUAL = "openai/clip-vit-base-patch16"


def find_folder() -> Path | None:
    """The usual CLIP, where the hub's cache on this machine has it."""
    found = try_to_load_from_cache(USUAL, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def look_through(embedder: Embedder, device: torch.device) -> Look:
    """Pooled features [n, width] of pictures, and their scores [n]: NaN without a prompt."""
    embedder.clip.to(device)

    def look(shown: Shown) -> dict[str, Tensor]:
        seen = embed_pictures(embedder, shown.pictures)
        places = [place for place, prompt in enumerate(shown.prompts) if prompt is not None]
        scores = torch.full((len(seen.vectors),), torch.nan)
        if places:
            vectors = embed_prompts(embedder, [str(shown.prompts[place]) for place in places])
            scores[places] = clip_score(seen.vectors[places], vectors)
        return {"pooled": seen.features, "scores": scores}

    return look


def open_folder(folder: Path, device: torch.device) -> Look:
    """A CLIP on a device."""
    with silent_loading():
        embedder = open_clip(folder)
    return look_through(embedder, device)


CLIP = Extractor(
    f"a CLIPModel of transformers with its tokenizer, such as a copy of https://hf.co/{USUAL}",
    find_folder,
    open_folder,
    lambda folder, _: folder.resolve().name if folder.parent.name != "snapshots" else USUAL,
    form="folder",
)
