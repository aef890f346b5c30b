"""The InceptionV3 that FID, IS, precision and recall are measured with in papers."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from leansd.errors import LeansdError
from leansd.scoring.extractors.extractor import Extractor, Look
from leansd.scoring.samples import Shown

FILE = "weights-inception-2015-12-05-6726825d.pth"
SOURCE = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
DIGEST = "6726825d"
"""The first digits of the file's SHA-256, as its name has them."""


def find_weights() -> Path | None:
    """The weights where torch-fidelity and torchmetrics keep them."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / FILE
    return path if path.is_file() else None


def open_inception(weights: Path, device: torch.device) -> Look:
    """Pooled features [n, 2048] and logits without their bias [n, 1008].

    Pictures are resized to 299 x 299 as TensorFlow 1 did it, by torch-fidelity.

    Raises:
        LeansdError: torch-fidelity is not installed, or the file holds something else.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise LeansdError(
            "FID, IS, precision and recall need torch-fidelity: install leansd[metrics]"
        ) from error
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        # torch-fidelity would unpickle whatever the file holds: it gets what was read safely.
        plain = io.BytesIO()
        torch.save(dict(state), plain)
        plain.seek(0)
        net = FeatureExtractorInceptionV3(
            "inception-v3-compat",
            ["2048", "logits_unbiased"],
            feature_extractor_weights_path=plain,
        )
    except Exception as error:  # whatever a file that is something else brings about
        raise LeansdError(
            f"{weights} does not hold torch-fidelity's InceptionV3: get it from {SOURCE}"
        ) from error
    net = net.to(device).eval()

    @torch.no_grad()
    def look(shown: Shown) -> dict[str, Tensor]:
        pooled, logits = net(shown.pictures.to(device))
        return {"pooled": pooled.cpu(), "logits": logits.cpu()}

    return look


def name_inception(weights: Path, fingerprint: str) -> str:
    """The field's network by its name, another by its file's."""
    return "InceptionV3" if fingerprint.startswith(DIGEST) else f"InceptionV3 of {weights.name}"


INCEPTION = Extractor(
    f"torch-fidelity's InceptionV3 ({SOURCE})", find_weights, open_inception, name_inception
)
