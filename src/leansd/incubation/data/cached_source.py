"""Samples of a cache as what trains reads them, in an order and with chances of the seed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor

from leansd.errors import LeansdError
from leansd.incubation.data.batches import Batch, Conditioning, DataSource, Read
from leansd.incubation.data.sample_cache import Cache, CachePart
from leansd.incubation.data.samples import Shard, digest
from leansd.incubation.noise import hash_words, seed_generator

OPEN_FILES = 256
Share = Annotated[float, Field(ge=0, le=1)]


class SampleOrder:
    """Shards shuffled by the seed and the epoch, samples among neighbouring shards.

    Args:
        counts: samples of each shard.
        window: samples that are shuffled together, at least: as many shards as hold them.
    """

    def __init__(self, counts: Sequence[int], seed: int, window: int) -> None:
        self.counts, self.seed, self.window = tuple(counts), seed, window
        self.total = sum(self.counts)
        self._find_groups = lru_cache(1)(self._group)
        self._find_spots = lru_cache(1)(self._shuffle)

    def find(self, place: int) -> tuple[int, int]:
        """Shard and row of the sample at a place."""
        begin, spots = self.find_window(place)
        shard, row = spots[place - begin].tolist()
        return shard, row

    def find_window(self, place: int) -> tuple[int, Tensor]:
        """The samples that a place's is shuffled with: the first one's place, and [N, 2] of shards
        and rows."""
        epoch = place // self.total
        groups = self._find_groups(epoch)
        sizes = [sum(self.counts[shard] for shard in group) for group in groups]
        begins = list(accumulate(sizes[:-1], initial=epoch * self.total))
        number = bisect_right(begins, place) - 1
        return begins[number], self._find_spots(epoch, number)

    def _shuffle(self, epoch: int, number: int) -> Tensor:
        spots = torch.tensor(
            [
                (shard, row)
                for shard in self._find_groups(epoch)[number]
                for row in range(self.counts[shard])
            ]
        )
        generator = seed_generator("rows", self.seed, epoch, number, by=hash_words)
        return spots[torch.randperm(len(spots), generator=generator)]

    def _group(self, epoch: int) -> list[list[int]]:
        generator = seed_generator("shards", self.seed, epoch, by=hash_words)
        groups: list[list[int]] = []
        room = 0
        for shard in torch.randperm(len(self.counts), generator=generator).tolist():
            if not self.counts[shard]:
                continue
            if room <= 0:
                groups.append([])
                room = self.window
            groups[-1].append(shard)
            room -= self.counts[shard]
        return groups


class Chances(BaseModel):
    """How often samples are given with other prompts than their own."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    empty: Share = 0.1
    """The share of samples whose prompt is empty, for classifier-free guidance."""
    other: Share = 0.0
    """The share, of those that are not empty, whose prompt is another sample's: a student learns
    from more pairs than there are (Random Conditioning, arXiv 2504.02011)."""
    window: PositiveInt = 8192
    """Samples that are shuffled together, at least."""


class CachedSource(DataSource):
    """The samples of some shards, all of them in the cache.

    Raises:
        LeansdError: a shard is not in the cache yet, or there is no sample that could be used.
    """

    def __init__(
        self, cache: Cache, shards: Sequence[Shard], chances: Chances | None = None
    ) -> None:
        self.cache, self.chances = cache, chances or Chances()
        self.parts: list[tuple[Shard, int]] = []
        self.counts: list[int] = []
        self.flaws = 0
        for shard in shards:
            count = cache.find(shard)
            if count is None:
                raise LeansdError(f"shard {shard.name} is not in {cache.folder} yet: fill it first")
            self.parts += [(shard, number) for number in range(len(count.counts))]
            self.counts += count.counts
            self.flaws += count.flaws
        if not len(self):
            raise LeansdError(
                f"no sample of {len(shards)} shards could be used, {self.flaws} are left out: see "
                "the log for why"
            )

    def __len__(self) -> int:
        """Samples of an epoch."""
        return sum(self.counts)

    @property
    def fingerprint(self) -> str:
        """Of everything that samples and their order depend on, the seed apart."""
        named = [self.cache.locate(shard).name for shard, _ in self.parts]
        chances = {name: getattr(self.chances, name) for name in Chances.model_fields}
        facts = {"cache": self.cache.key, "parts": named, "counts": self.counts}
        return digest(facts | chances)

    @property
    def empty(self) -> Conditioning:
        found = self.cache.read_empty()
        if found is None:
            raise LeansdError(f"no empty prompt in {self.cache.folder}: fill the cache again")
        return found.float()

    def write_state(self, seed: int, place: int) -> dict[str, Any]:
        return {"source": self.fingerprint, "seed": seed, "place": place}

    def read(self, seed: int) -> Read:
        order = SampleOrder(self.counts, seed, self.chances.window)
        empty_prompt = self.empty

        @lru_cache(OPEN_FILES)
        def open_part(number: int) -> CachePart:
            return self.cache.open_part(*self.parts[number])

        def read(place: int) -> Batch:
            generator = seed_generator("sample", seed, place, by=hash_words)
            # All are drawn, whatever for: a share that is changed leaves the others' alone.
            flip, caption, empty, other, which, its = torch.rand(
                6, generator=generator, dtype=torch.float64
            ).tolist()
            shard, row = order.find(place)
            part = open_part(shard)
            latents = part.read_latents(row)
            view = int(flip * len(latents.mean))
            sample = latents.mean[view]
            if latents.std is not None:
                noise = torch.randn(sample.shape, generator=generator)
                sample = sample + latents.std[view] * noise
            if empty < self.chances.empty:
                conditions = empty_prompt
            elif other < self.chances.other:
                _, spots = order.find_window(place)
                number, its_row = spots[int(which * len(spots))].tolist()
                conditions = open_part(number).read_conditions(its_row, its)
            else:
                conditions = part.read_conditions(row, caption)
            added = {**conditions.added, **{name: v[None] for name, v in latents.added.items()}}
            return Batch(sample[None], conditions.text, added, (part.keys[row],))

        return read
