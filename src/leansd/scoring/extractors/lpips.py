"""LPIPS with AlexNet: how far a picture is from its partner."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from leansd.errors import LeansdError
from leansd.evaluation.fidelity import LPIPS_SOURCE, find_lpips_weights, open_lpips
from leansd.scoring.extractors.extractor import Extractor, Look
from leansd.scoring.samples import Shown


def open_alexnet(weights: Path, device: torch.device) -> Look:
    """The distance of each picture to its partner, [n]."""
    lpips = open_lpips(weights, device)

    def look(shown: Shown) -> dict[str, Tensor]:
        if shown.others is None:
            raise LeansdError("LPIPS compares pictures with others: give --reference FOLDER")
        return {"distances": lpips(shown.pictures.float() / 255, shown.others.float() / 255)}

    return look


LPIPS = Extractor(
    f"torchvision's AlexNet ({LPIPS_SOURCE}); its heads come with torchmetrics",
    find_lpips_weights,
    open_alexnet,
    lambda _, __: "AlexNet",
)
