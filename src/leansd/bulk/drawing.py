"""Drawing one shard after the other with a pipeline that is opened once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from leansd.bulk.jobs import Job, Part
from leansd.bulk.rows import Row
from leansd.bulk.shards import Drawn, pack_shard
from leansd.errors import LeansdError
from leansd.loading import as_image_to_image, load, load_unet
from leansd.plans.document import PlanDocument, make_plan
from leansd.runtime import inherit
from leansd.runtime.samplers import name_sampler, set_sampler


class Drawer:
    """Draws the shards of one job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        if job.threads:
            torch.set_num_threads(job.threads)
        self.pipe: Any = load(job.model, device=job.device)
        self.pipe.set_progress_bar_config(disable=True)
        if job.sampler is not None:
            set_sampler(self.pipe, job.sampler)
        self.plan = None if job.plan is None else make_plan(PlanDocument.model_validate(job.plan))
        self.nets = {
            name: load_unet(folder, beside=self.pipe.unet) for name, folder in job.nets.items()
        }
        self._other: Any = None

    def draw(self, part: Part) -> bytes:
        """A whole shard as the bytes of its tar."""
        return pack_shard(self._draw_rows(part.rows))

    def _draw_rows(self, rows: Sequence[Row]) -> Iterator[Drawn]:
        """Every picture. Who shares a batch follows from the places of the rows in their shard."""
        for _, group in groupby(rows, key=self._tell_kind):
            alike = list(group)
            for begin in range(0, len(alike), self.job.batch):
                yield from self._draw_batch(alike[begin : begin + self.job.batch])

    def _tell_kind(self, row: Row) -> object:
        """What rows of one batch have in common."""
        return row.init_image is not None, row.strength, row.negative_prompt is None

    def _draw_batch(self, rows: Sequence[Row]) -> Iterator[Drawn]:
        job, pipe = self.job, self._pick_pipe(rows[0])
        seeds = [job.seed + row.number if row.seed is None else row.seed for row in rows]
        options: dict[str, Any] = {
            "prompt": [row.prompt for row in rows],
            "num_inference_steps": job.steps,
            "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        }
        if rows[0].negative_prompt is not None:
            options["negative_prompt"] = [row.negative_prompt for row in rows]
        if job.guidance is not None:
            options["guidance_scale"] = job.guidance
        if rows[0].init_image is not None:
            options["image"] = [self._open_picture(row) for row in rows]
            options["strength"] = rows[0].strength or job.strength
        elif job.size is not None:
            options |= dict(zip(("width", "height"), job.size, strict=True))
        following = nullcontext() if self.plan is None else inherit(pipe, self.plan, nets=self.nets)
        with torch.no_grad(), following:
            pictures = pipe(**options).images
        shared = {
            "model": job.model,
            "plan": self.plan.name if self.plan is not None else "full",
            "steps": job.steps,
            "sampler": name_sampler(pipe),
            "guidance": getattr(pipe, "guidance_scale", job.guidance),
        }
        for row, seed, picture in zip(rows, seeds, pictures, strict=True):
            facts = row.model_dump(exclude_none=True) | {"seed": seed} | shared
            yield Drawn(row.id, picture, facts)

    def _pick_pipe(self, row: Row) -> Any:
        if row.init_image is None:
            return self.pipe
        if self._other is None:
            self._other = as_image_to_image(self.pipe)
            self._other.set_progress_bar_config(disable=True)
        return self._other

    def _open_picture(self, row: Row) -> Image.Image:
        assert row.init_image is not None
        path = Path(self.job.home) / row.init_image
        try:
            with Image.open(path) as opened:
                picture = ImageOps.exif_transpose(opened).convert("RGB")
        except OSError as error:
            raise LeansdError(f"row {row.id}: cannot read {path}: {error}") from error
        return ImageOps.fit(picture, self.job.size or self._find_size())

    def _find_size(self) -> tuple[int, int]:
        side = self.pipe.unet.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        scale = self.pipe.vae_scale_factor
        return width * scale, height * scale
