"""The run of a recipe with a page that says how it goes, in the run's folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from leansd.errors import LeansdError
from leansd.evaluation.records import stamp
from leansd.incubation.recipe import Recipe, Stage
from leansd.incubation.training_log import LogRow, describe_row, read_run
from leansd.incubation.training_run import open_run, run_stages
from leansd.incubation.training_state import read_processes
from leansd.report.page import Provenance, write_report
from leansd.report.training import report_training

PAGE = "report.html"
SHARE = 50
"""A page that is written again while something goes on takes no more than 1/50 of the time."""
LEAST = 30.0
"""Seconds between two pages, at the least."""


@dataclass
class LivePage:
    """The page of a run, written again while it goes on."""

    recipe: Recipe
    folder: Path
    origin: Provenance
    due: float
    """When it is to be written next, by `time.monotonic`."""

    def follow(self, stage: Stage, row: LogRow) -> None:
        """Write it if it is due, or a stage but the last is over."""
        is_over = row["step"] == stage.steps and stage is not self.recipe.stages[-1]
        if is_over or time.monotonic() >= self.due:
            self.write(ended=False)

    def write(self, *, ended: bool) -> None:
        begin = time.monotonic()
        log = read_run(self.recipe, self.folder, ended=ended)
        write_report(self.folder / PAGE, report_training(log, self.recipe.write()), self.origin)
        end = time.monotonic()
        self.due = end + max(LEAST, SHARE * (end - begin))


def incubate_into(
    folder: Path,
    recipe: Recipe,
    *,
    resume: bool,
    note: Callable[[str], None],
    command: str = "leansd incubate",
) -> Path:
    """Run a recipe, say on the way how it goes, and keep the page of the run.

    Args:
        command: what the page says runs it again.
    """
    run = open_run(recipe, folder, resume=resume, note=note)
    state = read_processes()
    origin = Provenance(command, stamp(state.device))
    page = LivePage(recipe, folder, origin, due=time.monotonic() + LEAST / 3)

    def report(stage: Stage, row: LogRow) -> None:
        note(describe_row(stage.name, stage.steps, row))
        page.follow(stage, row)

    try:
        return run_stages(run, on_log=report)
    finally:
        # Where the disk is full, that is what is to be said, not that the page lacks room, too.
        with suppress(LeansdError):
            if state.is_main_process:
                page.write(ended=True)
