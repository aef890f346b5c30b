"""Quality of a set of pictures, as a CLIP sees it: does it show the prompts, does it look alike?

Sets are Gaussians in a space of features, made from running sums.

Fidelity asks whether a picture is still the same one; quality asks whether it is as good a one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from leansd.errors import LeansdError
from leansd.evaluation.fidelity import Measure
from leansd.evaluation.runs import FULL

# -- sets as Gaussians -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Gaussian:
    """A set's mean [d] and covariance [d, d] in double precision.

    Attributes:
        count: pictures that it was made from; 0 where nobody says.
    """

    count: int
    mean: Tensor
    covariance: Tensor


def measure_gaussian(features: Tensor) -> Gaussian:
    """The Gaussian of features [n, d]."""
    some = features.double()
    mean = some.mean(0)
    centred = some - mean
    return Gaussian(len(some), mean, centred.T @ centred / max(1, len(some) - 1))


def merge_gaussians(one: Gaussian, two: Gaussian) -> Gaussian:
    """The Gaussian of two sets together, as if they had been one.

    Scatters about the common mean (Chan, Golub and LeVeque 1983): nothing large is taken away from
    something large, so it does not matter how a set was cut.
    """
    count = one.count + two.count
    shift = two.mean - one.mean
    scatter = one.covariance * (one.count - 1) + two.covariance * (two.count - 1)
    scatter += torch.outer(shift, shift) * (one.count * two.count / count)
    mean = one.mean + shift * (two.count / count)
    return Gaussian(count, mean, scatter / max(1, count - 1))


def fold_gaussian(parts: Iterable[Tensor]) -> Gaussian:
    """The Gaussian of a set that comes in parts [n, d], one in memory at a time."""
    return reduce(merge_gaussians, (measure_gaussian(part) for part in parts if len(part)))


def frechet_distance(one: Gaussian, two: Gaussian) -> float:
    """The Fréchet distance of two Gaussians, as FID has it (Heusel et al., arXiv 1706.08500).

    With few pictures it is too large by an amount that depends on how many there are, so compare
    distances between sets of the same sizes only.

    Raises:
        LeansdError: they are of different features, or one is of a single picture.
    """
    if 1 in (one.count, two.count):
        raise LeansdError("a Fréchet distance needs at least 2 pictures in either set")
    if one.mean.shape != two.mean.shape:
        raise LeansdError(
            f"features of width {len(one.mean)} cannot be compared with statistics of width "
            f"{len(two.mean)}: they were made by another network"
        )
    shift = (one.mean - two.mean).square().sum()
    # The trace of the root of AB is that of the root of a'Ba where aa' = A, which is symmetric:
    # its eigenvalues are real, and rounding cannot make them complex.
    values, vectors = torch.linalg.eigh(one.covariance)
    root = vectors * values.clamp_min(0).sqrt()
    overlap = torch.linalg.eigvalsh(root.T @ two.covariance @ root).clamp_min(0).sqrt().sum()
    distance = shift + one.covariance.trace() + two.covariance.trace() - 2 * overlap
    return max(0.0, float(distance))


# -- what a CLIP sees ------------------------------------------------------------------------------

OTHER_SEEDS = "full, other seeds"
"""The reference of a Fréchet distance that is free of shared seeds."""
PART = 64  # pictures or prompts that are embedded at once

# Of OpenAI's CLIP, where a folder does not say: what its pictures were normalized by.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Embedder:
    """A CLIP with what belongs before it.

    Attributes:
        name: what tables call it.
        side: of the pictures that the vision tower takes, in pixels.
        normalize: pictures [n, 3, side, side] in 0..1 to what the vision tower was trained on.
        tokenize: prompts to token ids [n, tokens].
    """

    name: str
    clip: Any
    side: int
    normalize: Callable[[Tensor], Tensor]
    tokenize: Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class Embedded:
    """A set of pictures in a CLIP's eyes: pooled features [n, width] and unit vectors [n, dim]."""

    features: Tensor
    vectors: Tensor


