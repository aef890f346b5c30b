"""The cache on disk: samples as they are once encoded, in files that are whole or absent.

    ROOT/<key>/cache.json                          what the key stands for
    ROOT/<key>/empty.safetensors                   the empty prompt
    ROOT/<key>/<shard>-<digest>/00000.safetensors  some hundred samples: a part
    ROOT/<key>/<shard>-<digest>/done.json          written last: the shard has no more

The key is a digest of all that the content follows from but the samples themselves: autoencoder,
text encoder, resolution, flip. Another autoencoder means another folder, another tar in the data
set another one in that.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from leansd.errors import LeansdError
from leansd.files import write_file
from leansd.incubation.data.batches import Conditioning
from leansd.incubation.data.samples import Flaw, Sample, Shard, digest

FORMAT = 1
ROWS = 512
LONGEST = 200
"""Bytes of a shard's name that its folder keeps: names of files end at 255."""
ABANDONED = 3600
"""Seconds after which nobody writes to a draft any more."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Latents:
    """One sample as the autoencoder sees it, in the UNet's scale."""

    mean: Tensor
    """[F, C, h, w], with F of 2 where the mirrored picture is the second."""
    std: Tensor | None = None
    """Of the same shape; None where an encoder gives one value."""
    added: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Conditioning that goes with the picture, not the caption: SDXL's `time_ids`, [6]."""


def pack_part(
    good: Sequence[tuple[Sample, Latents]],
    conditions: Mapping[str, int],
    encoded: Conditioning,
    flaws: Sequence[Flaw],
    dtype: torch.dtype,
) -> bytes:
    """Neighbouring samples of a shard as the content of a part's file.

    Args:
        conditions: the row of `encoded` that each caption has.
    """
    captions = [torch.tensor([conditions[c] for c in each.captions]) for each, _ in good]
    tensors = {
        "text": encoded.text.to(dtype),
        "caption": torch.cat(captions) if captions else torch.zeros(0, dtype=torch.int64),
        "first": torch.tensor([0, *map(len, captions)]).cumsum(0),
    }
    tensors |= {f"text.{name}": rows.to(dtype) for name, rows in encoded.added.items()}
    if good:
        latents = [each for _, each in good]
        tensors["mean"] = torch.stack([each.mean for each in latents]).to(dtype)
        stds = [each.std for each in latents if each.std is not None]
        if stds:
            tensors["std"] = torch.stack(stds).to(dtype)
        for name in latents[0].added:
            # As they are: sizes in pixels are more than half a precision can count.
            tensors[f"row.{name}"] = torch.stack([each.added[name] for each in latents])
    # One entry: safetensors writes several in an order of chance.
    keys = [each.key for each, _ in good]
    notes = json.dumps({"keys": keys, "flaws": [vars(flaw) for flaw in flaws]})
    return save({name: rows.contiguous() for name, rows in tensors.items()}, {"part": notes})


