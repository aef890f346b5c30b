"""What the card of an incubated net says of its training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from leansd.cards import Card, Training
from leansd.incubation.recipe import TEACHER, Recipe, Stage
from leansd.incubation.students import Student
from leansd.incubation.training_log import FILE, LossLog


def make_card(recipe: Recipe, stage: Stage, student: Student, folder: Path) -> Card:
    """The card of what a stage of the run in `folder` made."""
    trainings = [
        Training(
            stage=each.name,
            surgery=_describe_student(each),
            mode=each.mode,
            steps=each.steps,
            batch=recipe.trainer.batch * recipe.trainer.accumulate,
            learning_rate=each.learning_rate,
            losses={name: loss.weight for name, loss in each.losses.items()},
            last=_read_last(folder / each.name / FILE),
        )
        for each in list_stages(recipe, stage)
    ]
    return Card(
        name=f"{recipe.name}, {stage.name}",
        nets={TEACHER: recipe.model, **_list_others(recipe, stage)},
        lineage=student.lineage,
        untouched=len(student.frozen),
        trainings=trainings,
        data=f"data of the kind `{recipe.data.kind}`",
    )


def list_stages(recipe: Recipe, stage: Stage) -> list[Stage]:
    """The stages of a recipe that a stage's net has come through, itself the last."""
    stages = {each.name: each for each in recipe.stages}
    wanted = {stage.name}
    for each in reversed(recipe.stages):
        if each.name in wanted:
            wanted.update(name for name in each.nets.values() if name in stages)
    return [each for each in recipe.stages if each.name in wanted]


def _list_others(recipe: Recipe, stage: Stage) -> dict[str, str]:
    """Nets of earlier runs that a stage's net has come from."""
    used = {name for each in list_stages(recipe, stage) for name in each.nets.values()}
    return {name: model for name, model in recipe.nets.items() if name in used}


def _describe_student(stage: Stage) -> str:
    nets = ", ".join(stage.nets.values())
    return f"{stage.surgery.name} of {nets}" if stage.surgery.edits else f"a copy of {nets}"


def _read_last(path: Path) -> float | None:
    rows: Iterator[dict[str, float]] = reversed(LossLog(path).load())
    return next((row["loss"] for row in rows if "loss" in row), None)
