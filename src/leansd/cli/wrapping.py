"""Text for a screen that is narrower than it."""

import re
from shutil import get_terminal_size
from textwrap import wrap
from typing import TextIO


def fit(text: str, stream: TextIO) -> str:
    """Text as it is, or wrapped where the stream is a terminal."""
    return wrap_text(text, get_terminal_size().columns) if stream.isatty() else text


def wrap_text(text: str, width: int) -> str:
    """Break long lines between words; what goes on stands under where the text began.

    A first word set apart by two spaces or more is a heading of its line, and stays alone.
    """
    return "\n".join(_wrap_line(line, width) for line in text.splitlines())


def _wrap_line(line: str, width: int) -> str:
    head = re.match(r"\s*(\S+ {2,})?", line)
    indent = " " * (head.end() if head is not None else 0)
    # A path or an address stays whole, to be copied.
    parts = wrap(
        line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(parts) if len(line) > width else line


def fold_grid(grid: str, steps: int, width: int) -> str:
    """A plan's grid, its steps in as many pieces below each other as the width demands."""
    lines = grid.splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith(" "))
    heads, body, legend = lines[:start], lines[start:-1], lines[-1]
    label = len(body[-1]) - steps
    room = width - label
    if steps <= room or room < 10:
        return grid
    room -= room % 10  # the ruler's numbers stay whole
    pieces = [
        "\n".join(line[:label] + line[at : at + room] for line in body)
        for at in range(label, label + steps, room)
    ]
    return "\n".join([*heads, "\n\n".join(pieces), legend])
