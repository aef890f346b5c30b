"""Rows of prompts from a file, and what is wrong with those that cannot be drawn."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from leansd.errors import LeansdError
from leansd.text import explain_validation, suggest_name

Id = Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=200)]

OTHER_NAMES = {
    "negative": "negative_prompt",
    "negativeprompt": "negative_prompt",
    "neg_prompt": "negative_prompt",
    "neg": "negative_prompt",
    "uncond": "negative_prompt",
    "text": "prompt",
    "caption": "prompt",
    "image": "init_image",
    "init": "init_image",
    "key": "id",
    "name": "id",
}
"""What other tools call the keys of a row."""


class PromptRow(BaseModel):
    """One picture to draw."""

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


KEYS = tuple(name for name in PromptRow.model_fields if name != "number")


@dataclass(frozen=True)
class RowFlaw:
    """A line of the file with what is wrong with it."""

    line: int
    """From 1, as editors count."""
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}"


@dataclass(frozen=True)
class Sheet:
    """All rows of a file."""

    rows: tuple[PromptRow, ...]
    flaws: tuple[RowFlaw, ...]
    """Rows that cannot be drawn."""
    digest: str
    """Sixteen hex digits of the file."""
    home: Path
    """The folder that paths in it start from."""
    remarks: tuple[RowFlaw, ...] = ()
    """Rows that are drawn, but not all that they say is used."""


def read_sheet(path: str | Path) -> Sheet:
    """Reads a file of rows: `.jsonl`, `.csv`, `.parquet`, or `.txt` with a prompt a line.

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
    rows: list[PromptRow] = []
    flaws: list[RowFlaw] = []
    remarks: list[RowFlaw] = []
    seen: dict[str, int] = {}
    told: set[str] = set()
    for number, (line, found) in enumerate(reader(path, content)):
        row = _check(number, line, found, path.parent)
        if isinstance(row, PromptRow) and row.id in seen:
            row = RowFlaw(line, f"id {row.id} is that of line {seen[row.id]}, too")
        if isinstance(row, RowFlaw):
            flaws.append(row)
            continue
        if row is None:
            continue
        seen[row.id] = line
        rows.append(row)
        unused = [key for key in found if key not in KEYS and key not in told]
        remarks += [RowFlaw(line, f"{key} is not used ({', '.join(KEYS)} are)") for key in unused]
        told.update(unused)
    if not rows:
        why = f"; {flaws[0]}" if flaws else ": it is empty"
        raise LeansdError(f"no row of {path} can be drawn{why}")
    digest = sha256(content).hexdigest()[:16]
    return Sheet(tuple(rows), tuple(flaws), digest, path.parent.resolve(), tuple(remarks))


def _check(number: int, line: int, found: Any, home: Path) -> PromptRow | RowFlaw | None:
    """A row, what is wrong with it, or nothing for a blank line."""
    if found is None:
        return None
    if not isinstance(found, Mapping):
        return RowFlaw(line, str(found))
    given = {key: value for key, value in found.items() if value is not None}
    for key in given:
        meant = _find_meant(str(key))
        if meant is not None and meant not in given:
            return RowFlaw(line, f"{key}: no such key; did you mean {meant}?")
    try:
        row = PromptRow.model_validate({**given, "number": number})
    except ValidationError as error:
        return RowFlaw(line, explain_validation(error))
    if row.init_image is not None and not (home / row.init_image).is_file():
        return RowFlaw(line, f"init_image: there is no {home / row.init_image}")
    if row.strength is not None and row.init_image is None:
        return RowFlaw(line, "strength: it means nothing without an init_image")
    return row


def _find_meant(key: str) -> str | None:
    """The key that a wrong one was meant to be; None for a key that means something else."""
    if key in KEYS:
        return None
    plain = key.strip().lower().replace("-", "_").replace(" ", "_")
    if plain in KEYS:
        return plain
    if plain in OTHER_NAMES:
        return OTHER_NAMES[plain]
    hint = suggest_name(plain, KEYS)
    return hint.split("did you mean ")[1].split("?")[0] if "did you mean" in hint else None


# Readers give the number of every line and what stands there: a mapping, what is wrong, or None.
Lines = Iterator[tuple[int, Any]]


def _decode(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise LeansdError(f"{path}, line {line} is not UTF-8 text: save it as UTF-8") from error


def _read_json(path: Path, content: bytes) -> Lines:
    # Not as one text: a line that is no text is that line's flaw.
    for line, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            yield line, None
            continue
        try:
            found = json.loads(raw)
        except (ValueError, UnicodeDecodeError) as error:
            yield line, f"no JSON: {error}"
            continue
        yield line, found if isinstance(found, dict) else "no JSON object"


def _read_csv(path: Path, content: bytes) -> Lines:
    reader = csv.DictReader(io.StringIO(_decode(path, content), newline=""))
    convert = {"seed": int, "strength": float}
    try:
        for found in reader:
            row: dict[str, Any] = {}
            wrong = "more cells than columns" if None in found else ""
            for key, cell in found.items():
                if not key or not cell:
                    continue
                try:
                    row[key] = convert.get(key, str)(cell)
                except ValueError:
                    wrong = f"{key}: {cell!r} is not a number"
            yield reader.line_num, wrong or row or None
    except csv.Error as error:
        yield reader.line_num, f"no CSV: {error}"


def _read_text(path: Path, content: bytes) -> Lines:
    lines = _decode(path, content).split("\n")
    width = len(str(len(lines)))
    for line, text in enumerate(lines, start=1):
        prompt = text.strip()
        is_row = bool(prompt) and not prompt.startswith("#")
        yield line, {"id": f"{line:0{width}}", "prompt": prompt} if is_row else None


def _read_parquet(path: Path, content: bytes) -> Lines:
    try:
        from pyarrow import ArrowInvalid, BufferReader, parquet
    except ImportError as error:
        raise LeansdError("Parquet needs pyarrow: install leansd[ray], or give .jsonl") from error
    try:
        table = parquet.read_table(BufferReader(content))
    except ArrowInvalid as error:
        raise LeansdError(f"{path} is no Parquet file: {error}") from error
    rows = (row for batch in table.to_batches() for row in batch.to_pylist())
    yield from enumerate(rows, start=1)


READERS = {".jsonl": _read_json, ".csv": _read_csv, ".parquet": _read_parquet, ".txt": _read_text}
