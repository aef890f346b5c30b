"""The folders that the page may touch, and what it keeps in them: plans, and every run compared.

Nothing outside them is read or written. The history has a folder for each comparison: settings,
plan, numbers and both pictures.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from leansd.drawing import encode_png
from leansd.emoji.location import EMBEDDED
from leansd.errors import LeansdError
from leansd.files import check_folder, name_file, write_file
from leansd.plans.plan import Plan

OWN_SAMPLER = "the model's own"
LONGEST = 64
"""Characters of a plan's name."""
_KEY = re.compile(r"\d{8}-\d{6}-\d{6}")


@dataclass(frozen=True)
class Folders:
    """Where plans and history are kept, and where models may be opened from."""

    home: Path
    models: Path | None = None
    model: str = EMBEDDED
    """A model that was named when the page was started, wherever it lies."""

    @classmethod
    def open(
        cls, home: str | Path, models: str | Path | None = None, model: str = EMBEDDED
    ) -> Folders:
        """Check the folders before anything is loaded.

        Raises:
            LeansdError: one cannot be written into, or there is none.
        """
        check_folder(home)
        own = Path(home).expanduser().resolve()
        if models is None:
            return cls(own, None, model)
        if not Path(models).expanduser().is_dir():
            raise LeansdError(f"no folder {models}: --models takes a folder that holds models")
        return cls(own, Path(models).expanduser().resolve(), model)

    @property
    def plans(self) -> Path:
        return self.home / "plans"

    @property
    def history(self) -> Path:
        return self.home / "history"

    # -- models --------------------------------------------------------------------------------

    def list_models(self) -> list[str]:
        """Names of the models that can be opened, the one the page was started with first."""
        found = sorted(self.models.iterdir()) if self.models is not None else []
        own = [path.name for path in found if _is_model(path) and _lies_in(path, path.parent)]
        return list(dict.fromkeys((self.model, EMBEDDED, *own)))

    def find_model(self, name: str) -> str:
        """What `leansd.load` is to open for a name of `list_models`.

        Raises:
            LeansdError: there is no such model in the folder given.
        """
        if name in (self.model, EMBEDDED):
            return name
        if self.models is None:
            raise LeansdError(f"no model {name!r}: start the page with --models DIR to open others")
        path = find_inside(self.models, name)
        if not _is_model(path):
            raise LeansdError(
                f"no model {name!r} in the models' folder: it takes folders in the diffusers "
                "layout and .safetensors files"
            )
        return str(path)

    # -- plans ---------------------------------------------------------------------------------

    def list_plans(self) -> list[str]:
        """Names of the saved plans."""
        paths = sorted(self.plans.glob("*.json")) if self.plans.is_dir() else []
        return [path.stem for path in paths if _lies_in(path, self.plans)]

    def save_plan(self, plan: Plan, name: str) -> Path:
        """Write a plan under a name, in the place of one that has it already.

        Raises:
            LeansdError: it is no name for a file.
        """
        name = unicodedata.normalize("NFC", name.strip())
        if not _is_plan_name(name):
            raise LeansdError(
                f"{name!r} is no name for a plan: use up to {LONGEST} letters, digits, blanks and "
                ". _ -, with a letter or a digit at first"
            )
        for other in self.list_plans():
            if other != name and other.casefold() == name.casefold():
                raise LeansdError(
                    f"{other!r} is saved already, and on some disks {name!r} is the same file: use "
                    "another name"
                )
        path = find_inside(check_folder(self.plans), f"{name}.json")
        return write_file(path, plan.rename(name).encode())

    def load_plan(self, name: str) -> Plan:
        """A saved plan by its name.

        Raises:
            LeansdError: there is none in the plans' folder, or it is not a plan.
        """
        path = find_inside(self.plans, f"{name}.json")
        if not path.is_file():
            there = ", ".join(self.list_plans()) or "none"
            raise LeansdError(f"no plan {name!r} is saved here; there are: {there}")
        return Plan.load(path)


