"""A table as plain data, so that the terminal, a page and a README draw the same one."""

from dataclasses import dataclass


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
