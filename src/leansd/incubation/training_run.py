"""A recipe run from its first stage to its last, or on from where it stopped.

from leansd.incubation.training_run import incubate
incubate("smoke", "runs/smoke")          # writes runs/smoke/net
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration
from diffusers import UNet2DConditionModel
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor, nn

from leansd.cards import Card, Training, write_card
from leansd.drawing import Request, paint
from leansd.errors import LeansdError
from leansd.evaluation.fidelity import psnr
from leansd.files import check_folder, holding, write_file, writing
from leansd.incubation.data.batches import DataSource
from leansd.incubation.data.kinds import DataContext, Note, open_source, tell_nobody
from leansd.incubation.noise import DiffusionSchedule
from leansd.incubation.recipe import TEACHER, Recipe, Stage, ValidationSettings, load_recipe
from leansd.incubation.step import StageNet, Student, make_student, open_net, save_net
from leansd.incubation.trainer import StageContext, ValidationHook, prepare_teacher, train_stage
from leansd.incubation.training_log import (
    FILE,
    GRID_ROWS,
    NET,
    VALIDATION,
    LogRow,
    LossLog,
    name_grid,
)
from leansd.incubation.training_state import read_processes, reporting
from leansd.incubation.vgg import fit_projection, load_projection, save_projection
from leansd.loading import load_with_unet

RECIPE, PROJECTION = "recipe.yaml", "projection.safetensors"
FITTED_BATCHES = 4
OnLog = Callable[[Stage, LogRow], None]


@dataclass(frozen=True)
class TrainingRun:
    """A recipe with all that it needs."""

    recipe: Recipe
    folder: Path
    pipe: Any
    """The teacher's pipeline; it is left as it was."""
    source: DataSource


def incubate(
    recipe: Recipe | str | Path,
    folder: str | Path,
    *,
    pipe: Any = None,
    resume: bool = False,
    on_log: OnLog | None = None,
    note: Note = tell_nobody,
) -> Path:
    """Distil a lighter UNet as a recipe says, and write it to `folder/net`.

    Args:
        recipe: or its file, or the name of one that comes with the package.
        folder: of the run: its recipe, and for every stage the log, checkpoints and net.
        pipe: the teacher's pipeline; by default the recipe's `model` is loaded.
        resume: go on with the run in `folder`.
        on_log: is given a stage and what is logged of it, every ten steps, in one process.
        note: is told how preparing the data goes.

    Returns:
        the folder of the finished net.

    Raises:
        LeansdError: the recipe, its data or the folder cannot be used, or training cannot go on.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    run = open_run(recipe, Path(folder), pipe=pipe, resume=resume, note=note)
    return run_stages(run, on_log=on_log)


def open_run(
    recipe: Recipe,
    folder: Path,
    *,
    pipe: Any = None,
    resume: bool = False,
    note: Note = tell_nobody,
) -> TrainingRun:
    """Load the teacher, claim the folder and prepare the data; nothing is trained yet.

    Args: see `incubate`.
    """
    check_folder(folder)
    state = read_processes()
    if pipe is None:
        pipe = load_with_unet(recipe.model, device=state.device, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
    with _hold(folder):
        if state.is_main_process:
            claim_folder(folder, recipe, resume=resume)
        state.wait_for_everyone()
        rank, world, wait = state.process_index, state.num_processes, state.wait_for_everyone
        context = DataContext(pipe, folder, rank, world, wait, note)
        return TrainingRun(recipe, folder, pipe, open_source(recipe.data, context))


def _hold(folder: Path) -> AbstractContextManager[None]:
    """Two runs in one folder would write over each other's checkpoints."""
    return holding(folder) if read_processes().is_main_process else nullcontext()


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


def make_validation(
    run: TrainingRun, stage: Stage, student: Student, teacher: UNet2DConditionModel
) -> ValidationHook | None:
    """Grids of the recipe's prompts on the way, and a log of how close the pictures are."""
    settings = run.recipe.validation
    if not settings.prompts:
        return None
    home = run.folder / stage.name / VALIDATION

    def show(step: int) -> None:
        nets = teacher, student.unet
        original, trained = (draw_prompts(run.pipe, unet, settings) for unet in nets)
        path = home / name_grid(step)
        try:
            home.mkdir(parents=True, exist_ok=True)
            make_image_grid([*original, *trained], GRID_ROWS, len(original)).save(path)
        except OSError as error:
            raise LeansdError(f"cannot write {path}: {error.strerror or error}") from error
        LossLog(home / FILE).add({"step": step, "psnr": float(psnr(trained, original).mean())})

    return ValidationHook(settings.every, show)


def draw_prompts(
    pipe: Any, unet: UNet2DConditionModel, settings: ValidationSettings
) -> list[Image.Image]:
    """The prompts' pictures by another UNet on a pipeline, each from a seed of its own."""
    before, was_training = pipe.unet, unet.training
    # Text and latents come in the pipeline's precision, which need not be the UNet's.
    dtype = pipe.vae.dtype if unet.dtype == torch.float32 else unet.dtype
    requests = [
        Request(prompt=prompt, seed=seed, steps=settings.steps, guidance=settings.guidance)
        for seed, prompt in enumerate(settings.prompts, settings.seed)
    ]
    pipe.register_modules(unet=unet.eval())
    try:
        with torch.autocast(unet.device.type, dtype, enabled=dtype != torch.float32):
            return [paint(pipe, request).image for request in requests]
    finally:
        unet.train(was_training)
        pipe.register_modules(unet=before)


def run_stages(run: TrainingRun, *, on_log: OnLog | None = None) -> Path:
    """Run all stages, each from its last checkpoint; what is done is not done again.

    Returns:
        the folder of the finished net.

    Raises:
        LeansdError: what training raises, or another run is at work there.
    """
    with _hold(run.folder):
        return _run_stages(run, on_log)


