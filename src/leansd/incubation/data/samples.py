"""Samples before they are encoded: what a shard of a data set gives, and what cannot be used."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Generic, Protocol, TypeVar

PICTURES = ("jpg", "jpeg", "png", "webp")
"""The endings of picture files."""
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


def clean_captions(found: Any) -> tuple[str, ...]:
    """Captions as they stand in a file: a text or a list of them; empty ones do not count."""
    texts = found if isinstance(found, list) else [found]
    stripped = (" ".join(text.split()) for text in texts if isinstance(text, str))
    return tuple(text for text in stripped if text)
