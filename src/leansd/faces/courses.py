"""How a training went: what a run's folder tells, whoever wrote it and however far it came."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from leansd.emoji.recipe import STAGES
from leansd.incubation.curves import FILE, Curves
from leansd.incubation.recipe import Recipe
from leansd.incubation.running import NET
from leansd.incubation.validation import FOLDER, list_looks
from leansd.text import Table

State = Literal["under way", "stopped", "finished"]
NOT_LOSSES = frozenset(
    {
        "step",
        "norm",
        "learning_rate",
        "steps_per_second",
        "peak_gib",
        "skipped",
        "seconds",
        "progress",
    }
)
"""What rows of a log hold besides losses."""


ROWS = 2
"""Of a grid on the way: the teacher's pictures above the student's."""


@dataclass(frozen=True)
class StageCourse:
    """One stage: its log, and pictures on the way."""

    name: str
    steps: int | None
    """That it is to take; None where time decides."""
    rows: tuple[Mapping[str, float], ...]
    closeness: Mapping[int, float]
    """PSNR of the student's pictures to the teacher's, in dB, by step."""
    looks: Mapping[int, Path]
    """Grids of their pictures, the teacher's above, by step."""

    @property
    def done(self) -> int:
        """Steps that are on record."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def losses(self) -> list[str]:
        """Names of the losses, in their order; the sum is called `loss`."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        return [name for name in names if name not in NOT_LOSSES]


@dataclass(frozen=True)
class Course:
    """A training, stage after stage."""

    name: str
    subject: str
    """The model that teaches, or that is trained."""
    state: State
    stages: tuple[StageCourse, ...]
    prompts: tuple[str, ...] = ()
    """Of the pictures on the way."""

    @property
    def starts(self) -> dict[str, int]:
        """The step of the whole training that each stage with a log begins at."""
        starts: dict[str, int] = {}
        total = 0
        for stage in self.stages:
            if stage.rows:
                starts[stage.name] = total
                total += stage.done
        return starts

    def list_values(self, name: str) -> list[list[tuple[float, float]]]:
        """A logged value over the steps of the whole training, a part a stage that has it."""
        parts = [
            [(self.starts[each.name] + row["step"], row[name]) for row in each.rows if name in row]
            for each in self.stages
            if each.rows
        ]
        return [part for part in parts if part]

    def write_log(self) -> str:
        """All rows, a line of JSON each."""
        return "".join(
            json.dumps({"stage": stage.name, **row}) + "\n"
            for stage in self.stages
            for row in stage.rows
        )


def read_run(recipe: Recipe, folder: Path, *, ended: bool) -> Course:
    """How far the run of a recipe has come."""
    state: State = "under way"
    if ended:
        state = "finished" if (folder / NET).exists() else "stopped"
    stages = tuple(_read_stage(each.name, each.steps, folder / each.name) for each in recipe.stages)
    return Course(recipe.name, recipe.model, state, stages, recipe.validation.prompts)


def read_emoji_run(folder: Path, *, ended: bool) -> Course:
    """How far the training of the embedded model has come."""
    state: State = "finished" if ended else "under way"
    return Course(
        "emoji", "emoji", state, tuple(_read_stage(name, None, folder / name) for name in STAGES)
    )


def _read_stage(name: str, steps: int | None, home: Path) -> StageCourse:
    seen = home / FOLDER
    closeness = {int(row["step"]): row["psnr"] for row in Curves(seen / FILE).load()}
    rows = tuple(Curves(home / FILE).load())
    return StageCourse(name, steps, rows, closeness, list_looks(seen))


def tabulate_course(course: Course) -> Table:
    """A row a stage: how far it came, what the loss did, how fast it went."""
    rows = [_show_stage(stage) for stage in course.stages]
    return Table(("stage", "steps", "loss, first", "loss, last", "steps/s", "skipped"), tuple(rows))


def _show_stage(stage: StageCourse) -> tuple[str, ...]:
    of = f" of {stage.steps}" if stage.steps is not None else ""
    if not stage.rows:
        return (stage.name, f"0{of}", "–", "–", "–", "–")
    first, last = stage.rows[0], stage.rows[-1]
    rates = [row["steps_per_second"] for row in stage.rows if "steps_per_second" in row]
    if not rates and last.get("seconds"):
        rates = [last["step"] / last["seconds"]]
    rate = f"{sum(rates) / len(rates):.3g}" if rates else "–"
    losses = (f"{row['loss']:.4g}" for row in (first, last))
    return (stage.name, f"{stage.done}{of}", *losses, rate, f"{last.get('skipped', 0):.0f}")


def open_look(path: Path, columns: int) -> list[list[Image.Image]]:
    """The rows of pictures that a grid was pasted from."""
    with Image.open(path) as file:
        grid: Image.Image = file.convert("RGB")
    wide, tall = grid.width // columns, grid.height // ROWS
    return [
        [grid.crop((x * wide, y * tall, (x + 1) * wide, (y + 1) * tall)) for x in range(columns)]
        for y in range(ROWS)
    ]
