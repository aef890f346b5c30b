"""What a training logged: a flat JSON line for every so many steps, and pictures on the way."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from leansd.errors import LeansdError
from leansd.files import write_file
from leansd.incubation.recipe import Recipe
from leansd.text import Table, describe_duration, encode_json

FILE = "losses.jsonl"
"""The log of a stage, in its folder."""
NET, VALIDATION = "net", "validation"
"""Folders of what a run or a stage made, and of a stage's grids of pictures with their log."""
NOT_LOSSES = frozenset(("step", "norm", "learning_rate", "steps_per_second", "peak_gib", "skipped"))
"""What rows of a log hold besides losses."""
GRID_ROWS = 2
"""The teacher's pictures above the student's."""
RunState = Literal["under way", "stopped", "finished"]
LogRow = Mapping[str, float]
_GRID = re.compile(r"step-(\d+)\.png")


@dataclass(frozen=True)
class LossLog:
    """A file of losses by step."""

    path: Path

    def add(self, row: LogRow) -> None:
        """Write one line more, or raise LeansdError where it cannot be written."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(encode_json(row) + "\n")
        except OSError as error:
            raise LeansdError(f"cannot write {self.path}: {error.strerror or error}") from error

    def cut(self, step: int) -> None:
        """Take out the rows after a checkpoint's step: those steps are taken again."""
        rows = self.load()
        kept = "".join(encode_json(row) + "\n" for row in rows if row["step"] <= step)
        if self.path.exists() and kept != self.path.read_text(encoding="utf-8"):
            write_file(self.path, kept)

    def load(self) -> list[dict[str, float]]:
        """All rows; a line that a kill or a full disk cut off is none."""
        if not self.path.exists():
            return []
        rows: list[dict[str, float]] = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and "step" in row:
                rows.append({name: math.nan if v is None else v for name, v in row.items()})
        return rows


def name_grid(step: int) -> str:
    """The file of the pictures after so many steps."""
    return f"step-{step:08d}.png"


def read_grid(path: Path, columns: int) -> list[list[Image.Image]]:
    """The rows of pictures that a grid was made of."""
    with Image.open(path) as file:
        grid: Image.Image = file.convert("RGB")
    wide, tall = grid.width // columns, grid.height // GRID_ROWS
    return [
        [grid.crop((x * wide, y * tall, (x + 1) * wide, (y + 1) * tall)) for x in range(columns)]
        for y in range(GRID_ROWS)
    ]


@dataclass(frozen=True)
class StageLog:
    """One stage: its rows, and pictures on the way."""

    name: str
    steps: int
    """The steps that the stage is to take."""
    rows: tuple[LogRow, ...]
    psnr: Mapping[int, float]
    """PSNR of the student's pictures to the teacher's, in dB, by step."""
    grids: Mapping[int, Path]
    """Files of their pictures, the teacher's above, by step."""

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
class TrainingLog:
    """A training, stage after stage."""

    name: str
    subject: str
    """The model that teaches."""
    state: RunState
    stages: tuple[StageLog, ...]
    prompts: tuple[str, ...] = ()
    """Prompts of the pictures on the way."""

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
        """A logged value by the step of the whole training, a list for each stage that has it."""
        parts = [
            [(self.starts[each.name] + row["step"], row[name]) for row in each.rows if name in row]
            for each in self.stages
            if each.rows
        ]
        return [part for part in parts if part]

    def write_rows(self) -> str:
        """All rows, a line of JSON each."""
        return "".join(
            encode_json({"stage": stage.name, **row}) + "\n"
            for stage in self.stages
            for row in stage.rows
        )

    def tabulate(self) -> Table:
        """A row for each stage: how far it came, what the loss did, how fast it went."""
        columns = ("stage", "steps", "loss, first", "loss, last", "steps/s", "skipped")
        return Table(columns, tuple(_show_stage(stage) for stage in self.stages))


def _show_stage(stage: StageLog) -> tuple[str, ...]:
    steps = f"{stage.done} of {stage.steps}"
    if not stage.rows:
        return (stage.name, steps, "–", "–", "–", "–")
    first, last = stage.rows[0], stage.rows[-1]
    rates = [row["steps_per_second"] for row in stage.rows if "steps_per_second" in row]
    rate = f"{sum(rates) / len(rates):.3g}" if rates else "–"
    losses = (f"{row['loss']:.4g}" for row in (first, last))
    return (stage.name, steps, *losses, rate, f"{last.get('skipped', 0):.0f}")


def read_run(recipe: Recipe, folder: Path, *, ended: bool) -> TrainingLog:
    """How far the run of a recipe came."""
    state: RunState = "under way"
    if ended:
        state = "finished" if (folder / NET).exists() else "stopped"
    stages = tuple(_read_stage(each.name, each.steps, folder / each.name) for each in recipe.stages)
    return TrainingLog(recipe.name, recipe.model, state, stages, recipe.validation.prompts)


def _read_stage(name: str, steps: int, home: Path) -> StageLog:
    seen = home / VALIDATION
    psnr = {int(row["step"]): row["psnr"] for row in LossLog(seen / FILE).load()}
    found = ((_GRID.fullmatch(path.name), path) for path in sorted(seen.glob("step-*.png")))
    grids = {int(match[1]): path for match, path in found if match is not None}
    return StageLog(name, steps, tuple(LossLog(home / FILE).load()), psnr, grids)


def describe_row(name: str, steps: int, row: LogRow) -> str:
    """A row as a line of progress, with the time that the stage still takes."""
    left = (steps - row["step"]) / max(row["steps_per_second"], 1e-9)
    memory = f"{row['peak_gib']:.1f} GiB, " if "peak_gib" in row else ""
    return (
        f"{name} {row['step']:.0f}/{steps} loss {row['loss']:.4g} "
        f"{row['steps_per_second']:.3g} steps/s, {memory}{describe_duration(left)} left"
    )
