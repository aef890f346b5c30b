"""The emoji pictures as a folder that trainers read: Hugging Face's imagefolder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from leansd.errors import LeansdError
from models.emoji.data import Pair, Pictures, write_captions

METADATA = "metadata.jsonl"
TRAIN, HELD_OUT = "train", "held-out"


def write_pictures(pictures: Pictures, folder: Path) -> None:
    """Write `train` and `held-out`, each with a `metadata.jsonl` of captions and groups.

    Raises:
        LeansdError: the folder holds something else.
    """
    if folder.exists() and any(each.name not in (TRAIN, HELD_OUT) for each in folder.iterdir()):
        raise LeansdError(f"{folder} holds something else: choose a new folder")
    _write_set(pictures.split.train, pictures.train, folder / TRAIN)
    _write_set(pictures.split.held_out, pictures.held_out, folder / HELD_OUT)


def _write_set(pairs: Sequence[Pair], pixels: torch.Tensor, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[str] = []
    for pair, picture in zip(pairs, pixels, strict=True):
        name = f"{pair.concept.name}-{pair.style}.png"
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / name)
        row = {"file_name": name, "text": write_captions(pair), "group": pair.concept.group}
        rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    # Last, so that a folder with metadata is whole.
    (folder / METADATA).write_text("".join(rows), encoding="utf-8")