def _run_stages(run: TrainingRun, on_log: OnLog | None) -> Path:
    recipe, settings, folder = run.recipe, run.recipe.trainer, run.folder
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    # `accelerate launch` and its config decide where and how.
    accelerator = Accelerator(
        mixed_precision=settings.precision,
        gradient_accumulation_steps=settings.accumulate,
        log_with=list(settings.trackers) or None,
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / "logs")),
    )
    if settings.trackers:
        accelerator.init_trackers("leansd", {"recipe": recipe.write()})  # trackers want it flat
    schedule = DiffusionSchedule.read(run.pipe.scheduler)
    projection = find_projection(run, accelerator)
    own_device = run.pipe.unet.device
    try:
        teacher = prepare_teacher(accelerator, run.pipe.unet)
        for number, stage in enumerate(recipe.stages):
            home = folder / stage.name
            if (home / NET).exists():
                continue
            student = make_student(stage, open_nets(run, stage))
            seed = recipe.seed * 1_000 + number
            train_stage(
                accelerator,
                StageContext(stage, settings, seed, run.source, schedule, home, projection),
                student,
                teacher,
                on_log=None if on_log is None else partial(on_log, stage),
                validation=make_validation(run, stage, student, teacher),
            )
            if accelerator.is_main_process:
                keep_net(run, stage, student, home / NET)
            accelerator.wait_for_everyone()
            accelerator.free_memory()
    finally:
        nn.Module.to(run.pipe.unet, own_device)
    if accelerator.is_main_process and not (folder / NET).exists():
        with writing(folder / NET) as draft:
            shutil.copytree(folder / recipe.stages[-1].name / NET, draft)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return folder / NET


def open_nets(run: TrainingRun, stage: Stage) -> dict[str, StageNet]:
    """The nets that a stage starts from; what was trained is read as it was written."""
    nets: dict[str, StageNet] = {}
    for name in dict.fromkeys(stage.nets.values()):
        folder = Path(run.recipe.nets.get(name, run.folder / name / NET)).expanduser()
        nets[name] = StageNet(run.pipe.unet) if name == TEACHER else open_net(folder)
    return nets


def keep_net(run: TrainingRun, stage: Stage, student: Student, folder: Path) -> None:
    """Write what a stage made."""
    recipe = run.recipe
    student.unet.eval().requires_grad_(True)
    about = {"recipe": recipe.name, "fingerprint": recipe.fingerprint, "stage": stage.name}
    with reporting(f"cannot write {folder}"), writing(folder) as draft:
        save_net(student, draft, about)
        card = make_card(recipe, stage, student, run.folder)
        write_card(draft, card, student.unet, before=run.pipe.unet)


def make_card(recipe: Recipe, stage: Stage, student: Student, folder: Path) -> Card:
    """The card of what a stage of the run in `folder` made."""
    lineage = list_stages(recipe, stage)
    used = {name for each in lineage for name in each.nets.values()}
    trainings: list[Training] = []
    for each in lineage:
        nets = ", ".join(each.nets.values())
        rows = LossLog(folder / each.name / FILE).load()
        training = Training(
            stage=each.name,
            surgery=f"{each.surgery.name} of {nets}" if each.surgery.edits else f"a copy of {nets}",
            mode=each.mode,
            steps=each.steps,
            batch=recipe.trainer.batch * recipe.trainer.accumulate,
            learning_rate=each.learning_rate,
            losses={name: loss.weight for name, loss in each.losses.items()},
            last=next((row["loss"] for row in reversed(rows) if "loss" in row), None),
        )
        trainings.append(training)
    return Card(
        name=f"{recipe.name}, {stage.name}",
        nets={TEACHER: recipe.model, **{n: m for n, m in recipe.nets.items() if n in used}},
        lineage=student.lineage,
        untouched=len(student.frozen),
        trainings=trainings,
        data=f"data of the kind `{recipe.data.kind}`",
    )


def list_stages(recipe: Recipe, stage: Stage) -> list[Stage]:
    """The stages of a recipe that a stage's net has come through, itself the last."""
    wanted = {stage.name}
    for each in reversed(recipe.stages):
        if each.name in wanted:
            wanted.update(each.nets.values())
    return [each for each in recipe.stages if each.name in wanted]


def find_projection(run: TrainingRun, accelerator: Accelerator) -> Tensor | None:
    """The map from latents to RGB, where a loss wants one; fitted once for a run."""
    if not any("vgg" in stage.losses for stage in run.recipe.stages):
        return None
    if run.recipe.projection is not None:
        return load_projection(run.recipe.projection)
    path = run.folder / PROJECTION
    if not path.exists() and accelerator.is_main_process:
        with reporting(f"cannot write {path}"), writing(path) as draft:
            save_projection(fit_to_decoder(run, accelerator.device), draft)
    accelerator.wait_for_everyone()
    return load_projection(path)


@torch.no_grad()
def fit_to_decoder(run: TrainingRun, device: torch.device) -> Tensor:
    """Fit a projection to the autoencoder's decodings of the first samples."""
    with closing(run.source.open(batch=4, seed=run.recipe.seed)) as stream:
        latents = torch.cat([next(stream).latents for _ in range(FITTED_BATCHES)])
    vae = copy.deepcopy(run.pipe.vae).eval()
    nn.Module.to(vae, device, torch.float32)  # diffusers' own warns where it has nothing to warn of
    scaled = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0)
    pictures = torch.cat([vae.decode(each[None].to(device)).sample for each in scaled])
    return fit_projection(latents, pictures)
