"""The CLIP score: do pictures show their prompts?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from leansd.errors import LeansdError
from leansd.scoring.features import Features
from leansd.scoring.metrics.metric import Against, Metric, Score, summarise_values
from leansd.scoring.references import Reference


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


CLIP_SCORE = Metric(
    "clip",
    Against.PROMPTS,
    partial(score_agreement, extractor="clip", metric="clip_score", title="CLIP score"),
    "CLIP score: 100 x cosine of picture and prompt (arXiv 2104.08718), after ± its standard "
    "error; higher is better. Scores of different CLIPs are not to be compared.",
)
TINY_CLIP_SCORE = Metric(
    "tiny-clip",
    Against.PROMPTS,
    partial(
        score_agreement,
        extractor="tiny-clip",
        metric="clip_score_tiny_clip",
        title="CLIP score (tiny CLIP)",
    ),
    "CLIP score (tiny CLIP): 100 x cosine of picture and prompt in the eyes of the embedded "
    "model's tiny CLIP, which knows emoji only.",
)
