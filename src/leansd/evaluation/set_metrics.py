"""Metrics of sets of pictures, from the features that extractors saw in them.

They are computed here although libraries have them: torch-fidelity is an optional extra and the
tiny CLIP's numbers need none, its inception score depends on the order of a set, and what it and
torchmetrics offer holds a whole set in memory where these sums are over parts kept on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from leansd.errors import LeansdError
from leansd.evaluation.extraction import Features, Statistics
from leansd.evaluation.frechet import Gaussian, frechet_distance

SPLITS = 10
NEIGHBOURS = 3
PART = 1024  # rows of distances that are in memory at a time


class ReferenceKind(Enum):
    """What a set is held against."""

    PROMPTS = "prompts"
    NOTHING = "nothing"
    GAUSSIAN = "statistics"
    FEATURES = "pictures"
    PARTNERS = "partners"

    @property
    def needs_reference(self) -> bool:
        return self in (
            ReferenceKind.GAUSSIAN,
            ReferenceKind.FEATURES,
            ReferenceKind.PARTNERS,
        )


@dataclass(frozen=True)
class Reference:
    """What a set is held against: other pictures, or the statistics of some.

    Attributes:
        count: pictures; 0 where nobody says.
        features: of its pictures; None where there are statistics only.
        statistics: from a file, where there are no pictures.
        marks: fingerprints of the extractors here.
    """

    name: str
    count: int
    features: Features | None = None
    statistics: Statistics | None = None
    marks: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_pictures(cls, features: Features) -> Reference:
        folder = features.pictures.folder
        return cls(folder.resolve().name, len(features.pictures), features)

    def get_gaussian(self, extractor: str) -> Gaussian:
        """The Gaussian of its pooled features.

        Raises:
            LeansdError: a file was made with other weights, or of pictures resized otherwise.
        """
        if self.features is not None:
            return self.features.get_gaussian(extractor, "pooled")
        assert self.statistics is not None
        if self.statistics.mark not in ("", self.marks[extractor]):
            raise LeansdError(
                f"{self.name} was made by another network or resize than {extractor} here: give "
                "the pictures themselves by --reference FOLDER"
            )
        return self.statistics.gaussian

    def get_pooled(self, extractor: str) -> Tensor:
        """All pooled features [n, d].

        Raises:
            LeansdError: there are statistics only.
        """
        if self.features is None:
            raise LeansdError(
                f"precision and recall need the reference's pictures, and {self.name} has only "
                "statistics: give --reference FOLDER"
            )
        return torch.cat(list(self.features.read(extractor, "pooled")))


@dataclass(frozen=True)
class Score:
    """One number of a set.

    Attributes:
        metric: as records have it; names of the tiny CLIP's say so.
        title: as tables have it.
        values: what it is the mean of, one a picture [n]; None where it is of the whole set.
        spread: after ±, by the name of what it is.
    """

    metric: str
    title: str
    value: float
    values: Tensor | None = None
    spread: Mapping[str, float] = field(default_factory=dict)
    fields: Mapping[str, float | int | str] = field(default_factory=dict)


ComputeScores: TypeAlias = Callable[[Features, Reference | None], Sequence[Score]]


@dataclass(frozen=True)
class SetMetric:
    """How numbers are made.

    Attributes:
        extractor: whose features they are made from.
        meaning: for readers, in a sentence, with its source.
    """

    extractor: str
    against: ReferenceKind
    compute: ComputeScores
    meaning: str


def require_reference(reference: Reference | None) -> Reference:
    """The reference.

    Raises:
        LeansdError: there is none.
    """
    if reference is None:
        raise LeansdError("nothing to compare with: give --reference FOLDER or STATISTICS")
    return reference


def summarise_values(metric: str, title: str, values: Tensor) -> Score:
    """The mean of values [n], with its standard error."""
    exact = values.double()
    spread = {"standard_error": float(exact.std() / len(exact) ** 0.5)} if len(exact) > 1 else {}
    return Score(metric, title, float(exact.mean()), values, spread)


# -- scores of features ------------------------------------------------------------------------


def compare_gaussians(
    features: Features, reference: Reference | None, *, extractor: str, metric: str, title: str
) -> Sequence[Score]:
    """The Fréchet distance of a set to its reference in an extractor's pooled features."""
    theirs = require_reference(reference).get_gaussian(extractor)
    ours = features.get_gaussian(extractor, "pooled")
    return [Score(metric, title, frechet_distance(ours, theirs))]


