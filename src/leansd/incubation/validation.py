"""Pictures of teacher and student from the same seeds, side by side while a stage is trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from leansd.evaluation.fidelity import psnr
from leansd.incubation.curves import FILE, Curves
from leansd.incubation.recipe import ValidationSettings

FOLDER = "validation"
"""Of a stage: grids, and a log of how close the pictures are."""
_NAME = re.compile(r"step-(\d+)\.png")


@dataclass(frozen=True)
class Comparing:
    """Draws a grid: prompts across, the teacher above the student; and logs how close they are."""

    pipe: Any
    teacher: UNet2DConditionModel
    student: UNet2DConditionModel
    settings: ValidationSettings
    folder: Path

    def __call__(self, step: int) -> None:
        file = self.folder / FOLDER / f"step-{step:08d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        teacher, student = self.draw(self.teacher), self.draw(self.student)
        paste_grid([teacher, student]).save(file)
        close = float(psnr(student, teacher).mean())
        Curves(file.with_name(FILE)).add({"step": step, "psnr": close})

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


def list_looks(folder: Path) -> dict[int, Path]:
    """The grids that were drawn, by step."""
    found = ((_NAME.fullmatch(path.name), path) for path in sorted(folder.glob("step-*.png")))
    return {int(match[1]): path for match, path in found if match is not None}


def paste_grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Rows of pictures of one size as one picture."""
    width, height = rows[0][0].size
    grid = Image.new("RGB", (width * len(rows[0]), height * len(rows)))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            grid.paste(picture, (x * width, y * height))
    return grid
