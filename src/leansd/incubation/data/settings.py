"""What a recipe says about data, and what becomes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from leansd.incubation.data.cache import Cache
from leansd.incubation.data.cached import CachedSource, Chances
from leansd.incubation.data.drawn import Drawer, Drawing, list_drawings, read_prompts
from leansd.incubation.data.encoding import Encoder, PictureEncoder, TextEncoder
from leansd.incubation.data.filling import OnProgress, fill
from leansd.incubation.data.folder import list_folder
from leansd.incubation.data.samples import Shard
from leansd.incubation.data.shards import list_tars

Share: TypeAlias = Annotated[float, Field(ge=0, le=1)]


class _Settings(BaseModel):
    """What all kinds of data share.

    Attributes:
        resolution: the side of the pictures, in pixels; by default the UNet's own.
        batch: samples that are encoded or drawn at once.
        cache: where encoded samples are kept, for runs to share; by default in the run's folder.
        precision: of what is kept.
        empty, other, window: see `Chances`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    resolution: PositiveInt | None = None
    batch: PositiveInt = 8
    cache: Path | None = None
    precision: Literal["float16", "float32"] = "float16"
    empty: Share = 0.1
    other: Share = 0.0
    window: PositiveInt = 8192

    def find_resolution(self, pipe: DiffusionPipeline) -> int:
        """The side of the pictures, in pixels."""
        return self.resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor


class _PictureSettings(_Settings):
    """What data with pictures share.

    Attributes:
        path: where they are.
        flip: keep the mirrored pictures too, and draw one of the two each time.
    """

    path: str
    flip: bool = False

    def make_encoder(self, pipe: DiffusionPipeline) -> PictureEncoder:
        """What encodes the pictures."""
        return PictureEncoder(pipe, self.find_resolution(pipe), flip=self.flip, batch=self.batch)


class ShardData(_PictureSettings):
    """Tar shards; `caption` is an ending of their files, or an entry of their JSON."""

    kind: Literal["shards"]
    caption: str = "txt"


class FolderData(_PictureSettings):
    """An imagefolder; `caption` is the entry of its metadata."""

    kind: Literal["folder"]
    caption: str = "text"


class DrawnData(_Settings):
    """No pictures: latents drawn from prompts, a list or a file with one a line."""

    kind: Literal["drawn"]
    prompts: Path | tuple[str, ...]
    each: PositiveInt = 1
    seed: int = 0
    steps: PositiveInt = 25
    guidance: float = 7.5
    sampler: str = "dpm++2m"


DataSettings: TypeAlias = Annotated[ShardData | FolderData | DrawnData, Field(discriminator="kind")]


@dataclass(frozen=True)
class Dataset:
    """Samples, where they are kept, and what encodes those that are not yet."""

    shards: Sequence[Shard[Any]]
    encoder: Encoder[Any]
    texts: TextEncoder
    cache: Cache
    chances: Chances

    def fill(
        self,
        *,
        rank: int = 0,
        world: int = 1,
        report: OnProgress | None = None,
    ) -> None:
        """Encode this rank's share of what is not in the cache; see `fill`."""
        fill(
            self.cache,
            self.shards,
            self.encoder,
            self.texts,
            rank=rank,
            world=world,
            report=report,
        )

    def open(self) -> CachedSource:
        """The samples to train on, once every rank has filled its share."""
        return CachedSource(self.cache, self.shards, self.chances)


def prepare_data(settings: DataSettings, pipe: DiffusionPipeline, folder: str | Path) -> Dataset:
    """Find the data and their cache; nothing is encoded yet.

    Args:
        pipe: the teacher's pipeline, whose autoencoder and text encoder make latents and
            conditions; with drawn data it draws them too.
        folder: where caches are kept, unless the settings say.

    Raises:
        LeansdError: there are no data, or the cache is another's.
    """
    shards, encoder = find_data(settings, pipe)
    texts = TextEncoder(pipe)
    facts = encoder.describe() | texts.describe()
    dtype = getattr(torch, settings.precision)
    cache = Cache(settings.cache or folder, facts, dtype)
    chances = Chances(settings.empty, settings.other, settings.window)
    return Dataset(shards, encoder, texts, cache, chances)


def estimate_bytes(settings: DataSettings, pipe: DiffusionPipeline) -> int:
    """What one sample with one caption takes in the cache."""
    side = settings.find_resolution(pipe) // pipe.vae_scale_factor
    spread = isinstance(pipe.vae, AutoencoderKL) and not isinstance(settings, DrawnData)
    views = 2 if getattr(settings, "flip", False) else 1
    latents = pipe.unet.config.in_channels * side * side * views * (2 if spread else 1)
    empty = TextEncoder(pipe).encode_empty()
    text = sum(rows.numel() for rows in (empty.text, *empty.added.values()))
    return (latents + text) * getattr(torch, settings.precision).itemsize


@singledispatch
def find_data(settings: Any, pipe: DiffusionPipeline) -> tuple[Sequence[Shard[Any]], Encoder[Any]]:
    """The shards that settings name, and what encodes them."""
    raise NotImplementedError(type(settings).__name__)


@find_data.register
def _(settings: ShardData, pipe: DiffusionPipeline) -> tuple[Sequence[Shard[Any]], Encoder[Any]]:
    return list_tars(settings.path, settings.caption), settings.make_encoder(pipe)


@find_data.register
def _(settings: FolderData, pipe: DiffusionPipeline) -> tuple[Sequence[Shard[Any]], Encoder[Any]]:
    return list_folder(settings.path, settings.caption), settings.make_encoder(pipe)


@find_data.register
def _(settings: DrawnData, pipe: DiffusionPipeline) -> tuple[Sequence[Shard[Any]], Encoder[Any]]:
    side = settings.find_resolution(pipe)
    drawing = Drawing(side, settings.steps, settings.guidance, settings.sampler)
    wanted = settings.prompts
    prompts = read_prompts(wanted) if isinstance(wanted, Path) else wanted
    shards = list_drawings(prompts, each=settings.each, seed=settings.seed)
    return shards, Drawer(pipe, drawing, settings.batch)
