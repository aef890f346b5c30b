"""Samples before they are encoded: what tars, folders and lists of prompts give, in one order.

Tars are in webdataset's form, as img2dataset writes them; folders have the `metadata.jsonl` of
Hugging Face's imagefolder, or texts beside the pictures. Both are read by the standard library:
webdataset takes a tar that was cut off for a shorter one, and `datasets` copies everything into
tables of its own before the first sample; here a cache is filled once, from the front to the end.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from leansd.errors import LeansdError

PICTURES = ("jpg", "jpeg", "png", "webp")
"""The endings of picture files."""
METADATA = "metadata.jsonl"
PICTURES_A_SHARD, DRAWINGS_A_SHARD = 1024, 256
S = TypeVar("S")
T = TypeVar("T", covariant=True)


@dataclass(frozen=True)
class Sample(Generic[T]):
    """What latents and conditions are made of."""

    key: str
    captions: tuple[str, ...]
    """Every one describes the sample; each time it comes, one of them is drawn."""
    content: T
    """A picture file's bytes, or the seed that a picture is drawn from."""
    size: tuple[int, int] | None = None
    """Height and width before the data set was scaled, where it tells."""


@dataclass(frozen=True)
class Flaw:
    """A sample that is left out, and why."""

    key: str
    reason: str


class Shard(Protocol[T]):
    """A part of a data set that is read from its beginning to its end, always in one order."""

    @property
    def name(self) -> str:
        """A file name's worth, for people."""
        ...

    @property
    def identity(self) -> str:
        """A digest of the content, or of what changes with it."""
        ...

    def read(self) -> Iterator[Sample[T] | Flaw]:
        """Every sample, also those that cannot be used.

        Raises:
            LeansdError: the shard itself cannot be read.
        """
        ...


def digest(facts: Mapping[str, Any]) -> str:
    """Sixteen hex digits of plain JSON values."""
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def cut(items: Iterable[S], size: int) -> Iterator[tuple[S, ...]]:
    """Neighbours, `size` at a time."""
    rest = iter(items)
    while some := tuple(islice(rest, size)):
        yield some


def clean_captions(found: Any) -> tuple[str, ...]:
    """Captions as they stand in a file: a text or a list of them; empty ones do not count."""
    texts = found if isinstance(found, list) else [found]
    stripped = (" ".join(text.split()) for text in texts if isinstance(text, str))
    return tuple(text for text in stripped if text)


# Tar shards

_REMEDY = "download it anew, or take it out of the data set"


@dataclass(frozen=True)
class TarShard:
    """One tar: neighbours whose names are the same up to the first dot are one sample."""

    path: Path
    place: str
    """Its path within the data set."""
    size: int
    caption: str
    """The file's ending that holds captions, or else the entry of the sample's JSON."""

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def identity(self) -> str:
        return digest({"tar": self.place, "size": self.size, "caption": self.caption})

    def read(self) -> Iterator[Sample[bytes] | Flaw]:
        try:
            for key, group in groupby(self._read_files(), key=itemgetter(0)):
                files = {ending: content for _, ending, content in group}
                for name, own in split_dotted(key, files).items():
                    yield self._make_sample(name, own)
        except (OSError, tarfile.TarError, EOFError) as error:
            raise LeansdError(f"cannot read shard {self.path}: {error}; {_REMEDY}") from error

    def _read_files(self) -> Iterator[tuple[str, str, bytes]]:
        with tarfile.open(self.path, "r:") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                stem, _, ending = path.name.partition(".")
                if not member.isfile() or not stem or path.name.startswith("__"):
                    continue
                file = tar.extractfile(member)
                assert file is not None
                yield str(path.with_name(stem)), ending.lower(), file.read()
            # `tarfile` takes a cut between two files, or rubbish there, for the end.
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise LeansdError(
                    f"cannot read shard {self.path}: it has no end, so it was cut off or is "
                    f"damaged at byte {tar.offset}; {_REMEDY}"
                )

    def _make_sample(self, key: str, files: Mapping[str, bytes]) -> Sample[bytes] | Flaw:
        picture = next((files[ending] for ending in PICTURES if ending in files), None)
        if picture is None:
            return Flaw(key, "no picture")
        try:
            facts = json.loads(files.get("json", b"{}"))
            text = files.get(self.caption)
            found = text.decode() if text is not None else facts.get(self.caption)
            captions = clean_captions(facts.get("caption") if found is None else found)
            height, width = facts.get("original_height"), facts.get("original_width")
        except (ValueError, AttributeError) as error:
            return Flaw(key, f"unreadable caption: {error}")
        if not captions:
            return Flaw(key, "no caption")
        is_known = isinstance(height, int) and isinstance(width, int)
        return Sample(key, captions, picture, (height, width) if is_known else None)


def split_dotted(key: str, files: Mapping[str, bytes]) -> dict[str, dict[str, bytes]]:
    """The samples among files of one key, by their keys.

    Rows called `v1.5` and `v1.6` have one key in webdataset's eyes, `v1`, and no picture. Where no
    file has a plain ending, names are parted at their last dot.
    """
    if not all("." in ending for ending in files):
        return {key: dict(files)}
    samples: dict[str, dict[str, bytes]] = {}
    for ending, content in files.items():
        middle, _, last = ending.rpartition(".")
        samples.setdefault(f"{key}.{middle}", {})[last] = content
    return samples


