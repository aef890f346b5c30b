"""Latents that the teacher draws from prompts, once for each prompt and seed: no pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from leansd.anatomy.fingerprint import fingerprint_module
from leansd.errors import LeansdError
from leansd.incubation.data.cached_source import make_generator
from leansd.incubation.data.encoding import has_sizes, make_time_ids
from leansd.incubation.data.sample_cache import Latents
from leansd.incubation.data.samples import Flaw, Sample, digest
from leansd.runtime.samplers import make_scheduler

ROWS = 256
"""Drawings that are one shard."""


@dataclass(frozen=True)
class DrawingConfig:
    """How the teacher draws."""

    resolution: int
    """The side of the picture, in pixels."""
    steps: int = 25
    guidance: float = 7.5
    sampler: str = "dpm++2m"
    """A name of `leansd.runtime.samplers`."""


@dataclass(frozen=True)
class PromptShard:
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


def list_prompts(
    prompts: Sequence[str], *, each: int = 1, seed: int = 0, rows: int = ROWS
) -> list[PromptShard]:
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
        PromptShard(
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
        # utf-8-sig: editors on Windows begin a file with a mark that is no part of the prompt.
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LeansdError(f"cannot read prompts from {path}: {error}") from error
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise LeansdError(f"no prompts in {path}: write one a line")
    return prompts


class TeacherSampler:
    """Draws latents with the teacher, each from noise of its own prompt and seed.

    But for rounding, it does not matter what is drawn beside it.
    """

    def __init__(self, pipe: Any, config: DrawingConfig, batch: int = 8) -> None:
        """
        Args:
            batch: drawings at once.
        """
        self.pipe, self.config, self.batch = pipe, config, batch
        self.scheduler = make_scheduler(pipe, config.sampler)

    def describe(self) -> dict[str, Any]:
        unet = fingerprint_module(self.pipe.unet)
        # Not diffusers' own notes: the order of one is another in every process.
        config = {k: v for k, v in self.scheduler.config.items() if not k.startswith("_")}
        scheduler = digest({"config": str(sorted(config.items()))})
        return {"latents": "drawn", "unet": unet, "schedule": scheduler, **asdict(self.config)}

    def encode(self, samples: Sequence[Sample[int]]) -> list[Latents | Flaw]:
        """The last latents of each run."""
        side = self.config.resolution
        with _with_scheduler(self.pipe, self.scheduler):
            drawn = self.pipe(
                prompt=[sample.captions[0] for sample in samples],
                generator=[make_generator("draw", s.content, s.captions[0]) for s in samples],
                num_inference_steps=self.config.steps,
                guidance_scale=self.config.guidance,
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
def _with_scheduler(pipe: Any, scheduler: Any) -> Iterator[None]:
    own = pipe.scheduler
    pipe.scheduler = scheduler
    try:
        yield
    finally:
        pipe.scheduler = own
