"""Pictures beside those that they should equal, and what is between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image
from torch import Tensor

LOUDER = 4
"""Times that differences are amplified."""
DECIBELS = (
    "Decibels (dB) say how close pictures are to those of the reference: 6 more are half the "
    "error, and above about 40 differences are hard to see."
)
NOTE = f"A difference is amplified {LOUDER} times; grey is none."


def subtract_pictures(one: Image.Image, other: Image.Image, times: int = LOUDER) -> Image.Image:
    """How much lighter or darker one is than the other, on grey; what is too much is cut off."""
    ours, theirs = (np.asarray(each.convert("RGB"), dtype=np.int16) for each in (one, other))
    apart = np.clip((ours - theirs) * times + 128, 0, 255)
    return Image.fromarray(apart.astype(np.uint8))


def list_differences(
    full: Sequence[Image.Image], others: Mapping[str, Sequence[Image.Image]]
) -> dict[str, list[Image.Image]]:
    """Each of the others less the full run's, picture by picture."""
    return {
        name: [subtract_pictures(one, other) for one, other in zip(pictures, full, strict=True)]
        for name, pictures in others.items()
    }


def as_images(pictures: Tensor) -> list[Image.Image]:
    """8-bit pictures [n, 3, H, W] for a page."""
    return [Image.fromarray(each.permute(1, 2, 0).contiguous().numpy()) for each in pictures]
