"""Metrics of sets of pictures, from the features that extractors saw in them.

The inception score is torch-fidelity's. Fréchet distance, precision and recall are computed here:
the tiny CLIP's need no extra package, sums over parts lose no digits, and releases of
torch-fidelity differ in which of two sets is the generated one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TypeAlias

import torch
from torch import Tensor

from leansd.errors import LeansdError
from leansd.evaluation.extraction import Features, Statistics
from leansd.evaluation.quality import frechet_distance

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
        return self not in (ReferenceKind.PROMPTS, ReferenceKind.NOTHING)


Reference: TypeAlias = Features | Statistics
"""Other pictures, or the statistics of some."""


@dataclass(frozen=True)
class Score:
    """One number of a set.

    Attributes:
        values: what it is the mean of, one a picture [n]; None where it is of the whole set.
        spread: after ±, by the name of what it is.
        metric: as records have it; names of the tiny CLIP's say so.
        title: as tables have it.
    """

    value: float
    values: Tensor | None = None
    spread: Mapping[str, float] = field(default_factory=dict)
    fields: Mapping[str, float | int | str] = field(default_factory=dict)
    metric: str = ""
    title: str = ""


ComputeScores: TypeAlias = Callable[[Features, Reference | None, str], Sequence[Score]]
"""Given the set, its reference and the name of the extractor."""


@dataclass(frozen=True)
class SetMetric:
    """How numbers are made.

    Attributes:
        extractor: whose features they are made from.
        titles: what tables call them, by what records call them.
        meaning: for readers, in a sentence, with its source.
    """

    extractor: str
    against: ReferenceKind
    compute: ComputeScores
    titles: Mapping[str, str]
    meaning: str

    def score(self, features: Features, reference: Reference | None) -> list[Score]:
        """The numbers of a set; what they are made from has been extracted."""
        found = self.compute(features, reference, self.extractor)
        return [
            replace(score, metric=metric, title=title)
            for score, (metric, title) in zip(found, self.titles.items(), strict=True)
        ]


# -- scores of features ------------------------------------------------------------------------


def compare_gaussians(ours: Features, theirs: Reference | None, extractor: str) -> Sequence[Score]:
    """The Fréchet distance of a set to its reference in pooled features."""
    assert theirs is not None
    return [Score(frechet_distance(ours.get_gaussian(extractor), theirs.get_gaussian(extractor)))]


def score_inception(ours: Features, theirs: Reference | None, extractor: str) -> Sequence[Score]:
    """The inception score, as torch-fidelity has it (Salimans et al., arXiv 1606.03498)."""
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = ours.read_all(extractor, "logits")
    splits = min(SPLITS, len(logits))
    found = isc_features_to_metric(logits, splits)
    spread = {"split_deviation": found["inception_score_std"]}
    return [Score(found["inception_score_mean"], spread=spread, fields={"splits": splits})]


def score_agreement(ours: Features, theirs: Reference | None, extractor: str) -> Sequence[Score]:
    """100 x the cosine of each picture and its prompt.

    Raises:
        LeansdError: a picture has no prompt.
    """
    scores = ours.read_all(extractor, "scores")
    silent = scores.isnan().nonzero().flatten().tolist()
    if silent:
        names = [entry.id for entry in ours.pictures.entries]
        raise LeansdError(
            f"{len(silent)} of {len(names)} pictures have no prompt, {names[silent[0]]} for one: "
            "put it beside the picture as ID.json with a prompt, or as ID.txt"
        )
    return [summarise_values(scores)]


def score_distances(ours: Features, theirs: Reference | None, extractor: str) -> Sequence[Score]:
    """The mean LPIPS of each picture to the one of the same id in the reference."""
    return [summarise_values(ours.read_all(extractor, "distances"))]


def summarise_values(values: Tensor) -> Score:
    """The mean of values [n], with its standard error."""
    exact = values.double()
    spread = {"standard_error": float(exact.std() / len(exact) ** 0.5)} if len(exact) > 1 else {}
    return Score(float(exact.mean()), values, spread)


def compare_manifolds(ours: Features, theirs: Reference | None, extractor: str) -> Sequence[Score]:
    """Precision and recall, in pooled features."""
    assert isinstance(theirs, Features)
    shares = measure_precision_and_recall(ours.read_all(extractor), theirs.read_all(extractor))
    return [Score(share, fields={"neighbours": NEIGHBOURS}) for share in shares]


# -- arithmetic --------------------------------------------------------------------------------


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
    """Squared distances [n, m] of every row of [n, d] to every row of [m, d]."""
    sizes = one.square().sum(1)[:, None] + two.square().sum(1)
    return (sizes - 2 * one @ two.T).clamp_min_(0)


# -- the metrics -------------------------------------------------------------------------------

METRICS: dict[str, SetMetric] = {
    "fid": SetMetric(
        "inception",
        ReferenceKind.GAUSSIAN,
        compare_gaussians,
        {"fid": "FID"},
        "FID: Fréchet distance to the reference in InceptionV3's pooled features (arXiv "
        "1706.08500); 0 is equal. With few pictures it is too large, so compare sets of the same "
        "size only; 10,000 and more are usual.",
    ),
    "is": SetMetric(
        "inception",
        ReferenceKind.NOTHING,
        score_inception,
        {"inception_score": "IS"},
        "IS: inception score (arXiv 1606.03498), after ± its deviation over 10 splits; higher is "
        "better. It knows ImageNet's classes only, and looks at no reference.",
    ),
    "clip": SetMetric(
        "clip",
        ReferenceKind.PROMPTS,
        score_agreement,
        {"clip_score": "CLIP score"},
        "CLIP score: 100 x cosine of picture and prompt (arXiv 2104.08718), after ± its standard "
        "error; higher is better. Scores of different CLIPs are not to be compared.",
    ),
    "lpips": SetMetric(
        "lpips",
        ReferenceKind.PARTNERS,
        score_distances,
        {"lpips": "LPIPS"},
        "LPIPS: learned perceptual distance (arXiv 1801.03924, AlexNet) of each picture to the "
        "reference's of the same id, after ± its standard error; 0 is equal.",
    ),
    "precision": SetMetric(
        "inception",
        ReferenceKind.FEATURES,
        compare_manifolds,
        {"precision": "precision", "recall": "recall"},
        "Precision: the share of pictures that lie among the reference's, within the distance of "
        "a third neighbour; recall: the reverse (arXiv 1904.06991, here in InceptionV3's pooled "
        "features). Both grow with the number of pictures; compare sets of the same size only.",
    ),
    "tiny-frechet": SetMetric(
        "tiny-clip",
        ReferenceKind.GAUSSIAN,
        compare_gaussians,
        {"frechet_tiny_clip": "Fréchet (tiny CLIP)"},
        "Fréchet (tiny CLIP): the distance of FID in the features of the embedded model's tiny "
        "CLIP, which knows emoji only; no FID, and not to be compared with one.",
    ),
    "tiny-clip": SetMetric(
        "tiny-clip",
        ReferenceKind.PROMPTS,
        score_agreement,
        {"clip_score_tiny_clip": "CLIP score (tiny CLIP)"},
        "CLIP score (tiny CLIP): 100 x cosine of picture and prompt in the eyes of the embedded "
        "model's tiny CLIP, which knows emoji only.",
    ),
    "tiny-precision": SetMetric(
        "tiny-clip",
        ReferenceKind.FEATURES,
        compare_manifolds,
        {f"{name}_tiny_clip": f"{name} (tiny CLIP)" for name in ("precision", "recall")},
        "Precision and recall (tiny CLIP): the shares of arXiv 1904.06991 in the features of the "
        "embedded model's tiny CLIP, which knows emoji only.",
    ),
}
"""Metrics by the names that `--metrics` takes."""
