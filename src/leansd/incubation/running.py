"""A recipe run from its first stage to its last, or on from where it stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers import UNet2DConditionModel
from torch import Tensor

from leansd.cards import write_card
from leansd.errors import LeansdError
from leansd.files import write_file
from leansd.incubation.batches import Source
from leansd.incubation.cards import make_card
from leansd.incubation.checkpoints import writing
from leansd.incubation.noise import Schedule
from leansd.incubation.recipe import TEACHER, Recipe, Stage
from leansd.incubation.students import Net, Student, make_student, open_net, save_net
from leansd.incubation.trainer import Lesson, Look, prepare_teacher, train_stage
from leansd.incubation.vgg import fit_projection, load_projection, save_projection

NET, RECIPE, PROJECTION = "net", "recipe.yaml", "projection.safetensors"
FITTED_BATCHES = 4
Report = Callable[[str, Mapping[str, float]], None]


@dataclass(frozen=True)
class Run:
    """A recipe with all that it needs."""

    recipe: Recipe
    folder: Path
    pipe: Any
    """The teacher's pipeline."""
    source: Source

    def get_home(self, stage: Stage) -> Path:
        """The folder of a stage."""
        return self.folder / stage.name


def incubate(
    run: Run,
    *,
    report: Report | None = None,
    make_look: Callable[[Stage, Student, UNet2DConditionModel], Look] | None = None,
) -> Path:
    """Run all stages, each from its last checkpoint; what is done is not done again.

    Returns:
        the folder of the finished net.

    Raises:
        LeansdError: what training raises.
    """
    recipe = run.recipe
    accelerator = make_accelerator(recipe, run.folder)
    if recipe.trainer.trackers:
        accelerator.init_trackers("leansd", {"recipe": recipe.write()})  # trackers want it flat
    schedule = Schedule.read(run.pipe.scheduler)
    projection = find_projection(run, accelerator)
    teacher = prepare_teacher(accelerator, run.pipe.unet)
    for number, stage in enumerate(recipe.stages):
        home = run.get_home(stage)
        if not (home / NET).exists():
            student = make_student(stage, open_nets(run, stage))
            lesson = Lesson(
                stage,
                recipe.trainer,
                recipe.seed * 1_000 + number,
                run.source,
                schedule,
                home,
                projection,
            )
            train_stage(
                accelerator,
                lesson,
                student,
                teacher,
                report=None if report is None else _name_reports(report, stage.name),
                look=None if make_look is None else make_look(stage, student, teacher),
            )
            if accelerator.is_main_process:
                keep_net(run, stage, student, home / NET)
            accelerator.wait_for_everyone()
            accelerator.free_memory()
    if accelerator.is_main_process and not (run.folder / NET).exists():
        last = run.get_home(recipe.stages[-1]) / NET
        with writing(run.folder / NET) as partial:
            shutil.copytree(last, partial, dirs_exist_ok=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return run.folder / NET


def make_accelerator(recipe: Recipe, folder: Path) -> Accelerator:
    """What runs the loop: `accelerate launch` and its config decide where and how."""
    settings = recipe.trainer
    return Accelerator(
        mixed_precision=settings.precision,
        gradient_accumulation_steps=settings.accumulate,
        log_with=list(settings.trackers) or None,
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / "logs")),
    )


def claim_folder(folder: Path, recipe: Recipe, *, resume: bool) -> None:
    """Make a run's folder, or see that it is this recipe's.

    Raises:
        LeansdError: it holds another run, or this one and is not to be resumed.
    """
    file = folder / RECIPE
    mark = f"# {recipe.fingerprint}\n"
    if file.exists():
        if not resume:
            raise LeansdError(f"{folder} holds a run: go on with it by --resume")
        if not file.read_text(encoding="utf-8").startswith(mark):
            raise LeansdError(
                f"{folder} holds a run of another recipe: see {file}, or choose another folder"
            )
        return
    if folder.exists() and any(not each.name.startswith(".") for each in folder.iterdir()):
        raise LeansdError(f"{folder} is not empty and holds no run: choose another folder")
    write_file(file, mark + recipe.write())


def open_nets(run: Run, stage: Stage) -> dict[str, Net]:
    """The nets that a stage starts from; what was trained is read as it was written."""
    nets: dict[str, Net] = {}
    for name in dict.fromkeys(stage.nets.values()):
        if name == TEACHER:
            nets[name] = Net(run.pipe.unet)
            continue
        folder = Path(run.recipe.nets.get(name, run.folder / name / NET)).expanduser()
        nets[name] = open_net(folder)
    return nets


def keep_net(run: Run, stage: Stage, student: Student, folder: Path) -> None:
    """Write what a stage made."""
    recipe = run.recipe
    student.unet.eval().requires_grad_(True)
    about = {"recipe": recipe.name, "fingerprint": recipe.fingerprint, "stage": stage.name}
    with writing(folder) as partial:
        save_net(student, partial, about)
        card = make_card(recipe, stage, student, run.folder)
        write_card(partial, card, student.unet, before=run.pipe.unet)


def find_projection(run: Run, accelerator: Accelerator) -> Tensor | None:
    """The map from latents to RGB, where a loss wants one; fitted once for a run."""
    losses = {name for stage in run.recipe.stages for name in stage.losses}
    if "vgg" not in losses:
        return None
    if run.recipe.projection is not None:
        return load_projection(run.recipe.projection)
    path = run.folder / PROJECTION
    if not path.exists() and accelerator.is_main_process:
        partial = path.with_name(path.name + ".partial")
        save_projection(fit_to_decoder(run, accelerator.device), partial)
        partial.replace(path)
    accelerator.wait_for_everyone()
    return load_projection(path)


@torch.no_grad()
def fit_to_decoder(run: Run, device: torch.device) -> Tensor:
    """Fit a projection to the autoencoder's decodings of the first samples."""
    stream = run.source.open(batch=4, seed=run.recipe.seed)
    vae = run.pipe.vae.to(device, torch.float32).eval()
    config = vae.config
    shift = getattr(config, "shift_factor", None) or 0.0
    latents = torch.cat([next(stream).latents for _ in range(FITTED_BATCHES)])
    scaled = latents / config.scaling_factor + shift
    pictures = torch.cat([vae.decode(each[None].to(device)).sample for each in scaled])
    return fit_projection(latents, pictures)


def _name_reports(report: Report, name: str) -> Callable[[Mapping[str, float]], None]:
    return lambda row: report(name, row)
