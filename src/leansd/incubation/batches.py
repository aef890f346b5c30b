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

State: TypeAlias = Mapping[str, Any]
"""A position in a stream, as plain JSON values."""
NOTHING: Mapping[str, Tensor] = MappingProxyType({})


@dataclass(frozen=True)
class Conditions:
    """What a UNet takes besides latents and time steps, a row each caption.

    Attributes:
        text: [M, T, D].
        added: SDXL's `text_embeds`, [M, P].
    """

    text: Tensor
    added: Mapping[str, Tensor] = field(default_factory=lambda: NOTHING)

    def select(self, row: int) -> Conditions:
        """One row, as [1, ...]."""
        at = slice(row, row + 1)
        return Conditions(self.text[at], {name: rows[at] for name, rows in self.added.items()})


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

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """The same on another device, in another precision."""
        return Batch(
            self.latents.to(device, dtype),
            self.text.to(device, dtype),
            {name: tensor.to(device, dtype) for name, tensor in self.added.items()},
            self.keys,
            self.group,
        )


class Stream(Protocol):
    """Batches without end, and the position among them."""

    def __iter__(self) -> Stream: ...

    def __next__(self) -> Batch:
        """The next batch of this rank.

        Raises:
            LeansdError: the source cannot go on (an unreadable shard, a full disk).
        """
        ...

    def state(self) -> dict[str, Any]:
        """Where the next batch begins. The same on all ranks where nothing was skipped."""
        ...


class Source(Protocol):
    """Where samples come from."""

    @property
    def fingerprint(self) -> str:
        """Of everything that samples and their order depend on, the seed apart."""
        ...

    @property
    def empty(self) -> Conditions:
        """One row of the empty prompt."""
        ...

    def open(
        self,
        *,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        state: State | None = None,
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
