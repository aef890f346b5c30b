"""The inception score: are single pictures clear, and all of them together varied?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from leansd.scoring.features import Features
from leansd.scoring.metrics.metric import Against, Metric, Score
from leansd.scoring.references import Reference

SPLITS = 10


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


def score_inception(features: Features, reference: Reference | None) -> Sequence[Score]:
    """The inception score of a set."""
    mean, spread = measure_inception_score(features.read("inception", "logits"))
    return [
        Score(
            "inception_score",
            "IS",
            mean,
            spread={"split_deviation": spread},
            fields={"splits": min(SPLITS, len(features.pictures))},
        )
    ]


INCEPTION_SCORE = Metric(
    "inception",
    Against.NOTHING,
    score_inception,
    "IS: inception score (arXiv 1606.03498), after ± its deviation over 10 splits; higher is "
    "better. It knows ImageNet's classes only, and looks at no reference.",
)
