"""Pictures drawn in batches by the stock pipeline, and the card's grid of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from leansd.core.devices import seed_generator
from leansd.files import write_file


def draw_captions(
    pipe: StableDiffusionPipeline,
    captions: Sequence[str],
    *,
    steps: int = 30,
    guidance: float = 7.5,
    seed: int = 0,
    batch: int = 20,
    on_batch: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Draw one picture a caption: uint8 (captions, 3, side, side).

    Caption number i always starts from seed + i, whatever the batch.
    """
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for start in range(0, len(captions), batch):
        part = list(captions[start : start + batch])
        generators = [seed_generator(seed + start + i) for i in range(len(part))]
        drawn = pipe(
            part,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="pt",
        ).images
        rows.append(drawn.float().cpu().mul(255).round().clamp(0, 255).to(torch.uint8))
        if on_batch:
            on_batch(len(part))
    return torch.cat(rows)


def paste_grid(pictures: torch.Tensor, columns: int, gap: int = 2) -> Image.Image:
    """Paste uint8 pictures (count, 3, side, side) into one, row by row."""
    count, _, height, width = pictures.shape
    rows = -(-count // columns)
    size = (columns * (width + gap) + gap, rows * (height + gap) + gap)
    sheet = Image.new("RGB", size, (225, 225, 225))
    for place, picture in enumerate(pictures):
        row, column = divmod(place, columns)
        tile = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
        sheet.paste(tile, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    buffer = BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    write_file(path, buffer.getvalue())
