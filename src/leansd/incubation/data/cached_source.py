"""What trains reads this: samples of a cache, in an order and with chances that the seed decides.

Everything about a sample follows from the seed and its place: which it is, its latents' noise,
whether it is mirrored, which of its captions it has. So a position is one number, and any number of
processes share one order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import sha256
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from leansd.errors import LeansdError
from leansd.incubation.data.batches import Batch, Conditioning, StreamState
from leansd.incubation.data.sample_cache import Cache, OpenPart
from leansd.incubation.data.samples import Shard, digest

OPEN_FILES = 256


def make_generator(*parts: int | str) -> torch.Generator:
    """The random numbers that belong to a seed and a place, on the CPU."""
    text = " ".join(map(str, parts)).encode()
    return torch.Generator().manual_seed(int.from_bytes(sha256(text).digest()[:8], "big") >> 1)


@dataclass(frozen=True)
class Window:
    """Samples that are shuffled together."""

    begin: int
    """The place of the first."""
    spots: Tensor
    """Shard and row of each, [N, 2]."""

    def __contains__(self, place: int) -> bool:
        return self.begin <= place < self.begin + len(self.spots)

    def get(self, number: int) -> tuple[int, int]:
        shard, row = self.spots[number].tolist()
        return shard, row


class SampleOrder:
    """Shards shuffled by the seed and the epoch, samples among neighbouring shards.

    Args:
        counts: samples of each shard.
        window: samples that are shuffled together, at least: as many shards as hold them.
    """

    def __init__(self, counts: Sequence[int], seed: int, window: int) -> None:
        self.counts, self.seed, self.window = tuple(counts), seed, window
        self.total = sum(self.counts)
        self._epoch: tuple[int, list[list[int]]] | None = None
        self._current: Window | None = None

    def find(self, place: int) -> tuple[int, int]:
        """Shard and row of the sample at a place."""
        window = self.find_window(place)
        return window.get(place - window.begin)

    def find_window(self, place: int) -> Window:
        """The samples that a place's is shuffled with."""
        if self._current is None or place not in self._current:
            self._current = self._shuffle(place)
        return self._current

    def _shuffle(self, place: int) -> Window:
        epoch = place // self.total
        groups = self._group(epoch)
        sizes = [sum(self.counts[shard] for shard in group) for group in groups]
        begins = list(accumulate(sizes[:-1], initial=epoch * self.total))
        number = bisect_right(begins, place) - 1
        spots = torch.tensor(
            [(shard, row) for shard in groups[number] for row in range(self.counts[shard])]
        )
        generator = make_generator("rows", self.seed, epoch, number)
        return Window(begins[number], spots[torch.randperm(len(spots), generator=generator)])

    def _group(self, epoch: int) -> list[list[int]]:
        if self._epoch is not None and self._epoch[0] == epoch:
            return self._epoch[1]
        generator = make_generator("shards", self.seed, epoch)
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
        self._epoch = epoch, groups
        return groups


@dataclass(frozen=True)
class Chances:
    """How often samples are given with other prompts than their own."""

    empty: float = 0.1
    """The share of samples whose prompt is empty, for classifier-free guidance."""
    other: float = 0.0
    """The share, of those that are not empty, whose prompt is another sample's: a student learns
    from more pairs than there are (Random Conditioning, arXiv 2504.02011)."""
    window: int = 8192
    """Samples that are shuffled together, at least."""

    def __post_init__(self) -> None:
        for name in ("empty", "other"):
            if not 0 <= getattr(self, name) <= 1:
                raise LeansdError(f"{name} is a share of the samples: from 0 to 1")
        if self.window < 1:
            raise LeansdError("window is a number of samples: 1 or more")


