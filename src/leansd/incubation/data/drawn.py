"""No pictures at all: latents that the teacher draws from prompts, once each prompt and seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from leansd.anatomy.fingerprint import fingerprint_module
from leansd.errors import LeansdError
from leansd.incubation.data.encoding import has_sizes, make_time_ids
from leansd.incubation.data.order import make_generator
from leansd.incubation.data.parts import Latents
from leansd.incubation.data.samples import Flaw, Sample, digest
from leansd.runtime.samplers import make_scheduler

ROWS = 256
"""Drawings that are one shard."""


@dataclass(frozen=True)
class Drawing:
    """How the teacher draws.

    Attributes:
        resolution: the side of the picture, in pixels.
        sampler: a name of `leansd.runtime.samplers`.
    """

    resolution: int
    steps: int = 25
    guidance: float = 7.5
    sampler: str = "dpm++2m"


@dataclass(frozen=True)
class DrawnShard:
    """Some prompts, each with the seeds that it is drawn from."""

    name: str
    wishes: tuple[tuple[str, int], ...]
    """Prompt and seed of each drawing."""

    @property
    def identity(self) -> str:
        return digest({"drawn": self.wishes})

    def read(self) -> Iterator[Sample[int] | Flaw]:
        """Every drawing that is to be made."""
        for number, (prompt, seed) in enumerate(self.wishes):
            yield Sample(f"{self.name}-{number:05d}", (prompt,), seed)


def list_drawings(
    prompts: Sequence[str], *, each: int = 1, seed: int = 0, rows: int = ROWS
) -> list[DrawnShard]:
    """The drawings of all prompts, cut into shards.

    Args:
        each: drawings of a prompt, from seeds `seed` on. More of them leave what there is: all
            prompts are drawn from one seed before the next.
        rows: drawings of a shard.

    Raises:
        LeansdError: there are no prompts.
    """
    if not prompts or each < 1:
        raise LeansdError("nothing to draw: give prompts, and 1 or more drawings of each")
    return [
        DrawnShard(
            f"drawn-{seed + turn}-{begin // rows:05d}", tuple((p, seed + turn) for p in some)
        )
        for turn in range(each)
        for begin in range(0, len(prompts), rows)
        for some in [prompts[begin : begin + rows]]
    ]


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file, one a line; each once.

    Raises:
        LeansdError: it cannot be read, or has none.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LeansdError(f"cannot read prompts from {path}: {error}") from error
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise LeansdError(f"no prompts in {path}: write one a line")
    return prompts


class Drawer:
    """Draws latents with the teacher.

    Each starts from noise of its own prompt and seed; but for rounding, it does not matter what is
    drawn beside it.

    Args:
        batch: drawings at once.
    """

    def __init__(self, pipe: DiffusionPipeline, drawing: Drawing, batch: int = 8) -> None:
        self.pipe, self.drawing, self.batch = pipe, drawing, batch
        self.scheduler = make_scheduler(pipe, drawing.sampler)

    def describe(self) -> dict[str, Any]:
        unet = fingerprint_module(self.pipe.unet)
        scheduler = digest({"config": str(sorted(self.scheduler.config.items()))})
        return {"latents": "drawn", "unet": unet, "schedule": scheduler, **asdict(self.drawing)}

    def encode(self, samples: Sequence[Sample[int]]) -> list[Latents | Flaw]:
        """The last latents of each run."""
        side = self.drawing.resolution
        with _with_scheduler(self.pipe, self.scheduler):
            drawn = self.pipe(
                prompt=[sample.captions[0] for sample in samples],
                generator=[make_generator("draw", s.content, s.captions[0]) for s in samples],
                num_inference_steps=self.drawing.steps,
                guidance_scale=self.drawing.guidance,
                height=side,
                width=side,
                output_type="latent",
            ).images
        sizes = {"time_ids": make_time_ids((side, side), (0, 0), side)}
        added: Mapping[str, Any] = sizes if has_sizes(self.pipe) else {}
        return [
            Latents(latents[None], None, added)
            if latents.isfinite().all()
            else Flaw(sample.key, "its latents are not finite")
            for sample, latents in zip(samples, drawn.float().cpu(), strict=True)
        ]


@contextmanager
def _with_scheduler(pipe: DiffusionPipeline, scheduler: Any) -> Iterator[None]:
    own = pipe.scheduler
    pipe.scheduler = scheduler
    try:
        yield
    finally:
        pipe.scheduler = own
