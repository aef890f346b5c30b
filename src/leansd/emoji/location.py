"""Where the embedded model lies."""

from __future__ import annotations

from pathlib import Path

from leansd.errors import LeansdError


def model_folder() -> Path:
    """Return the embedded model's folder, in the plain diffusers layout."""
    folder = Path(__file__).parent / "model"
    if not (folder / "model_index.json").is_file():
        raise LeansdError(
            f"no embedded model in {folder}: reinstall leansd, or train it (leansd emoji train)"
        )
    return folder


def light_folder() -> Path:
    """Return the folder of the embedded model's light UNet: its own tensors, see `surgery.thin`."""
    folder = model_folder() / "light"
    if not (folder / "config.json").is_file():
        raise LeansdError(f"no light UNet in {folder}: reinstall leansd")
    return folder
