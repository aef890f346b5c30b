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

from leansd.drawing import seed_generator
from leansd.errors import LeansdError
from leansd.evaluation.fidelity import psnr
from leansd.incubation.recipe import ValidationSettings

ROWS = 2
"""Of a grid: the teacher's pictures above the student's."""
_NAME = re.compile(r"step-(\d+)\.png")


@dataclass(frozen=True)
class Validation:
    """Draws the prompts of a recipe with teacher and student, on the teacher's pipeline."""

    pipe: Any
    teacher: UNet2DConditionModel
    student: UNet2DConditionModel
    settings: ValidationSettings

    def draw_grid(self, path: Path) -> float:
        """Write a grid, prompts across and the teacher above the student.

        Returns:
            the mean PSNR of the student's pictures to the teacher's, in dB.

        Raises:
            LeansdError: the grid cannot be written.
        """
        teacher, student = self.draw(self.teacher), self.draw(self.student)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            paste_grid([teacher, student]).save(path)
        except OSError as error:
            raise LeansdError(f"cannot write {path}: {error.strerror or error}") from error
        return float(psnr(student, teacher).mean())

    @torch.no_grad()
    def draw(self, unet: UNet2DConditionModel) -> list[Image.Image]:
        """The prompts' pictures, each from a seed of its own."""
        before, was_training = self.pipe.unet, unet.training
        # Text and latents come in the pipeline's precision, which need not be the UNet's.
        dtype = self.pipe.vae.dtype if unet.dtype == torch.float32 else unet.dtype
        self.pipe.register_modules(unet=unet.eval())
        try:
            with torch.autocast(unet.device.type, dtype, enabled=dtype != torch.float32):
                return [
                    self.pipe(
                        prompt,
                        num_inference_steps=self.settings.steps,
                        guidance_scale=self.settings.guidance,
                        generator=seed_generator(self.settings.seed + number),
                    ).images[0]
                    for number, prompt in enumerate(self.settings.prompts)
                ]
        finally:
            unet.train(was_training)
            self.pipe.register_modules(unet=before)


def paste_grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Rows of pictures of one size as one picture."""
    width, height = rows[0][0].size
    grid = Image.new("RGB", (width * len(rows[0]), height * len(rows)))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            grid.paste(picture, (x * width, y * height))
    return grid


def read_grid(path: Path, columns: int) -> list[list[Image.Image]]:
    """The rows of pictures that a grid was pasted from."""
    with Image.open(path) as file:
        grid: Image.Image = file.convert("RGB")
    wide, tall = grid.width // columns, grid.height // ROWS
    return [
        [grid.crop((x * wide, y * tall, (x + 1) * wide, (y + 1) * tall)) for x in range(columns)]
        for y in range(ROWS)
    ]


def list_grids(folder: Path) -> dict[int, Path]:
    """The grids that were drawn, by step."""
    found = ((_NAME.fullmatch(path.name), path) for path in sorted(folder.glob("step-*.png")))
    return {int(match[1]): path for match, path in found if match is not None}
