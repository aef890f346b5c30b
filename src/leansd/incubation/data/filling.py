"""Filling the cache: every sample encoded once, in parts, so that a stopped filling goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

import torch

from leansd.incubation.data.batches import Conditioning
from leansd.incubation.data.cached_source import CachedSource, Chances
from leansd.incubation.data.encoding import PictureEncoder, TeacherSampler, TextEncoder
from leansd.incubation.data.sample_cache import Cache, Latents, pack_part
from leansd.incubation.data.samples import Flaw, Sample, Shard, cut
from leansd.text import describe_duration

SECONDS = 30.0
"""Between two lines of progress."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FillProgress:
    """How far a filling has come, over this rank's shards."""

    shard: str
    done: int
    """Shards that are finished."""
    shards: int
    samples: int
    flaws: int


class FillReporter:
    """Says how far a filling has come and how long it still takes, at most twice a minute.

    Args:
        say: is given the line.
        clock: tells seconds.
    """

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = monotonic) -> None:
        self.say, self.clock = say, clock
        self.began = self.told = clock()
        self.first: FillProgress | None = None
        """What the cache had already, at least."""

    def __call__(self, progress: FillProgress) -> None:
        now = self.clock()
        if self.first is None:
            self.first, self.began = progress, now
        new, shards = progress.samples - self.first.samples, progress.done - self.first.done
        if now - self.told < SECONDS or not new:
            return
        self.told, took = now, now - self.began
        left = (progress.shards - progress.done) / shards * took if shards else None
        self.say(
            f"{progress.shard}: {progress.done} of {progress.shards} shards, {progress.samples} "
            f"samples in the cache, {progress.flaws} left out, {new / took:.1f} samples/s"
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
        on_progress: Callable[[FillProgress], Any] = lambda progress: None,
    ) -> None:
        """Encode what the cache does not have yet.

        Args:
            rank, world: of several processes, each takes every `world`-th shard. Wait for all
                before the cache is read.

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
                on_progress(FillProgress(shard.name, done, len(own), samples, flaws))
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
        cache.sweep(shard)
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
