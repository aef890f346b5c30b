"""The cache on disk: samples as they are once encoded, in files that are whole or absent.

    ROOT/<key>/cache.json                          what the key stands for
    ROOT/<key>/empty.safetensors                   the empty prompt
    ROOT/<key>/<shard>-<digest>/00000.safetensors  some hundred samples
    ROOT/<key>/<shard>-<digest>/done.json          written last: the shard has no more

The key is a digest of all that the content follows from but the samples themselves: autoencoder,
text encoder, resolution, flip. Another autoencoder means another folder, another tar in the data
set another one in that.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from leansd.errors import LeansdError
from leansd.files import write_file
from leansd.incubation.batches import Conditions
from leansd.incubation.data.parts import OpenPart, Part, pack
from leansd.incubation.data.samples import Shard, digest

FORMAT = 1
ROWS = 512
ABANDONED = 3600
"""Seconds after which nobody writes to a draft any more."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tally:
    """What a shard has come to."""

    counts: tuple[int, ...]
    """Samples of each part."""
    flaws: int
    size: int
    """In bytes."""

    @property
    def samples(self) -> int:
        return sum(self.counts)


class Cache:
    """The encoded samples of one key.

    Args:
        root: where caches are kept, a folder each key.
        facts: what the key stands for, as JSON values.
        dtype: of all that is kept.
        rows: samples of a part, the flawed ones included; about 100 MB at 512 px.

    Raises:
        LeansdError: the folder of the key was written by something else, or cannot be.
    """

    def __init__(
        self,
        root: str | Path,
        facts: Mapping[str, Any],
        dtype: torch.dtype = torch.float16,
        rows: int = ROWS,
    ) -> None:
        self.facts = {"format": FORMAT, "dtype": str(dtype), "rows": rows, **facts}
        self.dtype, self.rows = dtype, rows
        self.key = digest(self.facts)
        self.folder = Path(root).expanduser() / self.key
        card = self.folder / "cache.json"
        if card.exists():
            self._check(card)
        elif self.folder.exists() and any(self.folder.glob("*/*.safetensors")):
            raise self._refuse("it has no cache.json")
        else:
            _write(card, json.dumps(self.facts, indent=2, sort_keys=True).encode())

    def _check(self, card: Path) -> None:
        try:
            theirs = json.loads(card.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._refuse("its cache.json cannot be read") from error
        if theirs != json.loads(json.dumps(self.facts)):
            raise self._refuse("its cache.json tells of other networks or another resolution")

    def _refuse(self, why: str) -> LeansdError:
        return LeansdError(
            f"{self.folder} is not this run's cache: {why}; remove it, or choose another folder"
        )

    def locate(self, shard: Shard[Any]) -> Path:
        """The folder of a shard's samples."""
        return self.folder / f"{shard.name}-{shard.identity}"

    def locate_part(self, shard: Shard[Any], number: int) -> Path:
        return self.locate(shard) / f"{number:05d}.safetensors"

    def write_part(self, shard: Shard[Any], number: int, part: Part) -> None:
        """Keep a part, whole or not at all.

        Raises:
            LeansdError: there is no room, or no permission; what was kept before stays.
        """
        _write(self.locate_part(shard, number), pack(part, self.dtype))

    def open_part(self, shard: Shard[Any], number: int) -> OpenPart:
        """A part to read from.

        Raises:
            LeansdError: it is not there, or damaged.
        """
        return OpenPart(self.locate_part(shard, number))

    def has_part(self, shard: Shard[Any], number: int) -> bool:
        """Whether a part is there and can be read; a damaged one is made anew."""
        path = self.locate_part(shard, number)
        if not path.exists():
            return False
        try:
            OpenPart(path)
        except LeansdError as error:
            log.warning("%s; it is made anew", error)
            return False
        return True

    def sweep(self, shard: Shard[Any]) -> None:
        """Remove what writers that were killed have left half-written."""
        for draft in self.locate(shard).glob(".*.part"):
            if time.time() - draft.stat().st_mtime > ABANDONED:
                draft.unlink(missing_ok=True)

    def finish(self, shard: Shard[Any], parts: int) -> Tally:
        """Note that a shard has no more parts."""
        opened = [self.open_part(shard, number) for number in range(parts)]
        size = sum(each.path.stat().st_size for each in opened)
        flaws = sum(len(each.flaws) for each in opened)
        tally = Tally(tuple(map(len, opened)), flaws, size)
        _write(self.locate(shard) / "done.json", json.dumps(vars(tally)).encode())
        return tally

    def find(self, shard: Shard[Any]) -> Tally | None:
        """What a shard has come to; None where it is not finished, or parts are missing."""
        try:
            noted = json.loads((self.locate(shard) / "done.json").read_text())
            tally = Tally(tuple(noted["counts"]), noted["flaws"], noted["size"])
            sizes = [self.locate_part(shard, n).stat().st_size for n in range(len(tally.counts))]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return tally if sum(sizes) == tally.size else None

    def write_empty(self, conditions: Conditions) -> None:
        """Keep the empty prompt, one row."""
        rows = {"text": conditions.text, **{f"text.{k}": v for k, v in conditions.added.items()}}
        content = save({name: value.to(self.dtype).contiguous() for name, value in rows.items()})
        _write(self.folder / "empty.safetensors", content)

    def read_empty(self) -> Conditions | None:
        """The empty prompt; None where it is not kept."""
        try:
            found = load_file(self.folder / "empty.safetensors")
            return Conditions(
                found.pop("text"), {k.removeprefix("text."): v for k, v in found.items()}
            )
        except (OSError, SafetensorError, KeyError):
            return None


def _write(path: Path, content: bytes) -> None:
    try:
        write_file(path, content)
    except LeansdError as error:
        raise LeansdError(
            f"{error}; what the cache holds is whole and is gone on from: make room, or choose "
            "another folder"
        ) from error
