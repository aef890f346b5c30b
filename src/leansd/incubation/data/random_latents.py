"""`random`: normal latents with prompts, for dry runs and tests.

Nothing is learned from them but what a net does everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from leansd.errors import LeansdError
from leansd.incubation.data.batches import Batch, Conditioning, StreamState
from leansd.incubation.data.encoding import embed, has_sizes, make_time_ids
from leansd.incubation.noise import seed_generator


@dataclass(frozen=True)
class RandomLatents:
    """Latents from a seed, each with one of a few conditions."""

    shape: tuple[int, int, int]
    """Of one sample, (C, h, w)."""
    texts: Tensor
    """[N, T, D]."""
    added: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """[N, ...] by name."""
    without: Conditioning | None = None
    """The empty prompt, where it may be asked for."""

    @property
    def empty(self) -> Conditioning:
        if self.without is None:
            raise LeansdError("these random latents come without the empty prompt")
        return self.without

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.shape).encode())
        digest.update(self.texts.float().numpy().tobytes())
        return digest.hexdigest()[:12]

    def open(
        self,
        *,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        state: StreamState | None = None,
    ) -> RandomStream:
        drawn = int(state["drawn"]) if state is not None else 0
        return RandomStream(self, batch, seed, rank, world, drawn)


@dataclass
class RandomStream:
    """Batches of them."""

    source: RandomLatents
    batch: int
    seed: int
    rank: int
    world: int
    drawn: int = 0
    """Samples of all ranks so far."""

    def __next__(self) -> Batch:
        first = self.drawn + self.rank * self.batch
        numbers = range(first, first + self.batch)
        self.drawn += self.batch * self.world
        latents, rows = zip(*(self._draw(number) for number in numbers), strict=True)
        picked = torch.tensor(rows)
        return Batch(
            torch.stack(latents),
            self.source.texts[picked],
            {name: tensor[picked] for name, tensor in self.source.added.items()},
            tuple(str(number) for number in numbers),
        )

    def state(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def close(self) -> None:
        """Nothing reads ahead."""

    def _draw(self, number: int) -> tuple[Tensor, int]:
        generator = seed_generator(self.seed, "latents", number)
        row = int(torch.randint(len(self.source.texts), (), generator=generator))
        return torch.randn(self.source.shape, generator=generator), row


@torch.no_grad()
def make_random_latents(pipe: Any, prompts: Sequence[str]) -> RandomLatents:
    """Latents of a pipeline's size under its own conditions for some prompts."""
    texts, empty = (embed(pipe, list(each)) for each in (prompts, [""]))
    config = pipe.unet.config
    side = config.sample_size
    added = {name: rows.float() for name, rows in texts.added.items()}
    if has_sizes(pipe):
        pixels = side * pipe.vae_scale_factor
        added["time_ids"] = make_time_ids((pixels,) * 2, (0, 0), pixels).repeat(len(prompts), 1)
    without = Conditioning(
        empty.text.float(), {name: rows.float() for name, rows in empty.added.items()}
    )
    return RandomLatents((config.in_channels, side, side), texts.text.float(), added, without)
