"""What the commands share at the terminal: tables, progress, the JSON line, quiet libraries."""

import json
import sys
import warnings
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table as RichTable
from rich.text import Text

from leansd.cli.silence import is_silent
from leansd.cli.wrapping import fit, fold_grid
from leansd.text import Table


def open_console() -> Console:
    """Standard output: results. Not a terminal, it is as wide as the longest row needs."""
    return Console() if sys.stdout.isatty() else Console(width=200)


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


def show_table(table: Table) -> None:
    """Print a table."""
    drawn = RichTable(
        title=table.caption or None,
        box=box.SIMPLE_HEAD,
        header_style="bold",
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for place, name in enumerate(table.columns):
        drawn.add_column(
            Text(name), justify="right" if table.is_numeric(place) else "left", overflow="fold"
        )
    for row in table.rows:
        drawn.add_row(*(Text(cell) for cell in row))
    open_console().print(drawn)


def show_text(text: str) -> None:
    """Print text: as it is, but for a terminal that is narrower."""
    print(fit(text, sys.stdout))


def show_grid(grid: str, steps: int) -> None:
    """Print a plan's grid, in pieces on a terminal that is narrower."""
    show_text(fold_grid(grid, steps, open_console().width) if sys.stdout.isatty() else grid)


def show_json(fields: Mapping[str, Any]) -> None:
    """Print one JSON object on one line: the last that a command prints."""
    print(json.dumps(fields, ensure_ascii=False, allow_nan=False), flush=True)


def note(message: str) -> None:
    """Say on standard error what is being done."""
    if not is_silent():
        print(fit(message, sys.stderr), file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Say on standard error what the user should know, `--quiet` or not."""
    print(fit(message, sys.stderr), file=sys.stderr, flush=True)


def hush_libraries() -> None:
    """Keep the libraries' own notices and bars off the terminal, in this process only."""
    import diffusers
    import huggingface_hub
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    # Commands say so themselves, before anything runs.
    warnings.filterwarnings("ignore", "plan .* was tuned for sampler", UserWarning)
