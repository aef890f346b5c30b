"""The kinds of data that a recipe can name, their options, and how each becomes a source.

A new kind is a class here, and an entry of `KINDS`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from leansd.errors import LeansdError
from leansd.incubation.data.batches import Conditioning, DataSource, PairedSource, RandomLatents
from leansd.incubation.data.cached_source import CachedSource, Chances
from leansd.incubation.data.encoding import (
    PictureEncoder,
    TeacherSampler,
    TextEncoder,
    embed,
    has_sizes,
    make_time_ids,
)
from leansd.incubation.data.filling import Dataset, FillReporter
from leansd.incubation.data.sample_cache import Cache
from leansd.incubation.data.samples import (
    Shard,
    list_folder,
    list_prompts,
    list_tars,
    read_prompts,
)
from leansd.incubation.recipe import DataConfig
from leansd.text import explain_validation, suggest_name

CACHE = "cache"
Found: TypeAlias = tuple[Sequence[Shard], PictureEncoder | TeacherSampler]


@dataclass(frozen=True)
class DataContext:
    """What a source is opened with besides its options."""

    pipe: Any
    """The teacher's pipeline: its VAE, text encoders and sampler."""
    folder: Path
    """The run's, for what has no other place."""
    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = lambda: None
    """For all processes."""
    note: Callable[[str], None] = lambda message: None


class RandomData(BaseModel):
    """Normal latents of the UNet's size under the pipeline's own conditions for some prompts."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["random"]
    prompts: Annotated[tuple[str, ...], Field(min_length=1)]

    @torch.no_grad()
    def open(self, context: DataContext) -> RandomLatents:
        """The source itself: there is nothing to keep."""
        pipe, config = context.pipe, context.pipe.unet.config
        texts, empty = (embed(pipe, list(each)).float() for each in (self.prompts, [""]))
        side = config.sample_size
        added = dict(texts.added)
        if has_sizes(pipe):
            pixels = side * pipe.vae_scale_factor
            sizes = make_time_ids((pixels, pixels), (0, 0), pixels)
            added["time_ids"] = sizes.repeat(len(self.prompts), 1)
        shape = (config.in_channels, side, side)
        return RandomLatents(shape, Conditioning(texts.text, added), empty)


class CachedData(Chances):
    """What data that are encoded once share."""

    resolution: PositiveInt | None = None
    """The side of the pictures, in pixels; by default the UNet's own."""
    batch: PositiveInt = 8
    """Samples that are encoded or drawn at once."""
    cache: Path | None = None
    """Where encoded samples are kept, for runs to share; by default in the run's folder."""
    precision: Literal["float16", "float32"] = "float16"
    """Of what is kept."""

    @abstractmethod
    def find(self, pipe: Any, resolution: int) -> Found:
        """The shards that are named, and what encodes them."""

    def prepare(self, pipe: Any, folder: Path) -> Dataset:
        """Find the data and their cache; nothing is encoded yet.

        Args:
            pipe: its autoencoder and text encoder make latents and conditions; with drawn data
                it draws them too.
            folder: where caches are kept, unless the options say.

        Raises:
            LeansdError: there are no data, or the cache is another's.
        """
        config = pipe.unet.config
        side = self.resolution or config.sample_size * pipe.vae_scale_factor
        shards, encoder = self.find(pipe, side)
        texts = TextEncoder(pipe)
        facts = encoder.describe() | texts.describe()
        cache = Cache(self.cache or folder, facts, getattr(torch, self.precision))
        return Dataset(cache, shards, encoder, texts, self)

    def open(self, context: DataContext) -> CachedSource:
        """Encode what is not in the cache yet, each process its share, and open it."""
        dataset = self.prepare(context.pipe, context.folder / CACHE)
        report = FillReporter(context.note)
        dataset.fill(rank=context.rank, world=context.world, on_progress=report)
        context.wait()
        return dataset.open()


class PictureData(CachedData):
    """Pictures with captions, in tar shards or in an imagefolder."""

    kind: Literal["shards", "folder"]
    path: str
    """Where they are."""
    caption: str | None = None
    """Where a sample's captions are, see `list_tars` and `list_folder`."""
    flip: bool = False
    """Keep the mirrored pictures too, and draw one of the two each time."""

    def find(self, pipe: Any, resolution: int) -> Found:
        list_shards = {"shards": list_tars, "folder": list_folder}[self.kind]
        places = (self.path,) if self.caption is None else (self.path, self.caption)
        encoder = PictureEncoder(pipe, resolution, flip=self.flip, batch=self.batch)
        return list_shards(*places), encoder


class DrawnData(CachedData):
    """No pictures: latents drawn from prompts, a list or a file with one a line."""

    kind: Literal["drawn"]
    prompts: Path | tuple[str, ...]
    each: PositiveInt = 1
    seed: int = 0
    steps: PositiveInt = 25
    guidance: float = 7.5
    sampler: str = "dpm++2m"

    def find(self, pipe: Any, resolution: int) -> Found:
        wanted = self.prompts
        prompts = read_prompts(wanted) if isinstance(wanted, Path) else wanted
        drawing = {"steps": self.steps, "guidance": self.guidance, "sampler": self.sampler}
        sampler = TeacherSampler(pipe, resolution, **drawing, batch=self.batch)
        return list_prompts(prompts, each=self.each, seed=self.seed), sampler


KINDS: Mapping[str, type[RandomData] | type[CachedData]] = {
    "random": RandomData,
    "drawn": DrawnData,
    "folder": PictureData,
    "shards": PictureData,
}


def read_options(config: DataConfig) -> RandomData | CachedData:
    """The options of a recipe's data.

    Raises:
        LeansdError: there is no such kind, or an option is none; the message names it.
    """
    if config.kind not in KINDS:
        raise LeansdError(f"data: no kind {config.kind!r}{suggest_name(config.kind, KINDS)}")
    kind = KINDS[config.kind]
    for name in config.options:
        if name not in kind.model_fields:
            known = [each for each in kind.model_fields if each != "kind"]
            raise LeansdError(
                f"data: {config.kind} has no option {name!r}{suggest_name(name, known)}"
            )
    try:
        return kind.model_validate({"kind": config.kind, **config.options})
    except ValidationError as error:
        raise LeansdError(f"data.{explain_validation(error)}") from None


def open_source(config: DataConfig, context: DataContext) -> DataSource:
    """The source that a recipe names, filled where it is cached.

    Raises:
        LeansdError: there are no data, or an option is none; the message names it.
    """
    source = read_options(config).open(context)
    return PairedSource(source) if config.paired else source
