"""What a student learns from: batches of clean latents and conditions, and where they come from.

Everything about a sample follows from the seed and its place, so a position is one number. A global
batch is the batches of all ranks, one after the other: two processes with batches of b see what one
sees with batches of 2b.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from leansd.core.devices import send
from leansd.errors import LeansdError
from leansd.incubation.noise import hash_repr, make_generator

NOTHING: Mapping[str, Tensor] = MappingProxyType({})
PAIR = 2
"""Rows of a sample that comes with its prompt and without."""


@dataclass(frozen=True)
class Conditioning:
    """What a UNet takes besides latents and time steps, a row for each caption."""

    text: Tensor
    """[M, T, D]."""
    added: Mapping[str, Tensor] = field(default_factory=lambda: NOTHING)
    """SDXL's `text_embeds`, [M, P]."""

    def float(self) -> Conditioning:
        """The conditions in single precision."""
        return Conditioning(self.text.float(), {k: rows.float() for k, rows in self.added.items()})

    def pack(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Plain tensors by name, as they are kept on disk: `text`, `text.NAME`."""
        added = {f"text.{name}": rows for name, rows in self.added.items()}
        tensors = {"text": self.text, **added}
        return {name: rows.to(dtype).contiguous() for name, rows in tensors.items()}


@dataclass(frozen=True)
class Batch:
    """Samples as a UNet takes them."""

    latents: Tensor
    """Clean, in the UNet's scale, [B, C, h, w]."""
    text: Tensor
    """What the UNet attends to, [B, T, D]."""
    added: Mapping[str, Tensor] = field(default_factory=lambda: NOTHING)
    """SDXL's further conditions by name: `text_embeds` [B, D], `time_ids` [B, 6]."""
    keys: tuple[str, ...] = ()
    """What each sample is called in its source."""
    group: int = 1
    """Rows that follow each other and are given the same noise."""

    def __len__(self) -> int:
        return self.latents.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""
        latents, text = send(self.latents, device), send(self.text, device)
        added = {name: send(rows, device) for name, rows in self.added.items()}
        return Batch(latents, text, added, self.keys, self.group)


def join(batches: Sequence[Batch]) -> Batch:
    """Batches of one kind, one after the other."""
    return Batch(
        torch.cat([each.latents for each in batches]),
        torch.cat([each.text for each in batches]),
        {name: torch.cat([each.added[name] for each in batches]) for name in batches[0].added},
        tuple(key for each in batches for key in each.keys),
        batches[0].group,
    )


Read = Callable[[int], Batch]
"""The sample at a place, as a batch of its own."""


class DataSource(ABC):
    """Samples without end, each at its place."""

    rows = 1
    """Rows of a sample."""

    @property
    @abstractmethod
    def empty(self) -> Conditioning:
        """One row of the empty prompt.

        Raises:
            LeansdError: there is none.
        """

    @abstractmethod
    def read(self, seed: int) -> Read:
        """Opens the order that a seed gives; for one thread.

        Reading a sample raises LeansdError where a file is gone or damaged.
        """

    @abstractmethod
    def write_state(self, seed: int, place: int) -> dict[str, Any]:
        """What tells these samples from others, and last the position: plain JSON values."""

    def open(
        self,
        *,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        state: Mapping[str, Any] | None = None,
    ) -> Stream:
        """A stream of this rank's rows of each global batch.

        Args:
            batch: rows of one rank; a global batch has `batch * world`, this rank's beginning at
                `rank * batch`.
            state: what a stream of the same source and seed gave: the new one goes on from there
                with the same samples, bit for bit.

        Raises:
            LeansdError: the batch is none, or the state is another source's.
        """
        if batch < 1 or not 0 <= rank < world:
            raise LeansdError(f"no batch of {batch} for rank {rank} of {world}")
        if batch % self.rows:
            raise LeansdError(f"data: with paired samples a batch of {batch} is odd; make it even")
        own = self.write_state(seed, 0)
        given = own if state is None else state
        *facts, position = own
        for name in facts:
            if given.get(name) != own[name]:
                raise LeansdError(
                    f"these data cannot be gone on from: the {name} was {given.get(name)} and is "
                    f"{own[name]}; give the same data, shares and seed, or begin anew"
                )
        return Stream(self, batch // self.rows, seed, rank, world, int(given[position]))


class Stream:
    """One rank's batches without end; the next one is read while the last is trained on."""

    def __init__(
        self, source: DataSource, samples: int, seed: int, rank: int, world: int, place: int
    ) -> None:
        self.source, self.samples, self.seed = source, samples, seed
        self.rank, self.world = rank, world
        self.place = place
        """The place of the next global batch's first sample."""
        self._read = source.read(seed)
        self._reader = ThreadPoolExecutor(1, "incubation-data")
        self._ahead: Future[Batch] | None = None

    def __next__(self) -> Batch:
        batch = (self._ahead or self._read_ahead()).result()
        self.place += self.samples * self.world
        self._ahead = self._read_ahead()
        return batch

    def state(self) -> dict[str, Any]:
        """Where the next batch begins: the same on all ranks."""
        return self.source.write_state(self.seed, self.place)

    def close(self) -> None:
        """End the thread that reads ahead."""
        self._reader.shutdown(cancel_futures=True)

    def _read_ahead(self) -> Future[Batch]:
        first = self.place + self.rank * self.samples
        places = range(first, first + self.samples)
        return self._reader.submit(lambda: join([self._read(place) for place in places]))


@dataclass(frozen=True)
class PairedSource(DataSource):
    """Every sample twice, one right after the other: with its prompt and without.

    Pipelines draw with classifier-free guidance, which multiplies the difference of two
    predictions. How far a student's difference is off shows in pairs alone; the loss `guided`
    compares it.
    """

    source: DataSource
    rows = PAIR

    @property
    def empty(self) -> Conditioning:
        return self.source.empty

    def read(self, seed: int) -> Read:
        read, empty = self.source.read(seed), self.empty
        return lambda place: pair_up(read(place), empty)

    def write_state(self, seed: int, place: int) -> dict[str, Any]:
        return self.source.write_state(seed, place)


def pair_up(batch: Batch, empty: Conditioning) -> Batch:
    """`batch` with twice the rows: after each the same latents under the empty prompt."""

    def alternate(ones: Tensor, others: Tensor) -> Tensor:
        return torch.stack([ones, others], dim=1).flatten(0, 1)

    # What the empty prompt does not say, such as SDXL's sizes, is the picture's own.
    added = {
        name: alternate(rows, empty.added[name].expand_as(rows) if name in empty.added else rows)
        for name, rows in batch.added.items()
    }
    return Batch(
        batch.latents.repeat_interleave(PAIR, dim=0),
        alternate(batch.text, empty.text.expand(len(batch), -1, -1)),
        added,
        tuple(key for key in batch.keys for _ in range(PAIR)),
        group=PAIR,
    )


@dataclass(frozen=True)
class RandomLatents(DataSource):
    """Normal latents, each with one of a few conditions: for dry runs and tests.

    Nothing is learned from them but what a net does everywhere.
    """

    shape: tuple[int, int, int]
    """The shape of one sample, (C, h, w)."""
    conditions: Conditioning
    """The conditions of N prompts."""
    without: Conditioning | None = None
    """The empty prompt, where it may be asked for."""

    @property
    def empty(self) -> Conditioning:
        if self.without is None:
            raise LeansdError("these random latents come without the empty prompt")
        return self.without

    def read(self, seed: int) -> Read:
        text, added = self.conditions.text, self.conditions.added

        def read(place: int) -> Batch:
            generator = make_generator(seed, "latents", place, by=hash_repr)
            row = int(torch.randint(len(text), (), generator=generator))
            latents = torch.randn(1, *self.shape, generator=generator)
            own = {name: rows[row : row + 1] for name, rows in added.items()}
            return Batch(latents, text[row : row + 1], own, (str(place),))

        return read

    def write_state(self, seed: int, place: int) -> dict[str, Any]:
        return {"drawn": place}
