"""The kinds of data that a recipe can name, their options, and how each becomes a source.

A new kind is a class here, and an entry of `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import torch
from diffusers import DiffusionPipeline
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from leansd.errors import LeansdError
from leansd.incubation.data.batches import DataSource, PairedSource
from leansd.incubation.data.cached_source import CachedSource, Chances
from leansd.incubation.data.encoding import Encoder, PictureEncoder, TextEncoder
from leansd.incubation.data.filling import FillReporter, OnFillProgress, fill
from leansd.incubation.data.random_latents import RandomLatents, make_random_latents
from leansd.incubation.data.sample_cache import Cache
from leansd.incubation.data.samples import Shard, list_folder, list_tars
from leansd.incubation.data.teacher_samples import (
    DrawingConfig,
    TeacherSampler,
    list_prompts,
    read_prompts,
)
from leansd.incubation.recipe import DataConfig
from leansd.text import explain_validation, suggest_name

CACHE = "cache"
Share: TypeAlias = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class DataContext:
    """What a source is opened with besides its options."""

    pipe: Any
    """The teacher's pipeline: its VAE, text encoders and sampler."""
    folder: Path
    """The run's, for what has no other place."""
    device: torch.device
    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = lambda: None
    """For all processes."""
    note: Callable[[str], None] = lambda message: None


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RandomData(_Options):
    """Normal latents under some prompts."""

    kind: Literal["random"]
    prompts: Annotated[tuple[str, ...], Field(min_length=1)]

    def open(self, context: DataContext) -> RandomLatents:
        """The source itself: there is nothing to keep."""
        return make_random_latents(context.pipe, self.prompts)


class _CachedData(_Options):
    """What data that are encoded once share."""

    resolution: PositiveInt | None = None
    """The side of the pictures, in pixels; by default the UNet's own."""
    batch: PositiveInt = 8
    """Samples that are encoded or drawn at once."""
    cache: Path | None = None
    """Where encoded samples are kept, for runs to share; by default in the run's folder."""
    precision: Literal["float16", "float32"] = "float16"
    """Of what is kept."""
    empty: Share = 0.1
    other: Share = 0.0
    window: PositiveInt = 8192
    """See `Chances`, as the two before it."""

    def find_resolution(self, pipe: DiffusionPipeline) -> int:
        """The side of the pictures, in pixels."""
        return self.resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor

    def find_shards(self, pipe: DiffusionPipeline) -> tuple[Sequence[Shard[Any]], Encoder[Any]]:
        """The shards that are named, and what encodes them."""
        raise NotImplementedError

    def open(self, context: DataContext) -> CachedSource:
        """Encode what is not in the cache yet, each process its share, and open it."""
        dataset = prepare_dataset(self, context.pipe, context.folder / CACHE)
        report = FillReporter(context.note)
        dataset.fill(rank=context.rank, world=context.world, on_progress=report)
        context.wait()
        return dataset.open()


class _PictureData(_CachedData):
    """What data with pictures share."""

    path: str
    """Where they are."""
    flip: bool = False
    """Keep the mirrored pictures too, and draw one of the two each time."""

    def make_encoder(self, pipe: DiffusionPipeline) -> PictureEncoder:
        """What encodes the pictures."""
        return PictureEncoder(pipe, self.find_resolution(pipe), flip=self.flip, batch=self.batch)


class ShardData(_PictureData):
    """Tar shards; `caption` is an ending of their files, or an entry of their JSON."""

    kind: Literal["shards"]
    caption: str = "txt"

    def find_shards(self, pipe: DiffusionPipeline) -> tuple[Sequence[Shard[Any]], Encoder[Any]]:
        return list_tars(self.path, self.caption), self.make_encoder(pipe)


class FolderData(_PictureData):
    """An imagefolder; `caption` is the entry of its metadata."""

    kind: Literal["folder"]
    caption: str = "text"

    def find_shards(self, pipe: DiffusionPipeline) -> tuple[Sequence[Shard[Any]], Encoder[Any]]:
        return list_folder(self.path, self.caption), self.make_encoder(pipe)


class DrawnData(_CachedData):
    """No pictures: latents drawn from prompts, a list or a file with one a line."""

    kind: Literal["drawn"]
    prompts: Path | tuple[str, ...]
    each: PositiveInt = 1
    seed: int = 0
    steps: PositiveInt = 25
    guidance: float = 7.5
    sampler: str = "dpm++2m"

    def find_shards(self, pipe: DiffusionPipeline) -> tuple[Sequence[Shard[Any]], Encoder[Any]]:
        side = self.find_resolution(pipe)
        config = DrawingConfig(side, self.steps, self.guidance, self.sampler)
        wanted = self.prompts
        prompts = read_prompts(wanted) if isinstance(wanted, Path) else wanted
        shards = list_prompts(prompts, each=self.each, seed=self.seed)
        return shards, TeacherSampler(pipe, config, self.batch)


KINDS: Mapping[str, type[RandomData] | type[_CachedData]] = {
    "random": RandomData,
    "drawn": DrawnData,
    "folder": FolderData,
    "shards": ShardData,
}


def read_options(config: DataConfig) -> RandomData | _CachedData:
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
    """The source that a recipe names.

    Raises:
        LeansdError: there are no data, or an option is none; the message names it.
    """
    source = read_options(config).open(context)
    return PairedSource(source) if config.paired else source


@dataclass(frozen=True)
class Dataset:
    """Samples, where they are kept, and what encodes those that are not yet."""

    shards: Sequence[Shard[Any]]
    encoder: Encoder[Any]
    texts: TextEncoder
    cache: Cache
    chances: Chances

    def fill(
        self, *, rank: int = 0, world: int = 1, on_progress: OnFillProgress | None = None
    ) -> None:
        """Encode this rank's share of what is not in the cache; see `fill`."""
        fill(
            self.cache,
            self.shards,
            self.encoder,
            self.texts,
            rank=rank,
            world=world,
            on_progress=on_progress,
        )

    def open(self) -> CachedSource:
        """The samples to train on, once every rank has filled its share."""
        return CachedSource(self.cache, self.shards, self.chances)


def prepare_dataset(options: _CachedData, pipe: DiffusionPipeline, folder: str | Path) -> Dataset:
    """Find the data and their cache; nothing is encoded yet.

    Args:
        pipe: the teacher's pipeline, whose autoencoder and text encoder make latents and
            conditions; with drawn data it draws them too.
        folder: where caches are kept, unless the options say.

    Raises:
        LeansdError: there are no data, or the cache is another's.
    """
    shards, encoder = options.find_shards(pipe)
    texts = TextEncoder(pipe)
    dtype = getattr(torch, options.precision)
    cache = Cache(options.cache or folder, encoder.describe() | texts.describe(), dtype)
    chances = Chances(options.empty, options.other, options.window)
    return Dataset(shards, encoder, texts, cache, chances)
