"""Pictures opened for an extractor, those of one size together."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from leansd.errors import LeansdError
from leansd.scoring.reading import Sample


@dataclass(frozen=True)
class Shown:
    """Pictures of one size.

    Attributes:
        pictures: [n, 3, H, W], 8 bits.
        prompts: None for those that have none.
        others: what they are compared with, [n, 3, H, W], 8 bits.
    """

    pictures: Tensor
    prompts: tuple[str | None, ...]
    others: Tensor | None = None


@dataclass(frozen=True)
class _Opened:
    picture: Image.Image
    prompt: str | None
    other: Image.Image | None


def show_samples(samples: Sequence[Sample], batch: int, size: int | None) -> Iterator[Shown]:
    """Open pictures and put neighbours of one size together, in their order.

    Args:
        size: what the middle square of every picture is made, in pixels; None leaves them.

    Raises:
        LeansdError: one is no picture, or its partner is of another size.
    """
    opened = (_open(sample, size) for sample in samples)
    for _, group in groupby(opened, key=lambda each: each.picture.size):
        alike = list(group)
        for begin in range(0, len(alike), batch):
            some = alike[begin : begin + batch]
            others = [each.other for each in some if each.other is not None]
            yield Shown(
                _stack([each.picture for each in some]),
                tuple(each.prompt for each in some),
                _stack(others) if others else None,
            )


def open_picture(content: bytes, name: str) -> Image.Image:
    """A picture as it is seen.

    Raises:
        LeansdError: it is none.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise LeansdError(f"picture {name} cannot be opened: {error}; mend or remove it") from error


def find_prompt(facts: bytes | None, picture: Image.Image) -> str | None:
    """What a picture was drawn from: as a sidecar says, or else the picture itself."""
    if facts is None:
        text: Any = picture.info.get("prompt")
    else:
        said = facts.decode("utf-8", errors="replace").strip()
        try:
            found: Any = json.loads(said)
        except ValueError:
            found = said
        text = found.get("prompt", found.get("caption")) if isinstance(found, dict) else said
    return text if isinstance(text, str) and text else None


def _open(sample: Sample, size: int | None) -> _Opened:
    picture = open_picture(sample.picture, sample.id)
    other = open_picture(sample.other, f"beside {sample.id}") if sample.other is not None else None
    opened = _Opened(
        _fit(picture, size),
        find_prompt(sample.facts, picture),
        _fit(other, size) if other is not None else None,
    )
    if opened.other is not None and opened.other.size != opened.picture.size:
        raise LeansdError(
            f"picture {sample.id} is {opened.picture.size} and its partner {opened.other.size} "
            "pixels: give --resize N to compare both at N x N"
        )
    return opened


def _fit(picture: Image.Image, size: int | None) -> Image.Image:
    fitted = picture.convert("RGB")
    if size is None:
        return fitted
    return ImageOps.fit(fitted, (size, size), Image.Resampling.BICUBIC)


def _stack(pictures: Sequence[Image.Image]) -> Tensor:
    stacked = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()
