"""Recipes from the command line to runs and estimates."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import UNet2DConditionModel

from leansd.anatomy import count_macs
from leansd.anatomy.cost import copy_skeleton
from leansd.evaluation.records import stamp
from leansd.incubation.estimate import Estimate, estimate, measure_rate
from leansd.incubation.recipe import Recipe, Stage
from leansd.incubation.running import Run, claim_folder, incubate
from leansd.incubation.sources import DataSetting, open_source
from leansd.incubation.students import Student
from leansd.incubation.trainer import Look
from leansd.incubation.training_log import FILE, VALIDATION, LossLog, describe_row, read_run
from leansd.incubation.validation import Validation
from leansd.loading import load
from leansd.report import Origin, write_report
from leansd.report.training import report_training
from leansd.unets import open_outline

Note = Callable[[str], None]
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
    origin: Origin
    due: float
    """When it is to be written next, by `time.monotonic`."""

    def follow(self, *, is_milestone: bool) -> None:
        """Write it if it is due, or something is over."""
        if is_milestone or time.monotonic() >= self.due:
            self.write(ended=False)

    def write(self, *, ended: bool) -> None:
        """Write it now."""
        begin = time.monotonic()
        log = read_run(self.recipe, self.folder, ended=ended)
        write_report(self.folder / PAGE, report_training(log, self.recipe.write()), self.origin)
        end = time.monotonic()
        self.due = end + max(LEAST, SHARE * (end - begin))


def incubate_into(
    folder: Path, recipe: Recipe, *, resume: bool, note: Note, command: str = "leansd incubate"
) -> Path:
    """Run a recipe, say on the way how it goes, and keep the page of the run.

    Args:
        command: what the page says runs it again.
    """
    state = PartialState()
    pipe = load(recipe.model, device=state.device, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    setting = DataSetting(
        pipe,
        folder,
        state.device,
        state.process_index,
        state.num_processes,
        state.wait_for_everyone,
        note,
    )
    if state.is_main_process:
        claim_folder(folder, recipe, resume=resume)
    state.wait_for_everyone()
    run = Run(recipe, folder, pipe, open_source(recipe.data, setting))
    steps = {stage.name: stage.steps for stage in recipe.stages}
    origin = Origin(command, stamp(state.device))
    page = LivePage(recipe, folder, origin, due=time.monotonic() + LEAST / 3)

    def report(stage: str, row: Mapping[str, float]) -> None:
        note(describe_row(stage, steps[stage], row))
        is_last = row["step"] == steps[stage]
        page.follow(is_milestone=is_last and stage != recipe.stages[-1].name)

    def make_look(stage: Stage, student: Student, teacher: UNet2DConditionModel) -> Look:
        seen = Validation(pipe, teacher, student.unet, recipe.validation)
        home = run.get_home(stage) / VALIDATION

        def show(step: int) -> None:
            close = seen.draw_grid(home / f"step-{step:08d}.png")
            LossLog(home / FILE).add({"step": step, "psnr": close})

        return Look(recipe.validation.every, show)

    look = make_look if recipe.validation.prompts else None
    try:
        return incubate(run, report=report, make_look=look)
    finally:
        if state.is_main_process:
            page.write(ended=True)


def estimate_recipe(recipe: Recipe) -> Estimate:
    """What a recipe takes on this machine."""
    state = PartialState()
    outline = open_outline(recipe.model)
    macs = count_macs(outline).total
    rate = measure_rate(fill_outline(outline, state.device), macs, recipe.trainer.batch)
    return estimate(
        recipe, outline, macs_per_second=rate, device=str(state.device), world=state.num_processes
    )


@torch.no_grad()
def fill_outline(outline: UNet2DConditionModel, device: torch.device) -> UNet2DConditionModel:
    """A UNet of this shape with random weights: it takes as long as any."""
    unet: UNet2DConditionModel = copy_skeleton(outline).to_empty(device=device).eval()
    for parameter in unet.parameters():
        parameter.normal_(std=0.02)
    return unet.half() if device.type == "cuda" else unet