def list_tars(where: str | Path, caption: str = "txt") -> list[TarShard]:
    """The tars of a folder, or those that a pattern such as `laion/0*.tar` names.

    Args:
        where: a tar, a folder (what lies deeper included) or a pattern of `*`, `?` and `[...]`, or
            a range as webdataset writes it, `{00000..00020}.tar`, of which all must be there.
        caption: the ending of the files with the captions, or the entry of the `.json` ones;
            where a sample has neither, the entry `caption` of its JSON counts.

    Raises:
        LeansdError: there is none, or one of a range is missing.
    """
    path = Path(where).expanduser()
    home, pattern = (path, "**/*.tar") if path.is_dir() else (path.parent, path.name)
    found: list[Path] = []
    for name in expand_range(pattern):
        there = sorted(each for each in home.glob(name) if each.is_file()) if name else []
        if not there and name != pattern:
            raise LeansdError(f"no tar shard {home / name}, which {where} names: fetch it anew")
        found += there
    if not found:
        raise LeansdError(
            f"no tar shards in {where}: give a folder that has some, or a pattern such as "
            "'laion/0*.tar'"
        )
    return [
        TarShard(each, each.relative_to(home).as_posix(), each.stat().st_size, caption)
        for each in found
    ]


def expand_range(pattern: str) -> list[str]:
    """The names that `{00000..00020}` in a pattern stands for; else the pattern itself."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = (f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1))
    return [pattern[: match.start()] + each + pattern[match.end() :] for each in numbers]


# Folders of pictures


class FolderEntry(NamedTuple):
    """A picture of a folder by its place in it."""

    key: str
    captions: tuple[str, ...]
    size: int
    """In bytes; -1 where there is no such file."""
    flaw: str = ""


@dataclass(frozen=True)
class FolderShard:
    """Neighbouring pictures of a folder, none of which is opened before its turn."""

    home: Path
    name: str
    entries: tuple[FolderEntry, ...]

    @property
    def identity(self) -> str:
        return digest({"folder": self.entries})

    def read(self) -> Iterator[Sample[bytes] | Flaw]:
        for entry in self.entries:
            if entry.flaw:
                yield Flaw(entry.key, entry.flaw)
                continue
            path = self.home / entry.key
            try:
                content = path.read_bytes()
            except OSError as error:
                raise LeansdError(
                    f"cannot read {path}: {error.strerror or error}; mend or remove it"
                ) from error
            yield Sample(entry.key, entry.captions, content)


def list_folder(
    where: str | Path, caption: str = "text", rows: int = PICTURES_A_SHARD
) -> list[FolderShard]:
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
        FolderShard(home, f"pictures-{number:05d}", some)
        for number, some in enumerate(cut(found, rows))
    ]


def _read_metadata(path: Path, caption: str) -> Iterator[FolderEntry]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            key, texts = row["file_name"], clean_captions(row.get(caption))
            assert isinstance(key, str)
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
            yield FolderEntry(f"{path.name}:{number}", (), -1, "no JSON object with a file_name")
            continue
        yield _enter(path.parent, key, texts, "" if texts else f"no {caption} in {path.name}")


def _walk(home: Path) -> Iterator[FolderEntry]:
    for path in sorted(home.rglob("*")):
        if path.suffix[1:].lower() not in PICTURES:
            continue
        texts, flaw = (), "no caption"
        try:
            texts = clean_captions(path.with_suffix(".txt").read_text(encoding="utf-8"))
        except FileNotFoundError:
            pass
        except UnicodeDecodeError:
            flaw = "unreadable caption: it is not UTF-8"
        yield _enter(home, path.relative_to(home).as_posix(), texts, "" if texts else flaw)


def _enter(home: Path, key: str, captions: tuple[str, ...], flaw: str) -> FolderEntry:
    path = home / key
    if not path.is_file():
        return FolderEntry(key, captions, -1, "no such file")
    return FolderEntry(key, captions, path.stat().st_size, flaw)


# Prompts that the teacher draws


@dataclass(frozen=True)
class PromptShard:
    """Some prompts, each with the seed that it is drawn from."""

    name: str
    wishes: tuple[tuple[str, int], ...]

    @property
    def identity(self) -> str:
        return digest({"drawn": self.wishes})

    def read(self) -> Iterator[Sample[int] | Flaw]:
        for number, (prompt, seed) in enumerate(self.wishes):
            yield Sample(f"{self.name}-{number:05d}", (prompt,), seed)


def list_prompts(prompts: Sequence[str], *, each: int = 1, seed: int = 0) -> list[PromptShard]:
    """The drawings of all prompts, cut into shards.

    Args:
        each: drawings of a prompt, from seeds `seed` on. More of them leave what there is: all
            prompts are drawn from one seed before the next.

    Raises:
        LeansdError: there are no prompts.
    """
    if not prompts:
        raise LeansdError("nothing to draw: give prompts, and 1 or more drawings of each")
    return [
        PromptShard(f"drawn-{turn}-{number:05d}", tuple((prompt, turn) for prompt in some))
        for turn in range(seed, seed + each)
        for number, some in enumerate(cut(prompts, DRAWINGS_A_SHARD))
    ]


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file, one a line; each once.

    Raises:
        LeansdError: it cannot be read, or has none.
    """
    try:
        # utf-8-sig: editors on Windows begin a file with a mark that is no part of the prompt.
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LeansdError(f"cannot read prompts from {path}: {error}") from error
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise LeansdError(f"no prompts in {path}: write one a line")
    return prompts
