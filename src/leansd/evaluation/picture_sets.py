"""Sets of pictures on disk: tar shards or folders of files, listed and read, no picture opened.

No torch here, so that processes that only read start at once."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from leansd.errors import LeansdError

# -- listing ------------------------------------------------------------------------------------

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
FACTS = (".json", ".txt")
PART = 256
"""Pictures of a part, where they are files of their own."""


@dataclass(frozen=True)
class FileRange:
    """Bytes of a file: all of it, or as many as a tar's member has."""

    path: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """The bytes.

        Raises:
            LeansdError: they are not there.
        """
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise LeansdError(f"cannot read {self.path}: {error.strerror or error}") from error
        if len(content) < self.size:
            raise LeansdError(f"{self.path} is cut off: write it again, or remove it")
        return content


@dataclass(frozen=True)
class PictureEntry:
    """A picture, by what names it in its set."""

    id: str
    picture: FileRange
    facts: FileRange | None = None
    """What is said of it: JSON with a `prompt`, or a text that is one."""
    other: FileRange | None = None
    """The picture that it is compared with."""

    def read(self) -> PictureBytes:
        facts, other = (each and each.read() for each in (self.facts, self.other))
        return PictureBytes(self.id, self.picture.read(), facts, other)


@dataclass(frozen=True)
class PictureGroup:
    """Pictures that are looked at together: those of a shard."""

    number: int
    entries: tuple[PictureEntry, ...]
    fingerprint: str
    """Sixteen hex digits of the names, sizes and times of the files."""


@dataclass(frozen=True)
class PictureSet:
    """All pictures of a folder, in an order that nothing but their names decides."""

    folder: Path
    parts: tuple[PictureGroup, ...]
    gaps: tuple[str, ...] = ()
    """Shards whose neighbours are there and they are not."""

    def __len__(self) -> int:
        return sum(len(part.entries) for part in self.parts)

    @property
    def entries(self) -> Iterator[PictureEntry]:
        return (entry for part in self.parts for entry in part.entries)

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits: another picture, another order, another time, another fingerprint."""
        return digest(part.fingerprint for part in self.parts)

    def pair(self, others: PictureSet) -> PictureSet:
        """Each picture with that of the same id in another set.

        Raises:
            LeansdError: one has no partner there.
        """
        known = {entry.id: entry.picture for entry in others.entries}
        missing = [entry.id for entry in self.entries if entry.id not in known]
        if missing:
            raise LeansdError(
                f"{len(missing)} of {len(self)} pictures of {self.folder} have no partner in "
                f"{others.folder}, {missing[0]} for one: LPIPS compares pictures of the same id"
            )
        mark = others.fingerprint
        return replace(self, parts=tuple(_pair(part, known, mark) for part in self.parts))


def list_pictures(folder: str | Path) -> PictureSet:
    """The pictures of a folder's tar shards, or where there are none, of its files.

    Raises:
        LeansdError: there are none, a shard is damaged, or two have one id.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LeansdError(f"no folder of pictures at {folder}")
    tars = sorted(folder.rglob("*.tar"))
    parts = tuple(_list_shards(tars) if tars else _list_files(folder))
    if not any(part.entries for part in parts):
        raise LeansdError(
            f"no pictures in {folder}: give a folder of {', '.join(PICTURES)} files, or of tar "
            "shards as `leansd generate --prompts FILE` writes them"
        )
    found = PictureSet(folder, parts, tuple(_list_gaps(tars)))
    name, count = Counter(entry.id for entry in found.entries).most_common(1)[0]
    if count > 1:
        raise LeansdError(f"{count} pictures of {folder} are called {name}: rename them")
    return found


def digest(facts: Iterable[object]) -> str:
    """Sixteen hex digits of some facts."""
    return sha256("\n".join(map(str, facts)).encode()).hexdigest()[:16]


def _list_shards(tars: Sequence[Path]) -> Iterator[PictureGroup]:
    for number, path in enumerate(tars):
        try:
            with tarfile.open(path) as tar:
                members = {
                    member.name: FileRange(str(path), member.offset_data, member.size)
                    for member in tar
                    if member.isreg()
                }
        except (OSError, tarfile.TarError) as error:
            raise LeansdError(
                f"{path} is damaged: {error}; write it again, or remove it"
            ) from error
        yield PictureGroup(number, tuple(_list_entries(members)), digest([_describe(path)]))


def _list_files(folder: Path) -> Iterator[PictureGroup]:
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in (*PICTURES, *FACTS) and path.is_file()
    }
    entries = list(_list_entries({name: FileRange(str(path)) for name, path in files.items()}))
    for number, begin in enumerate(range(0, len(entries), PART)):
        some = tuple(entries[begin : begin + PART])
        places = [place for entry in some for place in (entry.picture, entry.facts) if place]
        facts = (f"{entry.id}" for entry in some)
        yield PictureGroup(
            number, some, digest([*facts, *(_describe(Path(p.path)) for p in places)])
        )


def _list_entries(files: Mapping[str, FileRange]) -> Iterator[PictureEntry]:
    """The pictures among files, each with what is said of it."""

    def name(path: str) -> str:
        return str(PurePosixPath(path).with_suffix(""))

    for stem, group in groupby(sorted(files, key=lambda path: (name(path), path)), key=name):
        endings = {PurePosixPath(path).suffix.lower(): files[path] for path in group}
        facts = next((endings[each] for each in FACTS if each in endings), None)
        for ending in PICTURES:
            if ending in endings:
                yield PictureEntry(stem, endings[ending], facts)


def _describe(path: Path) -> str:
    facts = path.stat()
    return f"{path.name} {facts.st_size} {facts.st_mtime_ns}"


def _list_gaps(tars: Sequence[Path]) -> Iterator[str]:
    """What is missing among shards that are numbered as `leansd generate` does it."""
    from leansd.shards import name_shard

    for folder in dict.fromkeys(path.parent for path in tars):
        names = {path.name for path in tars if path.parent == folder}
        last = max(names)
        number = 0
        while last.startswith("shard-") and (name := name_shard(number)) < last:
            if name not in names:
                yield name
            number += 1


def _pair(part: PictureGroup, known: Mapping[str, FileRange], mark: str) -> PictureGroup:
    entries = tuple(replace(entry, other=known[entry.id]) for entry in part.entries)
    return replace(part, entries=entries, fingerprint=digest([part.fingerprint, mark]))


# -- reading ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PictureBytes:
    """The files of a picture, as they are."""

    id: str
    picture: bytes
    facts: bytes | None = None
    other: bytes | None = None


@dataclass(frozen=True)
class ExtractionTask:
    """A part, and which extractors are still to look at it."""

    part: PictureGroup
    extractors: tuple[str, ...]


def read_task(task: ExtractionTask) -> tuple[list[PictureBytes], tuple[str, ...]]:
    """The files of a task's pictures, and who is to look at them."""
    return [entry.read() for entry in task.part.entries], task.extractors


def read_facts(entry: PictureEntry) -> dict[str, Any]:
    """What a JSON sidecar says; nothing where there is none."""
    try:
        found = json.loads(entry.facts.read()) if entry.facts is not None else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
