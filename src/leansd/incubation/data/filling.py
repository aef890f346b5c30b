"""Filling the cache: every sample encoded once, in parts, so that a stopped filling goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from time import monotonic
from typing import TypeAlias, TypeVar

import torch

from leansd.incubation.data.batches import Conditioning
from leansd.incubation.data.encoding import Encoder, TextEncoder
from leansd.incubation.data.sample_cache import Cache, CachePart, Latents
from leansd.incubation.data.samples import Flaw, Sample, Shard
from leansd.text import describe_duration

SECONDS = 30.0
"""Between two lines of progress."""
T = TypeVar("T")
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


OnFillProgress: TypeAlias = Callable[[FillProgress], None]


class FillReporter:
    """Says how far a filling has come and how long it still takes, at most twice a minute."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = monotonic) -> None:
        """
        Args:
            say: is given the line.
            clock: tells seconds.
        """
        self.say, self.clock = say, clock
        self.began = self.told = clock()
        self.first: FillProgress | None = None
        """What the cache had already, at least."""

    def __call__(self, progress: FillProgress) -> None:
        now = self.clock()
        if self.first is None:
            self.first, self.began = progress, now
        if now - self.told < SECONDS or progress.samples == self.first.samples:
            return
        self.told = now
        rate = (progress.samples - self.first.samples) / (now - self.began)
        shards = progress.done - self.first.done
        left = ""
        if shards:
            seconds = (progress.shards - progress.done) / shards * (now - self.began)
            left = f", {describe_duration(seconds)} left"
        self.say(
            f"{progress.shard}: {progress.done} of {progress.shards} shards, {progress.samples} "
            f"samples in the cache, {progress.flaws} left out, {rate:.1f} samples/s{left}"
        )


def fill(
    cache: Cache,
    shards: Sequence[Shard[T]],
    encoder: Encoder[T],
    texts: TextEncoder,
    *,
    rank: int = 0,
    world: int = 1,
    on_progress: OnFillProgress | None = None,
) -> None:
    """Encode what the cache does not have yet.

    Args:
        rank, world: of several processes, each takes every `world`-th shard. Wait for all before
            the cache is read.

    Raises:
        LeansdError: a shard cannot be read or the disk is full; what is done is kept.
    """
    if rank == 0 and cache.read_empty() is None:
        cache.write_empty(texts.encode_empty())
    own = shards[rank::world]
    samples = flaws = 0
    for done, shard in enumerate(own):
        for part_samples, part_flaws in _fill_shard(cache, shard, encoder, texts):
            samples, flaws = samples + part_samples, flaws + part_flaws
            if on_progress is not None:
                on_progress(FillProgress(shard.name, done, len(own), samples, flaws))
    if flaws:
        log.warning("%d of %d samples are left out; their files say why", flaws, samples + flaws)


def _fill_shard(
    cache: Cache, shard: Shard[T], encoder: Encoder[T], texts: TextEncoder
) -> Iterator[tuple[int, int]]:
    """Samples and flaws of each part, as it is done."""
    count = cache.find(shard)
    if count is not None:
        yield count.samples, count.flaws
        return
    cache.sweep(shard)
    number = 0
    for number, found in enumerate(_cut(shard.read(), cache.rows), 1):
        if not cache.has_part(shard, number - 1):
            cache.write_part(shard, number - 1, _encode_part(found, encoder, texts))
        part = cache.open_part(shard, number - 1)
        for flaw in part.flaws:
            log.info("%s: %s is left out: %s", shard.name, flaw.key, flaw.reason)
        yield len(part), len(part.flaws)
    cache.finish(shard, number)


def _encode_part(
    found: Sequence[Sample[T] | Flaw], encoder: Encoder[T], texts: TextEncoder
) -> CachePart:
    readable = [each for each in found if isinstance(each, Sample)]
    latents: list[Latents | Flaw] = []
    for batch in _cut(readable, encoder.batch):
        latents += encoder.encode(batch)
    pairs = zip(readable, latents, strict=True)
    good = [(sample, each) for sample, each in pairs if isinstance(each, Latents)]
    captions = dict.fromkeys(caption for sample, _ in good for caption in sample.captions)
    places = {caption: place for place, caption in enumerate(captions)}
    return CachePart(
        tuple(sample.key for sample, _ in good),
        tuple(each for _, each in good),
        tuple(tuple(places[caption] for caption in sample.captions) for sample, _ in good),
        texts.encode(list(captions)) if captions else Conditioning(torch.zeros(0)),
        tuple(each for each in (*found, *latents) if isinstance(each, Flaw)),
    )


def _cut(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Neighbours, `size` at a time."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
