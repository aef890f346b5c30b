"""The order of samples and their chances: pure functions of the seed and the place.

A place is the number of a sample among all that are ever given, from 0 on without end. Nothing
else is needed to go on, and it does not matter who reads which of them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate

import torch
from torch import Tensor


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


class Order:
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
