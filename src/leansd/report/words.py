"""Words that several reports share."""

from __future__ import annotations


def count(number: int, word: str) -> str:
    """`1 stage`, `2 stages`."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
