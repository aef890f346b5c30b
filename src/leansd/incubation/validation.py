"""Pictures of teacher and student from the same seeds, side by side while a stage is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from leansd.incubation.recipe import ValidationSettings


@dataclass(frozen=True)
class Comparing:
    """Draws a grid: prompts across, the teacher above the student."""

    pipe: Any
    teacher: UNet2DConditionModel
    student: UNet2DConditionModel
    settings: ValidationSettings
    folder: Path

    def __call__(self, step: int) -> None:
        file = self.folder / "validation" / f"step-{step:08d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        paste_grid([self.draw(self.teacher), self.draw(self.student)]).save(file)

    @torch.no_grad()
    def draw(self, unet: UNet2DConditionModel) -> list[Image.Image]:
        """The prompts' pictures, each from a seed of its own."""
        before, was_training = self.pipe.unet, unet.training
        is_short = unet.dtype != torch.float32
        self.pipe.register_modules(unet=unet.eval())
        try:
            with torch.autocast(unet.device.type, unet.dtype, enabled=is_short):
                return self._draw_prompts()
        finally:
            unet.train(was_training)
            self.pipe.register_modules(unet=before)

    def _draw_prompts(self) -> list[Image.Image]:
        return [
            self.pipe(
                prompt,
                num_inference_steps=self.settings.steps,
                guidance_scale=self.settings.guidance,
                generator=torch.Generator().manual_seed(self.settings.seed + number),
            ).images[0]
            for number, prompt in enumerate(self.settings.prompts)
        ]


def paste_grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Rows of pictures of one size as one picture."""
    width, height = rows[0][0].size
    grid = Image.new("RGB", (width * len(rows[0]), height * len(rows)))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            grid.paste(picture, (x * width, y * height))
    return grid
