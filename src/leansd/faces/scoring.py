"""Pictures in the eyes of a CLIP: the one that a model carries, or one that the user names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL.Image import Image

from leansd.evaluation.quality import Embedder, open_clip
from leansd.loading import EMBEDDED, locate, silent_loading

Scorer = Callable[[Sequence[Image], Sequence[str]], Sequence[float]]


def find_scorer(model: str | Path) -> Scorer | None:
    """A function from pictures and prompts to scores, where the model's folder has a `clip`."""
    folder = _find_own_clip(model)
    if folder is None:
        return None
    from leansd.emoji.clip import clip_score, load_clip
    from leansd.evaluation.fidelity import as_batch

    clip, tokenizer = load_clip(folder)
    side = clip.config.vision_config.image_size

    def score(pictures: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        fitted = [picture.resize((side, side)) for picture in pictures]
        pixels = as_batch(fitted).mul(255).round().byte()
        return clip_score(clip, tokenizer, pixels, prompts)

    return score


def find_embedder(model: str | Path, clip: str | Path | None = None) -> Embedder | None:
    """The CLIP in the folder `clip`, or else the model's own; None where there is neither."""
    if clip is not None:
        return open_clip(clip)
    folder = _find_own_clip(model)
    if folder is None:
        return None
    from leansd.evaluation.extractors import NAME, open_own_clip

    with silent_loading():
        return open_own_clip(folder, NAME if str(model) == EMBEDDED else f"CLIP of {folder.name}")


def _find_own_clip(model: str | Path) -> Path | None:
    """The model's folder where it has a `clip`, as the embedded model does."""
    folder = locate(model)
    if isinstance(folder, Path) and (folder / "clip" / "config.json").is_file():
        return folder
    return None
