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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from leansd.errors import LeansdError

PICTURES = ("jpg", "jpeg", "png", "webp")
"""The endings of picture files."""
METADATA = "metadata.jsonl"
PICTURES_A_SHARD, DRAWINGS_A_SHARD = 1024, 256
T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """What latents and conditions are made of."""

    key: str
    captions: tuple[str, ...]
    """Every one describes the sample; each time it comes, one of them is drawn."""
    content: Any
    """A picture file's bytes, or the seed that a picture is drawn from."""
    size: tuple[int, int] | None = None
    """Height and width before the data set was scaled, where it tells."""


@dataclass(frozen=True)
class Flaw:
    """A sample that is left out, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class Shard:
    """A part of a data set that is read from its beginning to its end, always in one order."""

    name: str
    """A file name's worth, for people."""
    facts: Mapping[str, Any]
    """The content, or what changes with it, as JSON values."""
    read: Callable[[], Iterator[Sample | Flaw]]
    """Gives every sample, also those that cannot be used.

    Raises LeansdError where the shard itself cannot be read.
    """

    @property
    def identity(self) -> str:
        return digest(self.facts)


def digest(facts: Mapping[str, Any]) -> str:
    """Sixteen hex digits of plain JSON values."""
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def cut(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
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


def read_tar(path: Path, caption: str) -> Iterator[Sample | Flaw]:
    """The samples of a tar: neighbours whose names are the same up to the first dot are one.

    Args:
        caption: the files' ending that holds captions, or else the entry of a sample's JSON.
    """
    try:
        for key, group in groupby(_read_files(path), key=itemgetter(0)):
            files = {ending: content for _, ending, content in group}
            for name, own in split_dotted(key, files).items():
                yield _make_sample(name, own, caption)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise LeansdError(f"cannot read shard {path}: {error}; {_REMEDY}") from error


def _read_files(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """Place without ending, ending, content."""
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            name = PurePosixPath(member.name)
            stem, _, ending = name.name.partition(".")
            if member.isfile() and stem and not name.name.startswith("__"):
                file = tar.extractfile(member)
                assert file is not None
                yield str(name.with_name(stem)), ending.lower(), file.read()
        # `tarfile` takes a cut between two files, or rubbish there, for the end.
        assert tar.fileobj is not None
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise LeansdError(
                f"cannot read shard {path}: it has no end, so it was cut off or is damaged at "
                f"byte {tar.offset}; {_REMEDY}"
            )


def _make_sample(key: str, files: Mapping[str, bytes], caption: str) -> Sample | Flaw:
    picture = next((files[ending] for ending in PICTURES if ending in files), None)
    if picture is None:
        return Flaw(key, "no picture")
    try:
        facts = json.loads(files.get("json", b"{}"))
        text = files.get(caption)
        found = text.decode() if text is not None else facts.get(caption)
        captions = clean_captions(facts.get("caption") if found is None else found)
        size = facts.get("original_height"), facts.get("original_width")
    except (ValueError, AttributeError) as error:
        return Flaw(key, f"unreadable caption: {error}")
    if not captions:
        return Flaw(key, "no caption")
    height, width = size
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


def list_tars(where: str | Path, caption: str = "txt") -> list[Shard]:
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
        Shard(
            each.stem,
            {
                "tar": each.relative_to(home).as_posix(),
                "size": each.stat().st_size,
                "caption": caption,
            },
            partial(read_tar, each, caption),
        )
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


def read_folder(home: Path, entries: Iterable[FolderEntry]) -> Iterator[Sample | Flaw]:
    """Pictures of a folder, none of which is opened before its turn."""
    for entry in entries:
        if entry.flaw:
            yield Flaw(entry.key, entry.flaw)
            continue
        path = home / entry.key
        try:
            content = path.read_bytes()
        except OSError as error:
            raise LeansdError(
                f"cannot read {path}: {error.strerror or error}; mend or remove it"
            ) from error
        yield Sample(entry.key, entry.captions, content)


def list_folder(
    where: str | Path, caption: str = "text", rows: int = PICTURES_A_SHARD
) -> list[Shard]:
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
        Shard(f"pictures-{number:05d}", {"folder": some}, partial(read_folder, home, some))
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


def list_prompts(prompts: Sequence[str], *, each: int = 1, seed: int = 0) -> list[Shard]:
    """The drawings of all prompts, cut into shards.

    Args:
        each: drawings of a prompt, from seeds `seed` on. More of them leave what there is: all
            prompts are drawn from one seed before the next.

    Raises:
        LeansdError: there are no prompts.
    """
    if not prompts:
        raise LeansdError("nothing to draw: give prompts, and 1 or more drawings of each")
    shards: list[Shard] = []
    for turn in range(seed, seed + each):
        for number, some in enumerate(cut(prompts, DRAWINGS_A_SHARD)):
            name = f"drawn-{turn}-{number:05d}"
            samples = [Sample(f"{name}-{n:05d}", (p,), turn) for n, p in enumerate(some)]
            facts = {"drawn": [(prompt, turn) for prompt in some]}
            shards.append(Shard(name, facts, partial(iter, samples)))
    return shards
