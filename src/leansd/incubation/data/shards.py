"""Tar shards in webdataset's form, as img2dataset writes them.

Read by the standard library alone: a cache is filled once, from the front of each shard to its
end, and what trains reads the cache. A tar that was cut off, which readers of streams take for a
shorter one, is told by its missing end.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path, PurePosixPath

from leansd.errors import LeansdError
from leansd.incubation.data.samples import PICTURES, Flaw, Sample, clean_captions, digest

_REMEDY = "download it anew, or take it out of the data set"


@dataclass(frozen=True)
class TarShard:
    """One tar: neighbours whose names differ from the first dot on are one sample."""

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
        """Every sample of the tar, in its order.

        Raises:
            LeansdError: the tar is damaged or was cut off.
        """
        try:
            for key, group in groupby(self._read_files(), key=itemgetter(0)):
                yield self._make(key, {ending: content for _, ending, content in group})
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
            self._check_end(tar)

    def _check_end(self, tar: tarfile.TarFile) -> None:
        """`tarfile` takes a cut between two files, or rubbish there, for the end."""
        assert tar.fileobj is not None
        tar.fileobj.seek(tar.offset)
        block = tar.fileobj.read(tarfile.BLOCKSIZE)
        if block != bytes(tarfile.BLOCKSIZE):
            raise LeansdError(
                f"cannot read shard {self.path}: it has no end, so it was cut off or is damaged "
                f"at byte {tar.offset}; {_REMEDY}"
            )

    def _make(self, key: str, files: Mapping[str, bytes]) -> Sample[bytes] | Flaw:
        picture = next((files[ending] for ending in PICTURES if ending in files), None)
        if picture is None:
            return Flaw(key, "no picture")
        try:
            facts = json.loads(files.get("json", b"{}"))
            text = files.get(self.caption)
            found = text.decode() if text is not None else facts.get(self.caption)
            captions = clean_captions(facts.get("caption") if found is None else found)
            sides = facts.get("original_height"), facts.get("original_width")
        except (ValueError, AttributeError) as error:
            return Flaw(key, f"unreadable caption: {error}")
        if not captions:
            return Flaw(key, "no caption")
        known = all(isinstance(side, int) for side in sides)
        return Sample(key, captions, picture, sides if known else None)  # pyright: ignore[reportArgumentType]


def list_tars(where: str | Path, caption: str = "txt") -> list[TarShard]:
    """The tars of a folder, or those that a pattern such as `laion/0*.tar` names.

    Args:
        where: a tar, a folder (what lies deeper included) or a pattern of `*`, `?` and `[...]`.
        caption: the ending of the files with the captions, or the entry of the `.json` ones;
            where a sample has neither, the entry `caption` of its JSON counts.

    Raises:
        LeansdError: there is none.
    """
    path = Path(where).expanduser()
    home, pattern = (path, "**/*.tar") if path.is_dir() else (path.parent, path.name)
    found = sorted(each for each in home.glob(pattern) if each.is_file())
    if not found:
        raise LeansdError(
            f"no tar shards in {where}: give a folder that has some, or a pattern such as "
            "'laion/0*.tar'"
        )
    return [
        TarShard(each, each.relative_to(home).as_posix(), each.stat().st_size, caption)
        for each in found
    ]
