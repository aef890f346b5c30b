"""Pictures in a folder: with the `metadata.jsonl` of Hugging Face's imagefolder, or texts beside.

No file is opened before its turn, texts apart, so a folder of any size begins at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from leansd.errors import LeansdError
from leansd.incubation.data.samples import PICTURES, Flaw, Sample, clean_captions, digest

METADATA = "metadata.jsonl"
ROWS = 1024
"""Pictures that are one shard of a folder."""


@dataclass(frozen=True)
class Entry:
    """A picture of a folder by its place in it."""

    key: str
    captions: tuple[str, ...]
    size: int
    """In bytes; -1 where there is no such file."""
    flaw: str = ""


@dataclass(frozen=True)
class FolderShard:
    """Neighbouring pictures of a folder."""

    home: Path
    name: str
    entries: tuple[Entry, ...]

    @property
    def identity(self) -> str:
        return digest({"folder": [[e.key, e.captions, e.size, e.flaw] for e in self.entries]})

    def read(self) -> Iterator[Sample[bytes] | Flaw]:
        """Every picture, in the folder's order.

        Raises:
            LeansdError: a picture is there and cannot be read.
        """
        for entry in self.entries:
            if entry.flaw:
                yield Flaw(entry.key, entry.flaw)
                continue
            try:
                content = (self.home / entry.key).read_bytes()
            except OSError as error:
                raise LeansdError(
                    f"cannot read {self.home / entry.key}: {error.strerror or error}; mend or "
                    "remove it"
                ) from error
            yield Sample(entry.key, entry.captions, content)


def list_folder(where: str | Path, caption: str = "text", rows: int = ROWS) -> list[FolderShard]:
    """The pictures of a folder, cut into shards.

    Args:
        where: the folder. With a `metadata.jsonl` in it, the pictures are those that it names, in
            its order; without, all that lie in it, also deeper, each with a `.txt` of its name.
        caption: the entry of the metadata that holds a caption or a list of them.
        rows: pictures of a shard.

    Raises:
        LeansdError: there are no pictures, or the metadata have no such entry.
    """
    home = Path(where).expanduser()
    metadata = home / METADATA
    try:
        found = list(_read_metadata(metadata, caption) if metadata.is_file() else _walk(home))
    except OSError as error:
        raise LeansdError(f"cannot read {home}: {error.strerror or error}") from error
    if all(entry.flaw for entry in found):
        why = f"; the first one: {found[0].key}, {found[0].flaw}" if found else ""
        raise LeansdError(
            f"no pictures with captions in {home}{why}; give a folder with {METADATA} (file_name "
            f"and {caption}), or with a .txt beside each picture"
        )
    return [
        FolderShard(home, f"pictures-{begin // rows:05d}", tuple(found[begin : begin + rows]))
        for begin in range(0, len(found), rows)
    ]


def _read_metadata(path: Path, caption: str) -> Iterator[Entry]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            key, texts = row["file_name"], clean_captions(row.get(caption))
            assert isinstance(key, str)
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
            yield Entry(f"{path.name}:{number}", (), -1, "no JSON object with a file_name")
            continue
        yield _enter(path.parent, key, texts, "" if texts else f"no {caption} in {path.name}")


def _walk(home: Path) -> Iterator[Entry]:
    for path in sorted(home.rglob("*")):
        if path.suffix[1:].lower() not in PICTURES:
            continue
        key, beside = path.relative_to(home).as_posix(), path.with_suffix(".txt")
        try:
            texts = clean_captions(beside.read_text(encoding="utf-8"))
            yield _enter(home, key, texts, "" if texts else "no caption")
        except FileNotFoundError:
            yield _enter(home, key, (), "no caption")
        except UnicodeDecodeError:
            yield _enter(home, key, (), "unreadable caption: it is not UTF-8")


def _enter(home: Path, key: str, captions: tuple[str, ...], flaw: str) -> Entry:
    path = home / key
    if not path.is_file():
        return Entry(key, captions, -1, "no such file")
    return Entry(key, captions, path.stat().st_size, flaw)
