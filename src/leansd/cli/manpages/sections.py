"""A manual as data, whatever it is written in."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """A heading of `level` 1 to 3 and, in this order, what stands below it."""

    title: str
    level: int
    code: tuple[str, ...] = ()
    paragraphs: tuple[str, ...] = ()
    terms: tuple[tuple[str, str], ...] = ()
    """What is explained, and its explanation."""
