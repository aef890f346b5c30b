"""The terminal: text that fits it, tables, progress, the JSON line, quiet libraries."""

import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import singledispatch
from shutil import get_terminal_size
from textwrap import wrap
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table as RichTable
from rich.text import Text

from leansd.text import Table, encode_json

_silent = False


def keep_silent(asked: bool) -> bool:
    """What `--quiet` does; every command that has the option says so anew."""
    global _silent
    _silent = asked
    return asked


def is_silent() -> bool:
    """Whether progress and notes are left out."""
    return _silent


# -- results, on standard output ---------------------------------------------------------------


def open_console() -> Console:
    """Standard output: results. Not a terminal, it is as wide as the longest row needs."""
    return Console() if sys.stdout.isatty() else Console(width=200)


@dataclass(frozen=True)
class PlanText:
    """A plan as text: a row a unit, a column a step."""

    text: str
    steps: int


@singledispatch
def show(result: object) -> None:
    """Prints a result: text as it is, but for a terminal that is narrower."""
    print(fit(str(result), sys.stdout))


@show.register
def show_table(result: Table) -> None:
    """Prints a table."""
    drawn = RichTable(
        title=result.caption or None,
        box=box.SIMPLE_HEAD,
        header_style="bold",
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for place, name in enumerate(result.columns):
        drawn.add_column(
            Text(name), justify="right" if result.is_numeric(place) else "left", overflow="fold"
        )
    for row in result.rows:
        drawn.add_row(*(Text(cell) for cell in row))
    open_console().print(drawn)


@show.register
def show_grid(result: PlanText) -> None:
    """Prints a plan's grid, in pieces on a terminal that is narrower."""
    width = open_console().width
    show(fold_grid(result.text, result.steps, width) if sys.stdout.isatty() else result.text)


def show_json(fields: Mapping[str, Any]) -> None:
    """Prints one JSON object on one line: the last that a command prints."""
    print(encode_json(fields, ensure_ascii=False), flush=True)


# -- what is being done, on standard error -----------------------------------------------------


def note(message: str) -> None:
    """Says on standard error what is being done."""
    if not is_silent():
        print(fit(message, sys.stderr), file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Says on standard error what the user should know, `--quiet` or not."""
    print(fit(message, sys.stderr), file=sys.stderr, flush=True)


def open_progress() -> Progress:
    """Progress on standard error, gone when done, so that standard output holds results only."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True, quiet=is_silent()),
        transient=True,
        disable=is_silent() or not sys.stderr.isatty(),
    )


class ProgressBar:
    """One line of progress; its methods are what the library's `on_progress` functions take."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def say(self, text: str) -> None:
        """Prints a note above the bar."""
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def count(self, done: float, total: float, text: str | None = None) -> None:
        """Moves the bar: `done` of `total` is done."""
        self._progress.update(self._task, completed=int(done), total=total, description=text)

    def share(self, text: str, share: float) -> None:
        """Moves the bar to a share of all work; `text` comes next."""
        done = round(100 * share)
        self._progress.update(self._task, description=text, completed=done, total=100)

    def advance(self, text: str, by: float = 1) -> None:
        """A further piece is done."""
        self._progress.update(self._task, description=text, advance=by)


@contextmanager
def follow(text: str, total: float | None = None) -> Iterator[ProgressBar]:
    """A bar while something runs."""
    with open_progress() as progress:
        yield ProgressBar(progress, progress.add_task(text, total=total))


def hush_libraries() -> None:
    """Keeps the libraries' own notices and bars off the terminal, in this process only."""
    import diffusers
    import huggingface_hub
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    # Commands say so themselves, before anything runs.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"leansd\.runtime")
    warnings.filterwarnings("ignore", "invalid value encountered in cast", RuntimeWarning)


# -- text for a screen that is narrower than it ------------------------------------------------


def fit(text: str, stream: TextIO) -> str:
    """Text as it is, or wrapped where the stream is a terminal."""
    return wrap_text(text, get_terminal_size().columns) if stream.isatty() else text


def wrap_text(text: str, width: int) -> str:
    """Breaks long lines between words; what goes on stands under where the text began.

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