def score_inception(features: Features, reference: Reference | None) -> Sequence[Score]:
    """The inception score of a set."""
    mean, deviation = measure_inception_score(features.read("inception", "logits"))
    splits = min(SPLITS, len(features.pictures))
    return [
        Score(
            "inception_score",
            "IS",
            mean,
            spread={"split_deviation": deviation},
            fields={"splits": splits},
        )
    ]


def score_agreement(
    features: Features, reference: Reference | None, *, extractor: str, metric: str, title: str
) -> Sequence[Score]:
    """100 x the cosine of each picture and its prompt.

    Raises:
        LeansdError: a picture has no prompt.
    """
    scores = torch.cat(list(features.read(extractor, "scores")))
    silent = scores.isnan().nonzero().flatten().tolist()
    if silent:
        names = [entry.id for entry in features.pictures.entries]
        raise LeansdError(
            f"{len(silent)} of {len(names)} pictures have no prompt, {names[silent[0]]} for one: "
            "put it beside the picture as ID.json with a prompt, or as ID.txt"
        )
    return [summarise_values(metric, title, scores)]


def score_distances(features: Features, reference: Reference | None) -> Sequence[Score]:
    """The mean LPIPS of each picture to the one of the same id in the reference."""
    distances = torch.cat(list(features.read("lpips", "distances")))
    return [summarise_values("lpips", "LPIPS", distances)]


def compare_manifolds(
    features: Features, reference: Reference | None, *, extractor: str, mark: str, title: str
) -> Sequence[Score]:
    """Precision and recall, in an extractor's pooled features."""
    theirs = require_reference(reference).get_pooled(extractor)
    ours = torch.cat(list(features.read(extractor, "pooled")))
    shares = measure_precision_and_recall(ours, theirs)
    return [
        Score(f"{name}{mark}", f"{name}{title}", share, fields={"neighbours": NEIGHBOURS})
        for name, share in zip(("precision", "recall"), shares, strict=True)
    ]


# -- arithmetic --------------------------------------------------------------------------------


def measure_inception_score(parts: Iterable[Tensor], splits: int = SPLITS) -> tuple[float, float]:
    """Mean and deviation over splits of exp(KL(p(y|x) || p(y))), from logits [n, classes].

    Salimans et al., arXiv 1606.03498. Pictures are dealt to the splits in turns, in their order.
    What a split needs are two sums, so parts are let go of one by one.
    """
    count = torch.zeros(splits, dtype=torch.float64)
    chances = negentropy = None
    dealt = 0
    for logits in parts:
        logarithms = logits.double().log_softmax(1)
        own = logarithms.exp()
        split = torch.arange(dealt, dealt + len(own)) % splits
        if chances is None or negentropy is None:
            chances = torch.zeros(splits, own.shape[1], dtype=torch.float64)
            negentropy = torch.zeros(splits, dtype=torch.float64)
        chances.index_add_(0, split, own)
        negentropy.index_add_(0, split, (own * logarithms).sum(1))
        count.index_add_(0, split, torch.ones(len(own), dtype=torch.float64))
        dealt += len(own)
    if chances is None or negentropy is None:
        return 0.0, 0.0
    used = count > 0
    count, chances, negentropy = count[used], chances[used], negentropy[used]
    # The mean of KL(p || m) is the mean of sum p log p, less sum m log m of the mean m.
    marginal = chances / count[:, None]
    scores = (negentropy / count - torch.special.xlogy(marginal, marginal).sum(1)).exp()
    return float(scores.mean()), float(scores.std(correction=0))


