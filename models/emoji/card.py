"""The model card: written from the numbers that the evaluation measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from leansd.emoji.prompts import GRID_PROMPTS
from leansd.errors import LeansdError
from leansd.files import write_file
from models.emoji.data import KEYWORDS, STYLES

TEMPLATES = Path(__file__).parent / "templates"
# Who drew a style, and under which licence.
CREDITS = {
    "noto": ("Noto Emoji, copyright Google LLC", "Apache-2.0"),
    "twemoji": (
        "Twemoji, copyright Twitter, Inc and other contributors",
        "CC-BY 4.0 (<https://creativecommons.org/licenses/by/4.0/>)",
    ),
    "fluent": ("Fluent Emoji (flat), copyright Microsoft Corporation", "MIT"),
}


def write_card(model: Path) -> Path:
    """Write `model/README.md` from its evaluation.json and training.json."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    styles = [(name, *CREDITS[name], *STYLES[name]) for name in STYLES]
    text = environment.get_template("card.md").render(
        evaluation=_read(model / "evaluation.json", "evaluate"),
        training=_read(model / "training.json", "assemble"),
        styles=styles,
        keywords=KEYWORDS,
        prompts=GRID_PROMPTS,
        sizes=measure_files(model),
    )
    return write_file(model / "README.md", text)


def measure_files(model: Path) -> dict[str, float]:
    """Return the MB of each part's weights, and of all."""
    sizes = {
        path.parent.name: path.stat().st_size / 1e6
        for path in sorted(model.glob("*/*.safetensors"))
    }
    return {**sizes, "all": sum(sizes.values())}


def _read(path: Path, command: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LeansdError(f"no {path}: run `python -m models.emoji {command}` first") from None
    except ValueError as error:
        raise LeansdError(f"{path} is not JSON: {error}") from error
