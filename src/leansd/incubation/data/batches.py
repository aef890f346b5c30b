"""What a student learns from: batches of clean latents and conditions, and where they come from.

The order of samples is that of whole steps: a global batch is the batches of all ranks, one after
the other. It depends on the seed and the size of the global batch only, so two processes with
batches of b see what one sees with batches of 2b.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from leansd.errors import LeansdError

StreamState: TypeAlias = Mapping[str, Any]
"""A position in a stream, as plain JSON values."""
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
        """The same on another device."""
        return Batch(
            self.latents.to(device),
            self.text.to(device),
            {name: tensor.to(device) for name, tensor in self.added.items()},
            self.keys,
            self.group,
        )


class Stream(Protocol):
    """Batches without end, and the position among them."""

    def __next__(self) -> Batch:
        """The next batch of this rank.

        Raises:
            LeansdError: the source cannot go on (an unreadable shard, a full disk).
        """
        ...

    def state(self) -> dict[str, Any]:
        """Where the next batch begins: the same on all ranks."""
        ...

    def close(self) -> None:
        """End what reads ahead."""
        ...


class DataSource(Protocol):
    """Where samples come from."""

    @property
    def fingerprint(self) -> str:
        """Of everything that samples and their order depend on, the seed apart."""
        ...

    @property
    def empty(self) -> Conditioning:
        """One row of the empty prompt."""
        ...

    def open(
        self,
        *,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        state: StreamState | None = None,
    ) -> Stream:
        """A stream of this rank's rows of each global batch.

        Args:
            batch: rows of one rank; a global batch has `batch * world`, this rank's beginning at
                `rank * batch`.
            state: what a stream of the same source, seed, batch and world gave: it goes on from
                there with the same batches, bit for bit.

        Raises:
            LeansdError: there is nothing to learn from, or the state is another source's.
        """
        ...


@dataclass(frozen=True)
class PairedSource:
    """Every sample twice, one right after the other: with its prompt and without.

    Pipelines draw with classifier-free guidance, which multiplies the difference of two
    predictions. How far a student's difference is off shows in pairs alone; the loss `guided`
    compares it.
    """

    source: DataSource
    """Is asked for half as many samples."""

    @property
    def fingerprint(self) -> str:
        return f"{self.source.fingerprint}-paired"

    @property
    def empty(self) -> Conditioning:
        return self.source.empty

    def open(
        self,
        *,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        state: StreamState | None = None,
    ) -> PairedStream:
        """As `DataSource.open`.

        Raises:
            LeansdError: the batch is odd.
        """
        if batch % PAIR:
            raise LeansdError(f"data: with paired samples a batch of {batch} is odd; make it even")
        stream = self.source.open(
            batch=batch // PAIR, seed=seed, rank=rank, world=world, state=state
        )
        return PairedStream(stream, self.empty)


@dataclass(frozen=True)
class PairedStream:
    """A stream whose rows come with and without their prompts, in turns."""

    stream: Stream
    empty: Conditioning

    def __next__(self) -> Batch:
        return pair_up(next(self.stream), self.empty)

    def state(self) -> dict[str, Any]:
        return self.stream.state()

    def close(self) -> None:
        self.stream.close()


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
