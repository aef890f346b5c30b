"""Text that every face prints alike: tables and durations."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


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
        return "\n".join("| " + " | ".join(_escape(c) for c in line) + " |" for line in lines)


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")


UNITS = (("d", 24 * 60 * 60), ("h", 60 * 60), ("min", 60), ("s", 1))


def describe_duration(seconds: float) -> str:
    """In its largest unit and the one below: `42 s`, `3 min 5 s`, `2 h 0 min`, `4 d 3 h`."""
    left = max(0, round(seconds))
    for (unit, size), (part, least) in pairwise(UNITS):
        if left >= size:
            return f"{left // size} {unit} {left % size // least} {part}"
    return f"{left} s"
