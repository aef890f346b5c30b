"""Text that every face prints alike: tables, durations, offers after a mistake."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from leansd.errors import LeansdError

if TYPE_CHECKING:
    from pydantic import ValidationError


@dataclass(frozen=True)
class Table:
    """Text cells under column heads; the first column names the row."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row of {len(row)} cells under {len(self.columns)} columns")

    def is_numeric(self, place: int) -> bool:
        """Whether a column holds numbers (with or without units) and so is set to the right."""
        cells = [row[place] for row in self.rows if row[place]]
        return bool(cells) and all(cell[0] in "0123456789+-.–" for cell in cells)

    def __str__(self) -> str:
        lines = (self.columns, *self.rows)
        numeric = [self.is_numeric(i) for i in range(len(self.columns))]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if numeric[i] else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def markdown(self) -> str:
        """The table for a README."""
        rule = ["---:" if self.is_numeric(i) else "---" for i in range(len(self.columns))]
        lines = (self.columns, rule, *self.rows)
        escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
        return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


UNITS = (("d", 24 * 60 * 60), ("h", 60 * 60), ("min", 60), ("s", 1))


def describe_duration(seconds: float) -> str:
    """In its largest unit and the one below: `42 s`, `3 min 5 s`, `2 h 0 min`, `4 d 3 h`."""
    left = max(0, round(seconds))
    for (unit, size), (part, least) in pairwise(UNITS):
        if left >= size:
            return f"{left // size} {unit} {left % size // least} {part}"
    return f"{left} s"


def encode_json(value: Any, **options: Any) -> str:
    """JSON text in which NaN and Inf are null: JSON has no word for them."""
    return json.dumps(_drop_infinite(value), allow_nan=False, **options)


def _drop_infinite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _drop_infinite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_drop_infinite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def suggest_name(name: str, known: Iterable[str]) -> str:
    """What to say after "no such name": `; did you mean X?` if one is near, and all there are."""
    names = list(known)
    near = get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{hint} (there are {', '.join(names)})"


def refuse_unknown(what: str, options: Iterable[str], known: Iterable[str]) -> None:
    """Refuse options that there are not.

    Raises:
        LeansdError: there is one; the message names those that `what` has.
    """
    names = list(known)
    for option in options:
        if option not in names:
            offer = suggest_name(option, names) if names else "; it has none"
            raise LeansdError(f"{what} has no option {option!r}{offer}")


def explain_validation(error: ValidationError) -> str:
    """The first thing that pydantic found wrong, with its place: `data.size: Field required`."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    # What our own validators raise reads as it is.
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
