"""The CLIP score of pictures, for models that carry a CLIP of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL.Image import Image

from leansd.loading import locate

Scorer = Callable[[Sequence[Image], Sequence[str]], Sequence[float]]


def find_scorer(model: str | Path) -> Scorer | None:
    """A function from pictures and prompts to scores, where the model's folder has a `clip`."""
    folder = locate(model)
    if not isinstance(folder, Path) or not (folder / "clip" / "config.json").is_file():
        return None
    from leansd.emoji.assembly import load_clip
    from leansd.emoji.evaluation import clip_score
    from leansd.measuring.fidelity import as_batch

    clip, tokenizer = load_clip(folder)
    side = clip.config.vision_config.image_size

    def score(pictures: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        fitted = [picture.resize((side, side)) for picture in pictures]
        pixels = as_batch(fitted).mul(255).round().byte()
        return clip_score(clip, tokenizer, pixels, prompts)

    return score