class CachedSource:
    """The samples of some shards, all of them in the cache.

    Raises:
        LeansdError: a shard is not in the cache yet, or there is no sample that could be used.
    """

    def __init__(
        self, cache: Cache, shards: Sequence[Shard[Any]], chances: Chances | None = None
    ) -> None:
        self.cache, self.chances = cache, chances or Chances()
        self.parts: list[tuple[Shard[Any], int]] = []
        counts: list[int] = []
        self.flaws = self.size = 0
        for shard in shards:
            count = cache.find(shard)
            if count is None:
                raise LeansdError(f"shard {shard.name} is not in {cache.folder} yet: fill it first")
            self.parts += [(shard, number) for number in range(len(count.counts))]
            counts += count.counts
            self.flaws, self.size = self.flaws + count.flaws, self.size + count.size
        self.counts = tuple(counts)
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
        named = [self.cache.locate_part(*part).parent.name for part in self.parts]
        facts = {"cache": self.cache.key, "parts": named, "counts": self.counts}
        return digest({**facts, **asdict(self.chances)})

    @property
    def empty(self) -> Conditioning:
        """One row of the empty prompt.

        Raises:
            LeansdError: it is not in the cache.
        """
        found = self.cache.read_empty()
        if found is None:
            raise LeansdError(f"no empty prompt in {self.cache.folder}: fill the cache again")
        added = {name: rows.float() for name, rows in found.added.items()}
        return Conditioning(found.text.float(), added)

    def open(
        self,
        *,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        state: StreamState | None = None,
    ) -> CachedStream:
        """See `Source.open`; a state also serves another batch or world, from the same place on."""
        stream = CachedStream(self, batch=batch, seed=seed, rank=rank, world=world)
        if state is not None:
            stream.place = self._find_place(state, seed)
        return stream

    def _find_place(self, state: Mapping[str, Any], seed: int) -> int:
        mine = {"source": self.fingerprint, "seed": seed}
        for name, value in mine.items():
            if state.get(name) != value:
                raise LeansdError(
                    f"these data cannot be gone on from: the {name} was {state.get(name)} and is "
                    f"{value}; give the same data, shares and seed, or begin anew"
                )
        return int(state["place"])


class CachedStream:
    """One rank's batches without end; the next one is read while the last is trained on."""

    def __init__(
        self, source: CachedSource, *, batch: int, seed: int, rank: int, world: int
    ) -> None:
        if batch < 1 or not 0 <= rank < world:
            raise LeansdError(f"no batch of {batch} for rank {rank} of {world}")
        self.source, self.batch, self.seed = source, batch, seed
        self.rank, self.world = rank, world
        self.place = 0
        """Of the first sample of the next global batch."""
        self._empty = source.empty
        self._order = SampleOrder(source.counts, seed, source.chances.window)
        self._open = lru_cache(OPEN_FILES)(self._open_part)
        self._reader = ThreadPoolExecutor(1, "incubation-data")
        self._ahead: Future[Batch] | None = None

    def __next__(self) -> Batch:
        batch = (self._ahead or self._read_ahead()).result()
        self.place += self.batch * self.world
        self._ahead = self._read_ahead()
        return batch

    def close(self) -> None:
        """End the thread that reads ahead."""
        self._reader.shutdown(cancel_futures=True)

    def _read_ahead(self) -> Future[Batch]:
        return self._reader.submit(self._read_batch, self.place + self.rank * self.batch)

    def _read_batch(self, begin: int) -> Batch:
        rows = [self._read(place) for place in range(begin, begin + self.batch)]
        added = {name: torch.cat([each.added[name] for each in rows]) for name in rows[0].added}
        latents, text = (torch.cat([getattr(e, k) for e in rows]) for k in ("latents", "text"))
        return Batch(latents, text, added, tuple(key for each in rows for key in each.keys))

    def state(self) -> dict[str, Any]:
        """Where the next batch begins: the same on all ranks."""
        return {"source": self.source.fingerprint, "seed": self.seed, "place": self.place}

    def _read(self, place: int) -> Batch:
        """The sample at a place, a batch of one."""
        generator = make_generator("sample", self.seed, place)
        # All are drawn, whatever they are for: a share that is changed leaves the others' alone.
        flip, caption, empty, other, which, its = torch.rand(
            6, generator=generator, dtype=torch.float64
        ).tolist()
        shard, row = self._order.find(place)
        part = self._open(shard)
        latents = part.read_latents(row)
        view = int(flip * len(latents.mean))
        sample = latents.mean[view]
        if latents.std is not None:
            noise = torch.randn(sample.shape, generator=generator)
            sample = sample + latents.std[view] * noise
        if empty < self.source.chances.empty:
            conditions = self._empty
        elif other < self.source.chances.other:
            window = self._order.find_window(place)
            number, its_row = window.get(int(which * len(window.spots)))
            conditions = self._open(number).read_conditions(its_row, its)
        else:
            conditions = part.read_conditions(row, caption)
        own: dict[str, Tensor] = {name: value[None] for name, value in latents.added.items()}
        return Batch(sample[None], conditions.text, {**conditions.added, **own}, (part.keys[row],))

    def _open_part(self, number: int) -> OpenPart:
        return self.source.cache.open_part(*self.source.parts[number])
