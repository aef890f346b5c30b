"""The model card: written from the numbers that the evaluation measured."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from leansd.emoji.data import PACKAGES
from leansd.errors import LeansdError

# The 6x6 picture grid: two styles of things a person knows at a glance, then the third.
_THINGS = (
    "red apple",
    "pizza",
    "lemon",
    "cat face",
    "dog face",
    "tiger face",
    "penguin",
    "fish",
    "grinning face",
    "red heart",
    "rocket",
    "police car",
    "soccer ball",
    "crown",
    "tulip",
    "mushroom",
    "hamburger",
    "guitar",
)
GRID_PROMPTS = tuple(
    f"a {thing}, {style} style" for style in ("twemoji", "noto") for thing in _THINGS
)


def write_card(folder: Path) -> Path:
    """Write `folder/README.md` from its evaluation.json and training.json."""
    environment = Environment(
        loader=PackageLoader("leansd.emoji", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.get_template("card.md").render(
        evaluation=_read(folder / "evaluation.json", "leansd emoji evaluate"),
        training=_read(folder / "training.json", "leansd emoji train"),
        packages=PACKAGES,
        prompts=GRID_PROMPTS,
        sizes=measure_files(folder),
    )
    path = folder / "README.md"
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
    return path


def measure_files(folder: Path) -> dict[str, float]:
    """Return the size in MB of each part of the model, and of the whole."""
    parts = sorted(path.parent for path in folder.glob("*/*.safetensors"))
    sizes = {part.name: _measure_folder(part) for part in parts}
    return {**sizes, "all": _measure_folder(folder)}


def _measure_folder(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def _read(path: Path, command: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LeansdError(f"no {path}: run `{command}` first") from None
    except ValueError as error:
        raise LeansdError(f"{path} is not JSON: {error}") from error
