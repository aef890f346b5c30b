"""Extractors by name. A new one is a file here and a line below."""

from leansd.scoring.extractors.clip import CLIP
from leansd.scoring.extractors.extractor import Extractor
from leansd.scoring.extractors.inception import INCEPTION
from leansd.scoring.extractors.lpips import LPIPS
from leansd.scoring.extractors.tiny_clip import TINY_CLIP

EXTRACTORS: dict[str, Extractor] = {
    "inception": INCEPTION,
    "clip": CLIP,
    "lpips": LPIPS,
    "tiny-clip": TINY_CLIP,
}
