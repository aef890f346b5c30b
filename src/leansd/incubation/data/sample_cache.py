"""The cache on disk: samples as they are once encoded, written whole or not, and read in order.

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
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from leansd.errors import LeansdError
from leansd.files import write_file
from leansd.incubation.data.batches import Batch, Conditioning, DataSource, Read
from leansd.incubation.data.samples import Flaw, Sample, Shard, digest
from leansd.incubation.noise import hash_words, make_generator

FORMAT = 1
ROWS = 512
LONGEST = 200
"""Bytes of a shard's name that its folder keeps: names of files end at 255."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Latents:
    """One sample as the autoencoder sees it, in the UNet's scale."""

    mean: Tensor
    """[F, C, h, w], with F of 2 where the mirrored picture is the second."""
    std: Tensor | None = None
    """The deviation, shaped as the mean; None where an encoder gives one value."""
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
        **encoded.pack(dtype),
        "caption": torch.cat(captions) if captions else torch.zeros(0, dtype=torch.int64),
        "first": torch.tensor([0, *map(len, captions)]).cumsum(0),
    }
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
        _write(self.folder / "empty.safetensors", save(conditions.pack(self.dtype)))

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


# -- reading in an order of the seed ---------------------------------------------------------------

OPEN_FILES = 256
Share = Annotated[float, Field(ge=0, le=1)]


class SampleOrder:
    """Shards shuffled by the seed and the epoch, samples among neighbouring shards.

    Args:
        counts: samples of each shard.
        window: samples that are shuffled together, at least: as many shards as hold them.
    """

    def __init__(self, counts: Sequence[int], seed: int, window: int) -> None:
        self.counts, self.seed, self.window = tuple(counts), seed, window
        self.total = sum(self.counts)
        self._find_groups = lru_cache(1)(self._group)
        self._find_spots = lru_cache(1)(self._shuffle)

    def find(self, place: int) -> tuple[int, int]:
        """Shard and row of the sample at a place."""
        begin, spots = self.find_window(place)
        shard, row = spots[place - begin].tolist()
        return shard, row

    def find_window(self, place: int) -> tuple[int, Tensor]:
        """The samples that a place's is shuffled with: the first one's place, and [N, 2] of shards
        and rows."""
        epoch = place // self.total
        groups = self._find_groups(epoch)
        sizes = [sum(self.counts[shard] for shard in group) for group in groups]
        begins = list(accumulate(sizes[:-1], initial=epoch * self.total))
        number = bisect_right(begins, place) - 1
        return begins[number], self._find_spots(epoch, number)

    def _shuffle(self, epoch: int, number: int) -> Tensor:
        spots = torch.tensor(
            [
                (shard, row)
                for shard in self._find_groups(epoch)[number]
                for row in range(self.counts[shard])
            ]
        )
        generator = make_generator("rows", self.seed, epoch, number, by=hash_words)
        return spots[torch.randperm(len(spots), generator=generator)]

    def _group(self, epoch: int) -> list[list[int]]:
        generator = make_generator("shards", self.seed, epoch, by=hash_words)
        groups: list[list[int]] = []
        room = 0
        for shard in torch.randperm(len(self.counts), generator=generator).tolist():
            if not self.counts[shard]:
                continue
            if room <= 0:
                groups.append([])
                room = self.window
            groups[-1].append(shard)
            room -= self.counts[shard]
        return groups


class Chances(BaseModel):
    """How often samples are given with other prompts than their own."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    empty: Share = 0.1
    """The share of samples whose prompt is empty, for classifier-free guidance."""
    other: Share = 0.0
    """The share, of those that are not empty, whose prompt is another sample's: a student learns
    from more pairs than there are (Random Conditioning, arXiv 2504.02011)."""
    window: PositiveInt = 8192
    """Samples that are shuffled together, at least."""


class CachedSource(DataSource):
    """The samples of some shards, all of them in the cache.

    Raises:
        LeansdError: a shard is not in the cache yet, or there is no sample that could be used.
    """

    def __init__(
        self, cache: Cache, shards: Sequence[Shard], chances: Chances | None = None
    ) -> None:
        self.cache, self.chances = cache, chances or Chances()
        self.parts: list[tuple[Shard, int]] = []
        self.counts: list[int] = []
        self.flaws = 0
        for shard in shards:
            count = cache.find(shard)
            if count is None:
                raise LeansdError(f"shard {shard.name} is not in {cache.folder} yet: fill it first")
            self.parts += [(shard, number) for number in range(len(count.counts))]
            self.counts += count.counts
            self.flaws += count.flaws
        if not len(self):
            raise LeansdError(
                f"no sample of {len(shards)} shards could be used, {self.flaws} are left out: see "
                "the log for why"
            )

    def __len__(self) -> int:
        """Samples of an epoch."""
        return sum(self.counts)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of what samples and their order depend on, the seed apart."""
        named = [self.cache.locate(shard).name for shard, _ in self.parts]
        chances = {name: getattr(self.chances, name) for name in Chances.model_fields}
        facts = {"cache": self.cache.key, "parts": named, "counts": self.counts}
        return digest(facts | chances)

    @property
    def empty(self) -> Conditioning:
        found = self.cache.read_empty()
        if found is None:
            raise LeansdError(f"no empty prompt in {self.cache.folder}: fill the cache again")
        return found.float()

    def write_state(self, seed: int, place: int) -> dict[str, Any]:
        return {"source": self.fingerprint, "seed": seed, "place": place}

    def read(self, seed: int) -> Read:
        order = SampleOrder(self.counts, seed, self.chances.window)
        empty_prompt = self.empty

        @lru_cache(OPEN_FILES)
        def open_part(number: int) -> CachePart:
            return self.cache.open_part(*self.parts[number])

        def read(place: int) -> Batch:
            generator = make_generator("sample", seed, place, by=hash_words)
            # All are drawn, whatever for: a share that is changed leaves the others' alone.
            flip, caption, empty, other, which, its = torch.rand(
                6, generator=generator, dtype=torch.float64
            ).tolist()
            shard, row = order.find(place)
            part = open_part(shard)
            latents = part.read_latents(row)
            view = int(flip * len(latents.mean))
            sample = latents.mean[view]
            if latents.std is not None:
                noise = torch.randn(sample.shape, generator=generator)
                sample = sample + latents.std[view] * noise
            if empty < self.chances.empty:
                conditions = empty_prompt
            elif other < self.chances.other:
                _, spots = order.find_window(place)
                number, its_row = spots[int(which * len(spots))].tolist()
                conditions = open_part(number).read_conditions(its_row, its)
            else:
                conditions = part.read_conditions(row, caption)
            added = {**conditions.added, **{name: v[None] for name, v in latents.added.items()}}
            return Batch(sample[None], conditions.text, added, (part.keys[row],))

        return read
