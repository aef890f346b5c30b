"""Parts of the cache: some hundred encoded samples in one file of safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from leansd.errors import LeansdError
from leansd.incubation.batches import Conditions
from leansd.incubation.data.samples import Flaw


@dataclass(frozen=True)
class Latents:
    """One sample as the autoencoder sees it, in the UNet's scale.

    Attributes:
        mean: [F, C, h, w], with F of 2 where the mirrored picture is the second.
        std: of the same shape; None where an encoder gives one value.
        added: conditions that go with the picture, not the caption: SDXL's `time_ids`, [6].
    """

    mean: Tensor
    std: Tensor | None = None
    added: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


@dataclass(frozen=True)
class Part:
    """Neighbouring samples of a shard, encoded.

    Attributes:
        keys: of those that could be used.
        captions: the captions of each, as rows of `conditions`.
    """

    keys: tuple[str, ...]
    latents: tuple[Latents, ...]
    captions: tuple[tuple[int, ...], ...]
    conditions: Conditions
    flaws: tuple[Flaw, ...] = ()


def pack(part: Part, dtype: torch.dtype) -> bytes:
    """A part as the content of its file."""
    captions = [torch.tensor(each) for each in part.captions]
    tensors = {
        "text": part.conditions.text.to(dtype),
        "caption": torch.cat(captions) if captions else torch.zeros(0, dtype=torch.int64),
        "first": torch.tensor([0, *map(len, captions)]).cumsum(0),
    }
    tensors |= {f"text.{name}": rows.to(dtype) for name, rows in part.conditions.added.items()}
    if part.latents:
        tensors["mean"] = torch.stack([each.mean for each in part.latents]).to(dtype)
        stds = [each.std for each in part.latents if each.std is not None]
        if stds:
            tensors["std"] = torch.stack(stds).to(dtype)
        for name in part.latents[0].added:
            # As they are: sizes in pixels are more than half a precision can count.
            tensors[f"row.{name}"] = torch.stack([each.added[name] for each in part.latents])
    # One entry: safetensors writes several in an order of chance.
    notes = json.dumps({"keys": part.keys, "flaws": [vars(flaw) for flaw in part.flaws]})
    return save({name: rows.contiguous() for name, rows in tensors.items()}, {"part": notes})


class OpenPart:
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

    def list_captions(self, row: int) -> list[int]:
        """The captions of a sample, to be read by `read_conditions`."""
        return self._caption[self._first[row] : self._first[row + 1]]

    def read_conditions(self, caption: int) -> Conditions:
        """What a caption was encoded to, one row, in single precision."""
        with self._reading():
            text = self._rows["text"][caption : caption + 1].float()
            added = {k: v[None].float() for k, v in self._select("text.", caption).items()}
            return Conditions(text, added)

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
