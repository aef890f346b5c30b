"""Every sample twice, one right after the other: with its prompt and without, from the same noise.

Pipelines draw with classifier-free guidance, which multiplies the difference of two predictions.
How far a student's difference is off shows in pairs alone; the loss `guided` compares it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leansd.errors import LeansdError
from leansd.incubation.batches import Batch, Conditions, Source, State, Stream

PAIR = 2


@dataclass(frozen=True)
class PairedSource:
    """Pairs of the samples of another source, which is asked for half as many."""

    source: Source

    @property
    def fingerprint(self) -> str:
        return f"{self.source.fingerprint}-paired"

    @property
    def empty(self) -> Conditions:
        return self.source.empty

    def open(
        self,
        *,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        state: State | None = None,
    ) -> PairedStream:
        """
        Raises:
            LeansdError: the batch is odd.
        """
        if batch % PAIR:
            raise LeansdError(f"paired data come two by two: a batch of {batch} is odd")
        inner = self.source.open(
            batch=batch // PAIR, seed=seed, rank=rank, world=world, state=state
        )
        return PairedStream(inner, self.empty)


@dataclass(frozen=True)
class PairedStream:
    """A stream whose rows come with and without their prompts, in turns."""

    stream: Stream
    empty: Conditions

    def __iter__(self) -> PairedStream:
        return self

    def __next__(self) -> Batch:
        return pair_up(next(self.stream), self.empty)

    def state(self) -> dict[str, Any]:
        return self.stream.state()


def pair_up(batch: Batch, empty: Conditions) -> Batch:
    """`batch` with twice the rows: after each the same latents under the empty prompt."""
    count = len(batch)

    def alternate(ones: Tensor, others: Tensor) -> Tensor:
        return torch.stack([ones, others], dim=1).flatten(0, 1)

    # What the empty prompt does not say, such as SDXL's sizes, is the picture's own.
    added = {
        name: alternate(rows, empty.added[name].expand_as(rows) if name in empty.added else rows)
        for name, rows in batch.added.items()
    }
    return Batch(
        batch.latents.repeat_interleave(PAIR, dim=0),
        alternate(batch.text, empty.text.expand(count, -1, -1)),
        added,
        tuple(key for key in batch.keys for _ in range(PAIR)),
        group=PAIR,
    )
