"""Rows of prompts from JSON lines or Parquet, and what is wrong with those that cannot be drawn."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from leansd.errors import LeansdError

Id = Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=200)]
"""What a picture's file is called, without its ending."""


class Row(BaseModel):
    """One picture to draw. What else a file says of it is passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    number: int
    """Its place in the file, from 0, malformed rows counted: its seed follows from it."""
    id: Id
    prompt: str
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    negative_prompt: str | None = None
    init_image: str | None = None
    """A picture to start from, by its path beside the file."""
    strength: Annotated[float, Field(gt=0, le=1)] | None = None


@dataclass(frozen=True)
class Flaw:
    """A row that cannot be drawn."""

    line: int
    """From 1, as editors count."""
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}"


@dataclass(frozen=True)
class Sheet:
    """All rows of a file."""

    rows: tuple[Row, ...]
    flaws: tuple[Flaw, ...]
    digest: str
    """Sixteen hex digits of the file."""
    home: Path
    """The folder that paths in it start from."""


def read_sheet(path: str | Path) -> Sheet:
    """Read a `.jsonl` or `.parquet` file.

    Raises:
        LeansdError: it cannot be read, or no row of it can be drawn.
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise LeansdError(
            f"cannot read prompts from {path}: give a file that ends in {' or '.join(READERS)}"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LeansdError(f"cannot read prompts from {path}: {error.strerror or error}") from error
    rows: list[Row] = []
    flaws: list[Flaw] = []
    seen: dict[str, int] = {}
    for number, found in enumerate(reader(path, content)):
        row = _check(number, found, path.parent)
        if isinstance(row, Row) and row.id in seen:
            row = Flaw(number + 1, f"id {row.id} is that of line {seen[row.id]}, too")
        if isinstance(row, Flaw):
            flaws.append(row)
        elif row is not None:
            seen[row.id] = number + 1
            rows.append(row)
    if not rows:
        why = f"; {flaws[0]}" if flaws else ": it is empty"
        raise LeansdError(f"no row of {path} can be drawn{why}")
    return Sheet(tuple(rows), tuple(flaws), sha256(content).hexdigest()[:16], path.parent.resolve())


def _check(number: int, found: Any, home: Path) -> Row | Flaw | None:
    """A row, what is wrong with it, or nothing for a blank line."""
    if found is None:
        return None
    if not isinstance(found, Mapping):
        return Flaw(number + 1, str(found))
    given = {key: value for key, value in found.items() if value is not None}
    try:
        row = Row.model_validate({**given, "number": number})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        return Flaw(number + 1, f"{place}: {first['msg']}")
    if row.init_image is not None and not (home / row.init_image).is_file():
        return Flaw(number + 1, f"init_image: there is no {home / row.init_image}")
    if row.strength is not None and row.init_image is None:
        return Flaw(number + 1, "strength: it means nothing without an init_image")
    return row


def _read_lines(path: Path, content: bytes) -> Iterator[Any]:
    for line in content.splitlines():
        if not line.strip():
            yield None
            continue
        try:
            found = json.loads(line)
        except (ValueError, UnicodeDecodeError) as error:
            yield f"no JSON: {error}"
            continue
        yield found if isinstance(found, dict) else "no JSON object"


def _read_parquet(path: Path, content: bytes) -> Iterator[Any]:
    try:
        from pyarrow import ArrowInvalid, BufferReader, parquet
    except ImportError as error:
        raise LeansdError("Parquet needs pyarrow: install leansd[ray], or give .jsonl") from error
    try:
        table = parquet.read_table(BufferReader(content))
    except ArrowInvalid as error:
        raise LeansdError(f"{path} is no Parquet file: {error}") from error
    for batch in table.to_batches():
        yield from batch.to_pylist()


READERS = {".jsonl": _read_lines, ".parquet": _read_parquet}
