"""How durations are told, everywhere the same way."""

from __future__ import annotations

from itertools import pairwise

UNITS = (("d", 24 * 60 * 60), ("h", 60 * 60), ("min", 60), ("s", 1))


def describe_duration(seconds: float) -> str:
    """In its largest unit and the one below: `42 s`, `3 min 5 s`, `2 h 0 min`, `4 d 3 h`."""
    left = max(0, round(seconds))
    for (unit, size), (part, least) in pairwise(UNITS):
        if left >= size:
            return f"{left // size} {unit} {left % size // least} {part}"
    return f"{left} s"