def _is_plan_name(name: str) -> bool:
    """Whether a file can be called so on every system: letters of any script, some signs inside."""
    kinds = [unicodedata.category(letter)[0] for letter in name]
    stem = name.partition(".")[0].strip()
    return (
        0 < len(name) <= LONGEST
        and len(name.encode()) <= 240
        and kinds[0] in "LN"
        and name[-1] not in " ."
        and all(kind in "LNM" or sign in " ._-" for kind, sign in zip(kinds, name, strict=True))
        and name_file(stem) != f"{stem}-"  # what Windows keeps for devices
    )


def find_inside(folder: Path, name: str) -> Path:
    """The path of `name` in `folder`, links followed.

    Raises:
        LeansdError: it would lie elsewhere.
    """
    if "\0" in name or not _lies_in(path := folder / name, folder):
        raise LeansdError(f"{name!r} lies outside the folders that this page was given")
    return path.resolve()


def _lies_in(path: Path, folder: Path) -> bool:
    home = folder.resolve()
    return path.resolve() != home and path.resolve().is_relative_to(home)


def _is_model(path: Path) -> bool:
    if path.is_dir():
        return (path / "model_index.json").is_file()
    return path.is_file() and path.suffix == ".safetensors"


# -- the history -----------------------------------------------------------------------------------


class Settings(BaseModel):
    """What a run is asked for; the plan apart."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: str
    prompt: str = Field(max_length=2000)
    negative: str = Field(default="", max_length=2000)
    seed: int = Field(default=0, ge=0, lt=2**63)
    steps: int = Field(default=30, ge=2, le=200)
    sampler: str = OWN_SAMPLER
    guidance: float = Field(default=7.5, ge=0, le=30)


class Numbers(BaseModel):
    """What was measured of a full run beside a planned one."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    full: list[float]
    lean: list[float]
    """Seconds of whole pipeline calls, one a round; of the full run above."""
    speedup: float
    low: float
    high: float
    predicted: float | None = None
    """Speed-up of the UNet by its multiply-accumulates; None where they could not be counted."""
    psnr: float
    ssim: float
    calls: int
    full_calls: int
    bytes_kept: int


class EntryDocument(BaseModel):
    """The file format."""

    model_config = ConfigDict(extra="forbid")
    format: str = "leansd-duel"
    version: int = 1
    settings: Settings
    numbers: Numbers
    plan: dict[str, Any]


@dataclass(frozen=True)
class HistoryEntry:
    """One comparison of the past."""

    folder: Path
    settings: Settings
    numbers: Numbers
    plan: Plan

    @property
    def key(self) -> str:
        return self.folder.name

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


def keep_entry(
    home: Path,
    settings: Settings,
    plan: Plan,
    numbers: Numbers,
    pictures: tuple[Image.Image, Image.Image],
) -> HistoryEntry:
    """Write a comparison into the history's folder: its pictures in full and by the plan."""
    folder = find_inside(home, datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f"))
    entry = HistoryEntry(folder, settings, numbers, plan)
    for path, picture in zip((entry.full, entry.lean), pictures, strict=True):
        write_file(path, encode_png(picture))
    document = EntryDocument(settings=settings, numbers=numbers, plan=plan.to_dict())
    # Last, so that an entry with it is whole.
    write_file(folder / "entry.json", document.model_dump_json(exclude_defaults=True))
    return entry


def read_entry(home: Path, key: str) -> HistoryEntry:
    """One comparison by its key.

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
    return HistoryEntry(folder, document.settings, document.numbers, plan)


def list_entries(home: Path, most: int = 60) -> list[HistoryEntry]:
    """The latest comparisons, newest first; what is no whole entry is passed over."""
    entries: list[HistoryEntry] = []
    for path in sorted(home.iterdir(), reverse=True) if home.is_dir() else []:
        if len(entries) == most:
            break
        try:
            entries.append(read_entry(home, path.name))
        except LeansdError:
            continue
    return entries
