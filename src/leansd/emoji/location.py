"""Where the embedded model lies."""

from __future__ import annotations

from pathlib import Path

from leansd.errors import LeansdError

EMBEDDED = "emoji"
"""The name of the model that comes along."""


def model_folder() -> Path:
    """Return the embedded model's folder, in the plain diffusers layout."""
    folder = Path(__file__).parent / "model"
    if not (folder / "model_index.json").is_file():
        raise LeansdError(f"no embedded model in {folder}: reinstall leansd")
    return folder


def net_folder(name: str) -> Path:
    """Return the folder of one of the embedded model's further UNets, `light` or `lean`.

    It holds the net's own tensors, see `surgery.checkpoints`.
    """
    folder = model_folder() / name
    if not (folder / "config.json").is_file():
        raise LeansdError(f"no UNet in {folder}: reinstall leansd")
    return folder
