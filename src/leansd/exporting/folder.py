"""What an export of a UNet to ONNX consists of: the table of its files, and writing them safely."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from leansd.errors import LeansdError
from leansd.files import check_folder

TABLE = "export.json"
PLAN = "plan.json"
MODEL = "unet.onnx"
WEIGHTS = "unet.onnx.data"
VERSION = 1


class GraphEntry(BaseModel):
    """One graph: its file, and the features that go in and out, by their names in the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    file: str
    given: tuple[str, ...]
    kept: tuple[str, ...]


class ExportTable(BaseModel):
    """`export.json`. A change that an older reader would misunderstand raises `version`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal["leansd-onnx"] = "leansd-onnx"
    version: int = VERSION
    leansd: str
    difference: float
    """The largest difference from PyTorch that was seen, see `onnx.compare`."""
    graphs: tuple[GraphEntry, ...]
    """The first computes everything."""


def name_file(place: int) -> str:
    """The file of the graph at a place of the table: `unet.onnx`, `unet-1.onnx` and so on."""
    return MODEL if place == 0 else f"unet-{place}.onnx"


def read_table(folder: Path) -> ExportTable:
    """Read and check the table of an export.

    Raises:
        LeansdError: there is none, it is damaged, from a newer version, or a file is missing.
    """
    path = folder / TABLE
    try:
        table = ExportTable.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError:
        raise LeansdError(
            f"no ONNX export in {folder}: give a folder that leansd export --to onnx has written"
        ) from None
    except (UnicodeDecodeError, ValidationError):
        raise LeansdError(f"{path} is damaged: export the UNet again") from None
    if table.version > VERSION:
        raise LeansdError(
            f"{path} has format {table.version}, this leansd reads up to {VERSION}; upgrade leansd"
        )
    for name in (WEIGHTS, *(entry.file for entry in table.graphs)):
        if not (folder / name).is_file():
            raise LeansdError(f"{folder} is incomplete: it has no {name}; export the UNet again")
    return table


def check_out(folder: Path, *, replaces: str | None = None) -> Path:
    """Say now whether `folder` can be written: it is new, empty, or holds the file `replaces`.

    Raises:
        LeansdError: it holds something else, or cannot be written to.
    """
    check_folder(folder)
    if not folder.is_dir() or (replaces is not None and (folder / replaces).is_file()):
        return folder
    held = sorted(path.name for path in folder.iterdir())
    if held:
        raise LeansdError(
            f"{folder} already holds {held[0]}: choose another output folder, or empty this one"
        )
    return folder
