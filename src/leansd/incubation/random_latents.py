"""`random`: normal latents with prompts, for dry runs and tests. Nothing is learned from them but
what a net does everywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from leansd.errors import LeansdError
from leansd.incubation.batches import Batch, Conditions, State
from leansd.incubation.noise import seed_generator
from leansd.incubation.recipe import DataSettings
from leansd.incubation.sources import DataSetting


@dataclass(frozen=True)
class RandomLatents:
    """Latents from a seed, each with one of a few conditions."""

    shape: tuple[int, int, int]
    """Of one sample, (C, h, w)."""
    texts: Tensor
    """[N, T, D]."""
    added: Mapping[str, Tensor] = field(default_factory=dict)
    """[N, ...] by name."""
    without: Conditions | None = None
    """The empty prompt, where it may be asked for."""

    @property
    def empty(self) -> Conditions:
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
        state: State | None = None,
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

    def __iter__(self) -> RandomStream:
        return self

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

    def _draw(self, number: int) -> tuple[Tensor, int]:
        generator = seed_generator(self.seed, "latents", number)
        row = int(torch.randint(len(self.source.texts), (), generator=generator))
        return torch.randn(self.source.shape, generator=generator), row


def open_source(data: DataSettings, setting: DataSetting) -> RandomLatents:
    """
    Raises:
        LeansdError: there are no prompts, or an option is none.
    """
    options = data.options
    unknown = sorted(set(options) - {"prompts"})
    if unknown:
        raise LeansdError(f"data: random has no option {unknown[0]!r}; there is prompts")
    prompts: Sequence[str] = options.get("prompts") or []
    if not prompts:
        raise LeansdError("data: random needs prompts")
    pipe = setting.pipe
    unet = pipe.unet
    with torch.no_grad():
        texts, added = embed_prompts(pipe, list(prompts), setting.device)
        text, pooled = embed_prompts(pipe, [""], setting.device)
    pooled.pop("time_ids", None)  # a picture's own: an empty prompt says nothing of its size
    empty = Conditions(text.cpu().float(), pooled)
    side = unet.config.sample_size
    return RandomLatents((unet.config.in_channels, side, side), texts.cpu().float(), added, empty)


def embed_prompts(
    pipe: Any, prompts: list[str], device: torch.device
) -> tuple[Tensor, dict[str, Tensor]]:
    """What a UNet attends to for each prompt [N, T, D], and SDXL's further conditions."""
    if getattr(pipe, "text_encoder_2", None) is None:
        text, _ = pipe.encode_prompt(prompts, device, 1, False)
        return text, {}
    text, _, pooled, _ = pipe.encode_prompt(
        prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    side = float(pipe.unet.config.sample_size * pipe.vae_scale_factor)
    sizes = torch.tensor([[side, side, 0.0, 0.0, side, side]]).repeat(len(prompts), 1)
    return text, {"text_embeds": pooled.cpu().float(), "time_ids": sizes}