def open_clip(folder: str | Path) -> Embedder:
    """A CLIP in the layout of transformers, tokenizer included.

    Raises:
        LeansdError: there is none in the folder.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise LeansdError(
            f"no CLIP in {folder}: give a folder with config.json, the weights and the tokenizer "
            "of a CLIPModel, such as a copy of openai/clip-vit-base-patch32"
        )
    try:
        clip = CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise LeansdError(f"cannot open the CLIP in {folder}: {error}") from error
    mean, std = _read_normalization(folder)

    def tokenize(prompts: Sequence[str]) -> Tensor:
        return tokenizer(
            list(prompts), padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids

    side: Any = clip.vision_model.config.image_size
    return Embedder(folder.name, clip, side, lambda pictures: (pictures - mean) / std, tokenize)


@torch.no_grad()
def embed_pictures(embedder: Embedder, pictures: Tensor) -> Embedded:
    """Look at pictures [n, 3, H, W], floats in 0..1 or 8 bits: their middle square, resized."""
    clip = embedder.clip
    features: list[Tensor] = []
    vectors: list[Tensor] = []
    for part in pictures.split(PART):
        fitted = _fit(_as_floats(part), embedder.side)
        pixels = embedder.normalize(fitted).to(clip.device)
        pooled = clip.vision_model(pixel_values=pixels).pooler_output
        features.append(pooled.cpu())
        vectors.append(F.normalize(clip.visual_projection(pooled), dim=-1).cpu())
    return Embedded(torch.cat(features), torch.cat(vectors))


@torch.no_grad()
def embed_prompts(embedder: Embedder, prompts: Sequence[str]) -> Tensor:
    """Prompts as unit vectors [n, dim]."""
    clip = embedder.clip
    vectors: list[Tensor] = []
    for part in embedder.tokenize(prompts).split(PART):
        pooled = clip.text_model(input_ids=part.to(clip.device)).pooler_output
        vectors.append(F.normalize(clip.text_projection(pooled), dim=-1).cpu())
    return torch.cat(vectors)


def clip_score(pictures: Tensor, prompts: Tensor) -> Tensor:
    """100 x the cosine of each picture and its own prompt; both unit vectors [n, dim], gives [n].

    Hessel et al., arXiv 2104.08718, without the cut at 0, which would hide a bad picture.
    """
    return 100 * (pictures * prompts).sum(1)


def rank_prompts(pictures: Tensor, choices: Tensor, own: Sequence[int]) -> Tensor:
    """How many of the choices each picture suits better than its own prompt; 0 is best, [n].

    Args:
        pictures: unit vectors [n, dim].
        choices: unit vectors of different prompts [m, dim].
        own: the place among the choices of each picture's prompt.
    """
    likeness = pictures @ choices.T
    right = likeness[torch.arange(len(pictures)), torch.as_tensor(own)]
    return (likeness > right[:, None]).sum(1)


class QualityJudge:
    """The quality of sets in a CLIP's eyes, beside the full run's own sets.

    Args:
        prompts: of the pictures; None where they cannot be read.
        first: the full run's pictures from the same seeds.
        sets: further sets of the full run, from other seeds.
    """

    def __init__(
        self,
        embedder: Embedder,
        prompts: Sequence[str] | None,
        first: Embedded,
        sets: Sequence[Embedded] = (),
    ) -> None:
        self.embedder = embedder
        self.first = measure_gaussian(first.features)
        self.sets = [measure_gaussian(each.features) for each in sets]
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
        clip = {"clip": self.embedder.name}
        for name, values in self._score(seen):
            spread = {"seed_spread": self.spreads[name]} if self.sets else {}
            yield Measure(name, "", values, {**clip, "choices": len(set(self.own)), **spread})
        if len(pictures) < 2:  # one picture is no set
            return
        own = measure_gaussian(seen.features)
        near = torch.tensor([frechet_distance(own, self.first)])
        yield Measure("frechet", "", near, {**clip, "reference": FULL})
        if self.sets:
            far = [frechet_distance(own, each) for each in self.sets]
            spread = {"seed_spread": float(torch.tensor(far).std())} if len(far) > 1 else {}
            mean = torch.tensor([sum(far) / len(far)])
            fields = {**clip, "reference": OTHER_SEEDS, "sets": len(far), **spread}
            yield Measure("frechet", "", mean, fields)

    def _score(self, seen: Embedded) -> Iterator[tuple[str, Tensor]]:
        if self.choices is None:
            return
        yield "clip_score", clip_score(seen.vectors, self.choices[self.own])
        if len(self.choices) > 1:
            ranks = rank_prompts(seen.vectors, self.choices, self.own)
            yield "retrieval", (ranks == 0).float()


def _read_normalization(folder: Path) -> tuple[Tensor, Tensor]:
    """Mean and deviation, [3, 1, 1] each."""
    file = folder / "preprocessor_config.json"
    facts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    pair = facts.get("image_mean", _MEAN), facts.get("image_std", _STD)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in pair)
    return mean, std


def _as_floats(pictures: Tensor) -> Tensor:
    return pictures.float() if pictures.is_floating_point() else pictures.float() / 255


def _fit(pictures: Tensor, side: int) -> Tensor:
    """The middle square of pictures [n, 3, H, W] at [n, 3, side, side]."""
    height, width = pictures.shape[-2:]
    if (height, width) == (side, side):
        return pictures
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    square = pictures[..., top : top + short, left : left + short]
    fitted = F.interpolate(square, (side, side), mode="bicubic", antialias=True)
    return fitted.clamp(0, 1)
