"""What was drawn: a folder a duel, with its settings, its plan, its numbers and both pictures."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from leansd.drawing import encode_png
from leansd.errors import LeansdError
from leansd.files import write_file
from leansd.plans.plan import Plan
from leansd.ui.duels import Outcome
from leansd.ui.folders import find_inside

OWN_SAMPLER = "the model's own"
NEGATIVE = ""
_KEY = re.compile(r"\d{8}-\d{6}-\d{6}")


class Settings(BaseModel):
    """What a duel is held on; the plan apart."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: str
    prompt: str = Field(max_length=2000)
    negative: str = Field(default=NEGATIVE, max_length=2000)
    seed: int = Field(default=0, ge=0, lt=2**63)
    steps: int = Field(default=30, ge=2, le=200)
    sampler: str = OWN_SAMPLER
    guidance: float = Field(default=7.5, ge=0, le=30)


class Numbers(BaseModel):
    """What came of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    full: list[float]
    lean: list[float]
    speedup: float
    low: float
    high: float
    predicted: float
    psnr: float
    ssim: float
    calls: int
    full_calls: int
    bytes_kept: int

    @classmethod
    def of(cls, outcome: Outcome) -> Numbers:
        return cls(
            full=list(outcome.timings["full"].seconds),
            lean=list(outcome.timings["lean"].seconds),
            speedup=outcome.speedup.median,
            low=outcome.speedup.low,
            high=outcome.speedup.high,
            predicted=outcome.predicted,
            psnr=outcome.psnr,
            ssim=outcome.ssim,
            calls=outcome.calls,
            full_calls=outcome.full_calls,
            bytes_kept=outcome.bytes_kept,
        )


class EntryDocument(BaseModel):
    """The file format."""

    model_config = ConfigDict(extra="forbid")
    format: str = "leansd-duel"
    version: int = 1
    settings: Settings
    numbers: Numbers
    plan: dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One duel of the past."""

    key: str
    folder: Path
    settings: Settings
    numbers: Numbers
    plan: Plan

    @property
    def full(self) -> Path:
        return self.folder / "full.png"

    @property
    def lean(self) -> Path:
        return self.folder / "lean.png"

    @property
    def caption(self) -> str:
        return (
            f"{self.numbers.speedup:.2f}x · {self.numbers.psnr:.1f} dB · {self.plan.name} · "
            f"{self.settings.prompt[:60]} · seed {self.settings.seed}"
        )

    def open_pictures(self) -> tuple[Image.Image, Image.Image]:
        """The full run's and the planned run's, read whole."""
        with Image.open(self.full) as full, Image.open(self.lean) as lean:
            return full.convert("RGB"), lean.convert("RGB")


def keep_entry(home: Path, settings: Settings, plan: Plan, outcome: Outcome) -> Entry:
    """Write a duel into the history's folder."""
    key = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
    folder = find_inside(home, key)
    numbers = Numbers.of(outcome)
    for name, picture in (("full", outcome.full), ("lean", outcome.lean)):
        write_file(folder / f"{name}.png", encode_png(picture))
    document = EntryDocument(settings=settings, numbers=numbers, plan=plan.to_dict())
    # Last, so that an entry with it is whole.
    write_file(folder / "entry.json", document.model_dump_json(exclude_defaults=True))
    return Entry(key, folder, settings, numbers, plan)


def read_entry(home: Path, key: str) -> Entry:
    """One duel by its key.

    Raises:
        LeansdError: there is none, or it is damaged.
    """
    if not _KEY.fullmatch(key):
        raise LeansdError(f"{key!r} is no entry of the history")
    folder = find_inside(home, key)
    try:
        text = (folder / "entry.json").read_text(encoding="utf-8")
        document = EntryDocument.model_validate_json(text)
        plan = Plan.from_dict(document.plan)
    except (OSError, UnicodeDecodeError, ValidationError, LeansdError):
        raise LeansdError(f"the history has no whole entry {key}") from None
    return Entry(key, folder, document.settings, document.numbers, plan)


def list_entries(home: Path, most: int = 60) -> list[Entry]:
    """The latest duels, newest first; what is no whole entry is passed over."""
    if not home.is_dir():
        return []
    entries: list[Entry] = []
    for path in sorted(home.iterdir(), reverse=True):
        if len(entries) == most:
            break
        try:
            entries.append(read_entry(home, path.name))
        except LeansdError:
            continue
    return entries