def measure_radii(features: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """The squared distance of every picture [n, d] to its k-th nearest neighbour, [n].

    Raises:
        LeansdError: there are too few pictures to have so many.
    """
    if len(features) <= neighbours:
        raise LeansdError(
            f"precision and recall need more than {neighbours} pictures in either set, not "
            f"{len(features)}"
        )
    radii: list[Tensor] = []
    for begin in range(0, len(features), PART):
        distances = square_distances(features[begin : begin + PART], features)
        # A picture is no neighbour of its own; equal ones are each other's.
        rows = torch.arange(len(distances))
        distances[rows, rows + begin] = torch.inf
        radii.append(distances.kthvalue(neighbours, dim=1).values)
    return torch.cat(radii)


def measure_precision_and_recall(
    features: Tensor, reference: Tensor, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """The share of pictures [n, d] on the reference's manifold [m, d], and the reverse.

    A manifold is the balls around a set's pictures that reach to their k-th nearest neighbour in
    the set: Kynkäänniemi et al., arXiv 1904.06991.
    """
    # About the middle, or rounding would be that of numbers far from 0.
    middle = reference.double().mean(0)
    ours, theirs = features.double() - middle, reference.double() - middle
    our_radii, their_radii = measure_radii(ours, neighbours), measure_radii(theirs, neighbours)
    true = torch.zeros(len(ours), dtype=torch.bool)
    covered = torch.zeros(len(theirs), dtype=torch.bool)
    for begin in range(0, len(ours), PART):
        distances = square_distances(ours[begin : begin + PART], theirs)
        true[begin : begin + PART] = (distances <= their_radii).any(1)
        covered |= (distances <= our_radii[begin : begin + PART, None]).any(0)
    return float(true.double().mean()), float(covered.double().mean())


def square_distances(one: Tensor, two: Tensor) -> Tensor:
    """Of every row of [n, d] to every row of [m, d], [n, m]."""
    sizes = one.square().sum(1)[:, None] + two.square().sum(1)
    return (sizes - 2 * one @ two.T).clamp_min_(0)


# -- the metrics -------------------------------------------------------------------------------

METRICS: dict[str, SetMetric] = {
    "fid": SetMetric(
        "inception",
        ReferenceKind.GAUSSIAN,
        partial(compare_gaussians, extractor="inception", metric="fid", title="FID"),
        "FID: Fréchet distance to the reference in InceptionV3's pooled features (arXiv "
        "1706.08500); 0 is equal. With few pictures it is too large, so compare sets of the same "
        "size only; 10,000 and more are usual.",
    ),
    "is": SetMetric(
        "inception",
        ReferenceKind.NOTHING,
        score_inception,
        "IS: inception score (arXiv 1606.03498), after ± its deviation over 10 splits; higher is "
        "better. It knows ImageNet's classes only, and looks at no reference.",
    ),
    "clip": SetMetric(
        "clip",
        ReferenceKind.PROMPTS,
        partial(score_agreement, extractor="clip", metric="clip_score", title="CLIP score"),
        "CLIP score: 100 x cosine of picture and prompt (arXiv 2104.08718), after ± its standard "
        "error; higher is better. Scores of different CLIPs are not to be compared.",
    ),
    "lpips": SetMetric(
        "lpips",
        ReferenceKind.PARTNERS,
        score_distances,
        "LPIPS: learned perceptual distance (arXiv 1801.03924, AlexNet) of each picture to the "
        "reference's of the same id, after ± its standard error; 0 is equal.",
    ),
    "precision": SetMetric(
        "inception",
        ReferenceKind.FEATURES,
        partial(compare_manifolds, extractor="inception", mark="", title=""),
        "Precision: the share of pictures that lie among the reference's, within the distance of "
        "a third neighbour; recall: the reverse (arXiv 1904.06991, here in InceptionV3's pooled "
        "features). Both grow with the number of pictures; compare sets of the same size only.",
    ),
    "tiny-frechet": SetMetric(
        "tiny-clip",
        ReferenceKind.GAUSSIAN,
        partial(
            compare_gaussians,
            extractor="tiny-clip",
            metric="frechet_tiny_clip",
            title="Fréchet (tiny CLIP)",
        ),
        "Fréchet (tiny CLIP): the distance of FID in the features of the embedded model's tiny "
        "CLIP, which knows emoji only; no FID, and not to be compared with one.",
    ),
    "tiny-clip": SetMetric(
        "tiny-clip",
        ReferenceKind.PROMPTS,
        partial(
            score_agreement,
            extractor="tiny-clip",
            metric="clip_score_tiny_clip",
            title="CLIP score (tiny CLIP)",
        ),
        "CLIP score (tiny CLIP): 100 x cosine of picture and prompt in the eyes of the embedded "
        "model's tiny CLIP, which knows emoji only.",
    ),
    "tiny-precision": SetMetric(
        "tiny-clip",
        ReferenceKind.FEATURES,
        partial(compare_manifolds, extractor="tiny-clip", mark="_tiny_clip", title=" (tiny CLIP)"),
        "Precision and recall (tiny CLIP): the shares of arXiv 1904.06991 in the features of the "
        "embedded model's tiny CLIP, which knows emoji only.",
    ),
}
"""By the names that `--metrics` takes."""