class CachePart:
    """A part on disk, of which rows are read one by one.

    Raises:
        LeansdError: it is not there, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._reading():
            file = safe_open(path, framework="pt")
            notes = json.loads(file.metadata()["part"])
            self.keys: tuple[str, ...] = tuple(notes["keys"])
            self.flaws = tuple(Flaw(**each) for each in notes["flaws"])
            self._rows = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            self._caption: list[int] = file.get_tensor("caption").tolist()
            self._first: list[int] = file.get_tensor("first").tolist()

    def __len__(self) -> int:
        return len(self.keys)

    def read_latents(self, row: int) -> Latents:
        """The latents of a sample, in single precision."""
        with self._reading():
            std = self._rows["std"][row].float() if "std" in self._rows else None
            return Latents(self._rows["mean"][row].float(), std, self._select("row.", row))

    def read_conditions(self, row: int, chance: float) -> Conditioning:
        """What one of a sample's captions was encoded to, one row, in single precision.

        Args:
            chance: from 0 to 1, which of them.
        """
        captions = self._caption[self._first[row] : self._first[row + 1]]
        at = captions[int(chance * len(captions))]
        with self._reading():
            added = {name: value[None] for name, value in self._select("text.", at).items()}
            return Conditioning(self._rows["text"][at : at + 1], added).float()

    def _select(self, prefix: str, row: int) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): rows[row]
            for name, rows in self._rows.items()
            if name.startswith(prefix)
        }

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise LeansdError(
                f"cannot read {self.path}: {error}; remove it and it is made anew from the data"
            ) from error


@dataclass(frozen=True)
class ShardCount:
    """What a shard has come to."""

    counts: tuple[int, ...]
    """Samples of each part."""
    flaws: int
    size: int
    """In bytes."""


class Cache:
    """The encoded samples of one key.

    Args:
        root: where caches are kept, a folder for each key.
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
            try:
                theirs = json.loads(card.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise self._refuse("its cache.json cannot be read") from error
            if theirs != json.loads(json.dumps(self.facts)):
                raise self._refuse("its cache.json tells of other networks or another resolution")
        elif self.folder.exists() and any(self.folder.glob("*/*.safetensors")):
            raise self._refuse("it has no cache.json")
        else:
            _write(card, json.dumps(self.facts, indent=2, sort_keys=True).encode())

    def _refuse(self, why: str) -> LeansdError:
        return LeansdError(
            f"{self.folder} is not this run's cache: {why}; remove it, or choose another folder"
        )

    def locate(self, shard: Shard) -> Path:
        """The folder of a shard's samples."""
        name = shard.name.encode()[:LONGEST].decode(errors="ignore")
        return self.folder / f"{name}-{shard.identity}"

    def locate_part(self, shard: Shard, number: int) -> Path:
        return self.locate(shard) / f"{number:05d}.safetensors"

    def write_part(self, shard: Shard, number: int, content: bytes) -> None:
        """Keep a part, whole or not at all; without room, what was kept before stays."""
        _write(self.locate_part(shard, number), content)

    def open_part(self, shard: Shard, number: int) -> CachePart:
        """A part to read from."""
        return CachePart(self.locate_part(shard, number))

    def has_part(self, shard: Shard, number: int) -> bool:
        """Whether a part is there and can be read; a damaged one is made anew."""
        try:
            self.open_part(shard, number)
        except LeansdError as error:
            if self.locate_part(shard, number).exists():
                log.warning("%s; it is made anew", error)
            return False
        return True

    def sweep(self, shard: Shard) -> None:
        """Remove what writers that were killed have left half-written."""
        for draft in self.locate(shard).glob(".*.part"):
            if time.time() - draft.stat().st_mtime > ABANDONED:
                draft.unlink(missing_ok=True)

    def finish(self, shard: Shard, parts: int) -> None:
        """Note that a shard has no more parts."""
        opened = [self.open_part(shard, number) for number in range(parts)]
        size = sum(each.path.stat().st_size for each in opened)
        flaws = sum(len(each.flaws) for each in opened)
        count = ShardCount(tuple(map(len, opened)), flaws, size)
        _write(self.locate(shard) / "done.json", json.dumps(vars(count)).encode())

    def find(self, shard: Shard) -> ShardCount | None:
        """What a shard has come to; None where it is not finished, or parts are missing."""
        try:
            noted = json.loads((self.locate(shard) / "done.json").read_text())
            count = ShardCount(tuple(noted["counts"]), noted["flaws"], noted["size"])
            sizes = [self.locate_part(shard, n).stat().st_size for n in range(len(count.counts))]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return count if sum(sizes) == count.size else None

    def write_empty(self, conditions: Conditioning) -> None:
        """Keep the empty prompt, one row."""
        rows = {"text": conditions.text, **{f"text.{k}": v for k, v in conditions.added.items()}}
        content = save({name: value.to(self.dtype).contiguous() for name, value in rows.items()})
        _write(self.folder / "empty.safetensors", content)

    def read_empty(self) -> Conditioning | None:
        """The empty prompt; None where it is not kept."""
        try:
            found = load_file(self.folder / "empty.safetensors")
            text = found.pop("text")
        except (OSError, SafetensorError, KeyError):
            return None
        return Conditioning(text, {k.removeprefix("text."): v for k, v in found.items()})


def _write(path: Path, content: bytes) -> None:
    try:
        write_file(path, content)
    except LeansdError as error:
        raise LeansdError(
            f"{error}; what the cache holds is whole and is gone on from: make room, or choose "
            "another folder"
        ) from error
