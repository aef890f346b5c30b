"""The kinds of data that a recipe can name: their options, the filling of a cache, the source.

A new kind is a class here, and an entry of `KINDS`.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from leansd.errors import LeansdError
from leansd.evaluation.prompt_sets import read_prompts
from leansd.incubation.data.batches import Conditioning, DataSource, PairedSource, RandomLatents
from leansd.incubation.data.encoding import (
    PictureEncoder,
    TeacherSampler,
    TextEncoder,
    embed,
    has_sizes,
    make_time_ids,
)
from leansd.incubation.data.sample_cache import Cache, CachedSource, Chances, Latents, pack_part
from leansd.incubation.data.samples import (
    Flaw,
    Sample,
    Shard,
    cut,
    list_folder,
    list_prompts,
    list_tars,
)
from leansd.incubation.recipe import DataConfig
from leansd.text import describe_duration, explain_validation, refuse_unknown, suggest_name

# -- filling a cache -------------------------------------------------------------------------------

SECONDS = 30.0
"""Between two lines of progress."""
log = logging.getLogger(__name__)


Note = Callable[[str], None]


def tell_nobody(message: str) -> None:
    """A `Note` that goes nowhere."""


class FillReporter:
    """Says how far a filling has come and how long it still takes, at most twice a minute.

    Args:
        say: is given the line.
        clock: tells seconds.
    """

    def __init__(self, say: Note, clock: Callable[[], float] = monotonic) -> None:
        self.say, self.clock = say, clock
        self.began = self.told = clock()
        self.first: tuple[int, int] | None = None
        """Samples and shards that the cache had already, at least."""

    def __call__(self, shard: str, done: int, shards: int, samples: int, flaws: int) -> None:
        """How far it is: `done` of this rank's `shards` are finished, others begun."""
        now = self.clock()
        if self.first is None:
            self.first, self.began = (samples, done), now
        new, finished = samples - self.first[0], done - self.first[1]
        if now - self.told < SECONDS or not new:
            return
        self.told, took = now, now - self.began
        left = (shards - done) / finished * took if finished else None
        self.say(
            f"{shard}: {done} of {shards} shards, {samples} samples in the cache, "
            f"{flaws} left out, {new / took:.1f} samples/s"
            + ("" if left is None else f", {describe_duration(left)} left")
        )


@dataclass(frozen=True)
class Dataset:
    """Samples, where they are kept, and what encodes those that are not yet."""

    cache: Cache
    shards: Sequence[Shard]
    encoder: PictureEncoder | TeacherSampler
    texts: TextEncoder
    chances: Chances = Chances()  # noqa: RUF009

    def fill(
        self,
        *,
        rank: int = 0,
        world: int = 1,
        on_progress: Callable[[str, int, int, int, int], None] = lambda *progress: None,
    ) -> None:
        """Encode what the cache does not have yet.

        Args:
            rank, world: of several processes, each takes every `world`-th shard. Wait for all
                before the cache is read.
            on_progress: is told how far it is, as a `FillReporter` takes it.

        Raises:
            LeansdError: a shard cannot be read or the disk is full; what is done is kept.
        """
        if rank == 0 and self.cache.read_empty() is None:
            self.cache.write_empty(self.texts.encode_empty())
        own = self.shards[rank::world]
        samples = flaws = 0
        for done, shard in enumerate(own):
            for part_samples, part_flaws in self._fill_shard(shard):
                samples, flaws = samples + part_samples, flaws + part_flaws
                on_progress(shard.name, done, len(own), samples, flaws)
        if flaws:
            total = samples + flaws
            log.warning("%d of %d samples are left out; their files say why", flaws, total)

    def open(self) -> CachedSource:
        """The samples to train on, once every rank has filled its share."""
        return CachedSource(self.cache, self.shards, self.chances)

    def _fill_shard(self, shard: Shard) -> Iterator[tuple[int, int]]:
        """Samples and flaws of each part, as it is done."""
        cache, count = self.cache, self.cache.find(shard)
        if count is not None:
            yield sum(count.counts), count.flaws
            return
        parts = 0
        for number, found in enumerate(cut(shard.read(), cache.rows)):
            if not cache.has_part(shard, number):
                cache.write_part(shard, number, self._encode(found))
            part = cache.open_part(shard, number)
            for flaw in part.flaws:
                log.info("%s: %s is left out: %s", shard.name, flaw.key, flaw.reason)
            parts += 1
            yield len(part), len(part.flaws)
        cache.finish(shard, parts)

    def _encode(self, found: Sequence[Sample | Flaw]) -> bytes:
        """The content of a part."""
        readable = [each for each in found if isinstance(each, Sample)]
        latents: list[Latents | Flaw] = []
        for batch in cut(readable, self.encoder.batch):
            latents += self.encoder.encode(batch)
        pairs = zip(readable, latents, strict=True)
        good = [(sample, each) for sample, each in pairs if isinstance(each, Latents)]
        captions = dict.fromkeys(caption for sample, _ in good for caption in sample.captions)
        places = {caption: place for place, caption in enumerate(captions)}
        encoded = self.texts.encode(list(captions)) if captions else Conditioning(torch.zeros(0))
        flaws = [each for each in (*found, *latents) if isinstance(each, Flaw)]
        return pack_part(good, places, encoded, flaws, self.cache.dtype)


# -- kinds of data ---------------------------------------------------------------------------------

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
    note: Note = tell_nobody


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
    """The precision of what is kept."""

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
        named = read_prompts(wanted, least=1) if isinstance(wanted, Path) else wanted
        prompts = tuple(dict.fromkeys(named))
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
    known = [each for each in kind.model_fields if each != "kind"]
    refuse_unknown(f"data: {config.kind}", config.options, known)
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
