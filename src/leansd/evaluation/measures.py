"""Measures: what is said of a case's pictures, one value a picture or one for the whole set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leansd.evaluation.cases import Case, Drawings
from leansd.evaluation.fidelity import Lpips, latent_error, psnr, ssim
from leansd.evaluation.quality import (
    Embedded,
    Embedder,
    clip_score,
    embed_pictures,
    embed_prompts,
    frechet_distance,
    rank_prompts,
)
from leansd.evaluation.records import Record

FULL = "full"
OTHER_SEEDS = "full, other seeds"
"""The reference of a Fréchet distance that is free of shared seeds."""
PART = 16  # pictures that are compared at once


@dataclass(frozen=True)
class Measure:
    """A metric of one case: a value a picture, or one for the whole set."""

    metric: str
    unit: str
    values: Tensor  # [n], or [1] for a whole set
    fields: Mapping[str, Any]

    def list_values(self, base: Mapping[str, Any]) -> Iterator[Record]:
        if len(self.values) == 1:
            return
        for place, value in enumerate(self.values.tolist()):
            facts = {**base, **self.fields, "seed": base["seed"] + place, "picture": place}
            facts.pop("seed_spread", None)
            yield Record(**facts, metric=self.metric, value=value, unit=self.unit)

    def summarise(self, base: Mapping[str, Any]) -> Record:
        values = self.values.double()
        facts = {**base, **self.fields}
        if len(values) > 1:
            facts["standard_error"] = float(values.std() / len(values) ** 0.5)
        value = float(values.mean())
        return Record(**facts, metric=self.metric, value=value, unit=self.unit)


def compare_drawings(
    drawn: Drawings, reference: Drawings, case: Case, lpips: Lpips | None
) -> Iterator[Measure]:
    """Every fidelity to one reference."""
    fields = {"reference": case.name, "reference_steps": case.steps}
    metrics = [("psnr", "dB", psnr), ("ssim", "", ssim)]
    metrics += [("lpips", "", lpips)] if lpips is not None else []
    for name, unit, metric in metrics:
        pairs = zip(drawn.pictures.split(PART), reference.pictures.split(PART), strict=True)
        parts = [metric(ours.float() / 255, theirs.float() / 255) for ours, theirs in pairs]
        yield Measure(name, unit, torch.cat(parts), fields)
    error = latent_error(drawn.latents, reference.latents)
    yield Measure("latent_error", "", error, fields)


class Judge:
    """The quality of sets in a CLIP's eyes, beside the full run's own sets."""

    def __init__(
        self,
        embedder: Embedder,
        prompts: Sequence[str] | None,
        first: Embedded,
        sets: Sequence[Embedded],
    ) -> None:
        self.embedder, self.first, self.sets = embedder, first, sets
        self.choices, self.own = None, []
        if prompts is not None:
            distinct = list(dict.fromkeys(prompts))
            self.choices = embed_prompts(embedder, distinct)
            self.own = [distinct.index(prompt) for prompt in prompts]
        self.spreads: dict[str, float] = {}
        if sets:
            drawn = [dict(self._score(each)) for each in (first, *sets)]
            for name in drawn[0]:
                means = torch.stack([values[name].double().mean() for values in drawn])
                self.spreads[name] = float(means.std())

    def judge(self, pictures: Tensor) -> Iterator[Measure]:
        """Agreement with the prompts, and distances to the full run's sets."""
        seen = embed_pictures(self.embedder, pictures)
        eyes = {"clip": self.embedder.name}
        for name, values in self._score(seen):
            spread = {"seed_spread": self.spreads[name]} if self.sets else {}
            yield Measure(name, "", values, {**eyes, "choices": len(set(self.own)), **spread})
        near = torch.tensor([frechet_distance(seen.features, self.first.features)])
        yield Measure("frechet", "", near, {**eyes, "reference": FULL})
        if self.sets:
            far = [frechet_distance(seen.features, each.features) for each in self.sets]
            spread = {"seed_spread": float(torch.tensor(far).std())} if len(far) > 1 else {}
            mean = torch.tensor([sum(far) / len(far)])
            fields = {**eyes, "reference": OTHER_SEEDS, "sets": len(far), **spread}
            yield Measure("frechet", "", mean, fields)

    def _score(self, seen: Embedded) -> Iterator[tuple[str, Tensor]]:
        if self.choices is None:
            return
        yield "clip_score", clip_score(seen.vectors, self.choices[self.own])
        if len(self.choices) > 1:
            ranks = rank_prompts(seen.vectors, self.choices, self.own)
            yield "retrieval", (ranks == 0).float()
