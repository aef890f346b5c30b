"""What trains reads this: samples of a cache, in an order and with chances that the seed decides.

Everything about a sample follows from the seed and its place: which it is, its latents' noise,
whether it is mirrored, which of its captions it has. So a position is one number, and any number of
processes share one order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from leansd.errors import LeansdError
from leansd.incubation.batches import Batch, Conditions, State
from leansd.incubation.data.cache import Cache
from leansd.incubation.data.order import Order, make_generator
from leansd.incubation.data.parts import OpenPart
from leansd.incubation.data.samples import Shard, digest

OPEN_FILES = 256


@dataclass(frozen=True)
class Chances:
    """How often samples are not what they are.

    Attributes:
        empty: the share of samples whose prompt is empty, for classifier-free guidance.
        other: the share whose prompt is another sample's, so that a student learns from more pairs
            than there are (Random Conditioning, arXiv 2504.02011), of those that are not empty.
        window: samples that are shuffled together, at least.
    """

    empty: float = 0.1
    other: float = 0.0
    window: int = 8192

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
            tally = cache.find(shard)
            if tally is None:
                raise LeansdError(f"shard {shard.name} is not in {cache.folder} yet: fill it first")
            self.parts += [(shard, number) for number in range(len(tally.counts))]
            counts += tally.counts
            self.flaws, self.size = self.flaws + tally.flaws, self.size + tally.size
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

    @cached_property
    def empty(self) -> Conditions:
        """One row of the empty prompt.

        Raises:
            LeansdError: it is not in the cache.
        """
        found = self.cache.read_empty()
        if found is None:
            raise LeansdError(f"no empty prompt in {self.cache.folder}: fill the cache again")
        added = {name: rows.float() for name, rows in found.added.items()}
        return Conditions(found.text.float(), added)

    def open(
        self,
        *,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        state: State | None = None,
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
    """One rank's batches without end."""

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
        self._order = Order(source.counts, seed, source.chances.window)
        self._open = lru_cache(OPEN_FILES)(self._open_part)
        self._reader = ThreadPoolExecutor(1, "incubation-data")
        self._ahead: Future[Batch] | None = None

    def __iter__(self) -> CachedStream:
        return self

    def __next__(self) -> Batch:
        ready = self._ahead or self._submit()
        batch = ready.result()
        self.place += self.batch * self.world
        self._ahead = self._submit()
        return batch

    def _submit(self) -> Future[Batch]:
        """Read the next batch while the last one is trained on."""
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
            conditions = self._read_conditions(*window.get(int(which * len(window.spots))), its)
        else:
            conditions = self._read_conditions(shard, row, caption)
        own: dict[str, Tensor] = {name: value[None] for name, value in latents.added.items()}
        return Batch(sample[None], conditions.text, {**conditions.added, **own}, (part.keys[row],))

    def _read_conditions(self, shard: int, row: int, chance: float) -> Conditions:
        part = self._open(shard)
        captions = part.list_captions(row)
        return part.read_conditions(captions[int(chance * len(captions))])

    def _open_part(self, number: int) -> OpenPart:
        return self.source.cache.open_part(*self.source.parts[number])
