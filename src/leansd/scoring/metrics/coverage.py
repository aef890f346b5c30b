"""Precision and recall of a set among its reference."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from leansd.scoring.features import Features
from leansd.scoring.manifolds import NEIGHBOURS, measure_precision_and_recall
from leansd.scoring.metrics.metric import Against, Metric, Score, require_reference
from leansd.scoring.references import Reference


def compare_manifolds(
    features: Features, reference: Reference | None, *, extractor: str, mark: str, title: str
) -> Sequence[Score]:
    """Both shares, in an extractor's pooled features."""
    theirs = require_reference(reference).get_features(extractor, "pooled")
    ours = torch.cat(list(features.read(extractor, "pooled")))
    shares = measure_precision_and_recall(ours, theirs)
    return [
        Score(f"{name}{mark}", f"{name}{title}", share, fields={"neighbours": NEIGHBOURS})
        for name, share in zip(("precision", "recall"), shares, strict=True)
    ]


PRECISION = Metric(
    "inception",
    Against.FEATURES,
    partial(compare_manifolds, extractor="inception", mark="", title=""),
    "Precision: the share of pictures that lie among the reference's, within the distance of a "
    "third neighbour; recall: the reverse (arXiv 1904.06991, here in InceptionV3's pooled "
    "features). Both grow with the number of pictures; compare sets of the same size only.",
)
TINY_PRECISION = Metric(
    "tiny-clip",
    Against.FEATURES,
    partial(compare_manifolds, extractor="tiny-clip", mark="_tiny_clip", title=" (tiny CLIP)"),
    "Precision and recall (tiny CLIP): the shares of arXiv 1904.06991 in the features of the "
    "embedded model's tiny CLIP, which knows emoji only.",
)
