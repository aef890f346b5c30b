"""A job run to its end, in this process or by a pool of workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from leansd.bulk.drawing import Drawer
from leansd.bulk.jobs import Job, Part
from leansd.errors import LeansdError
from leansd.files import write_file

Work = Callable[[Job, Sequence[Part]], Iterable[tuple[Part, bytes]]]
"""Draws parts, in any order: each with the bytes of its shard."""


def draw_here(job: Job, parts: Sequence[Part]) -> Iterator[tuple[Part, bytes]]:
    """One after the other, in this process."""
    drawer = Drawer(job)
    for part in parts:
        yield part, drawer.draw(part)


def run_job(
    job: Job,
    parts: Sequence[Part],
    folder: Path,
    *,
    work: Work = draw_here,
    on_part: Callable[[Part], None] = lambda part: None,
) -> None:
    """Draw the parts that are given, and write each shard in one go as it comes.

    Raises:
        LeansdError: a shard cannot be drawn or written; those that are there are whole.
    """
    if not parts:
        return
    for part, content in work(job, parts):
        try:
            write_file(folder / part.name, content)
        except LeansdError as error:
            raise LeansdError(
                f"{error}; the shards that are there are whole, and the same command goes on"
            ) from error
        on_part(part)
