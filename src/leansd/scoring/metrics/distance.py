"""FID, and the same distance in the tiny CLIP's features."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from leansd.evaluation.frechet import frechet_distance
from leansd.scoring.features import Features
from leansd.scoring.metrics.metric import Against, Metric, Score, require_reference
from leansd.scoring.references import Reference


def compare_gaussians(
    features: Features, reference: Reference | None, *, extractor: str, metric: str, title: str
) -> Sequence[Score]:
    """The Fréchet distance of a set to its reference in an extractor's pooled features."""
    theirs = require_reference(reference).get_gaussian(extractor, "pooled")
    ours = features.get_gaussian(extractor, "pooled")
    return [Score(metric, title, frechet_distance(ours, theirs))]


FID = Metric(
    "inception",
    Against.GAUSSIAN,
    partial(compare_gaussians, extractor="inception", metric="fid", title="FID"),
    "FID: Fréchet distance to the reference in InceptionV3's pooled features (arXiv 1706.08500); "
    "0 is equal. With few pictures it is too large, so compare sets of the same size only; "
    "10,000 and more are usual.",
)
TINY_FRECHET = Metric(
    "tiny-clip",
    Against.GAUSSIAN,
    partial(
        compare_gaussians,
        extractor="tiny-clip",
        metric="frechet_tiny_clip",
        title="Fréchet (tiny CLIP)",
    ),
    "Fréchet (tiny CLIP): the distance of FID in the features of the embedded model's tiny CLIP, "
    "which knows emoji only; no FID, and not to be compared with one.",
)
