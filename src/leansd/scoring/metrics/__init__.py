"""Metrics by the names that `--metrics` takes. A new one is a file here and a line below."""

from leansd.scoring.metrics.agreement import CLIP_SCORE, TINY_CLIP_SCORE
from leansd.scoring.metrics.coverage import PRECISION, TINY_PRECISION
from leansd.scoring.metrics.distance import FID, TINY_FRECHET
from leansd.scoring.metrics.inception_score import INCEPTION_SCORE
from leansd.scoring.metrics.metric import Metric
from leansd.scoring.metrics.perception import LPIPS

METRICS: dict[str, Metric] = {
    "fid": FID,
    "is": INCEPTION_SCORE,
    "clip": CLIP_SCORE,
    "lpips": LPIPS,
    "precision": PRECISION,
    "tiny-frechet": TINY_FRECHET,
    "tiny-clip": TINY_CLIP_SCORE,
    "tiny-precision": TINY_PRECISION,
}
