"""LPIPS of each picture to the one of the same id in the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from leansd.scoring.features import Features
from leansd.scoring.metrics.metric import Against, Metric, Score, summarise_values
from leansd.scoring.references import Reference


def score_distances(features: Features, reference: Reference | None) -> Sequence[Score]:
    """The mean distance."""
    distances = torch.cat(list(features.read("lpips", "distances")))
    return [summarise_values("lpips", "LPIPS", distances)]


LPIPS = Metric(
    "lpips",
    Against.PARTNERS,
    score_distances,
    "LPIPS: learned perceptual distance (arXiv 1801.03924, AlexNet) of each picture to the "
    "reference's of the same id, after ± its standard error; 0 is equal.",
)
