"""The loop of one stage, on Accelerate.

All that is random comes from the seed and the numbers of steps and samples, so a position is the
whole random state: a run that was killed and resumed equals one that was not, bit for bit.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from leansd.anatomy import read_anatomy
from leansd.errors import LeansdError
from leansd.incubation.averages import Average
from leansd.incubation.batches import Batch, Source, Stream
from leansd.incubation.checkpoints import Checkpoints, Position
from leansd.incubation.guards import Guard, is_finite
from leansd.incubation.learning import Example, Learner, Teacher, learn, teach
from leansd.incubation.losses import Comparison, Loss, Outcome, Setting, build_loss
from leansd.incubation.noise import Draw, Schedule, draw_noise
from leansd.incubation.optimizers import build_optimizer
from leansd.incubation.ramps import RAMPS, warm_up
from leansd.incubation.recipe import LossSettings, Stage, TrainerSettings
from leansd.incubation.students import Student
from leansd.incubation.teacher_cache import TeacherCache
from leansd.incubation.training_log import FILE, LossLog

LOG_EVERY = 10
Report = Callable[[Mapping[str, float]], None]


@dataclass(frozen=True)
class Look:
    """What is done with the averaged student on the way: validation."""

    every: int
    """Steps from one to the next."""
    show: Callable[[int], None]
    """Given the steps so far."""


@dataclass(frozen=True)
class Term:
    """A loss with its weight over the stage."""

    name: str
    loss: Loss
    settings: LossSettings

    def weigh(self, progress: float) -> float:
        """What it counts at this share of the stage."""
        return self.settings.weight * RAMPS[self.settings.schedule](progress)


@dataclass(frozen=True)
class Lesson:
    """What a stage is trained with besides its student."""

    stage: Stage
    settings: TrainerSettings
    seed: int
    source: Source
    schedule: Schedule
    folder: Path
    projection: Tensor | None = None


@dataclass
class Sums:
    """What was logged since the last line."""

    values: dict[str, float] = field(default_factory=dict)
    count: int = 0

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.values[name] = self.values.get(name, 0.0) + value
        self.count += 1

    def take(self) -> dict[str, float]:
        """Their means; then from nothing again."""
        means = {name: value / self.count for name, value in self.values.items()}
        self.values, self.count = {}, 0
        return means


def train_stage(
    accelerator: Accelerator,
    lesson: Lesson,
    student: Student,
    teacher: UNet2DConditionModel,
    *,
    report: Report | None = None,
    look: Look | None = None,
) -> None:
    """Train a student to the end of its stage, from its last checkpoint if there is one.

    It is left with its averaged parameters.

    Args:
        teacher: as `prepare_teacher` makes it.

    Raises:
        LeansdError: a loss cannot be had, nothing teaches what is to train, steps are not finite
            again and again, the data end, or a checkpoint cannot be written.
    """
    Training(accelerator, lesson, student, teacher).run(report, look)


class Training:
    """A stage under way."""

    def __init__(
        self,
        accelerator: Accelerator,
        lesson: Lesson,
        student: Student,
        teacher: UNet2DConditionModel,
    ) -> None:
        self.accelerator, self.lesson, self.student = accelerator, lesson, student
        stage, settings = lesson.stage, lesson.settings
        self.terms = build_terms(stage, student, lesson.projection, accelerator.device)
        compares = list_comparisons(self.terms)
        student.unet.train()
        if settings.gradient_checkpointing:
            student.unet.enable_gradient_checkpointing()
        if settings.compile:
            student.unet.compile_repeated_blocks()
        self.learner = Learner(student, compares, stage.mode)
        self.teacher = Teacher(
            teacher,
            (*(each.teacher for each in compares), *self.learner.needs),
        )
        optimizer = build_optimizer(settings, list_trained(student.unet), stage.learning_rate)
        self.model, self.optimizer = accelerator.prepare(self.learner, optimizer)
        self.average = None if settings.ema is None else Average(student.unet, settings.ema)
        self.schedule = lesson.schedule.to(accelerator.device)
        self.guard = Guard(lesson.folder / "skipped")
        self.curves = LossLog(lesson.folder / FILE)
        self.checkpoints = Checkpoints(lesson.folder / "checkpoints", settings.keep)
        self.cache = (
            None
            if stage.cached is None
            else TeacherCache(lesson.folder / "teacher", stage.cached, accelerator.process_index)
        )
        self.sums = Sums()
        self.step = 0

    def run(self, report: Report | None = None, look: Look | None = None) -> None:
        """Train to the end."""
        stream = self._resume()
        sums, stage = self.sums, self.lesson.stage
        tick, ticked = time.monotonic(), self.step
        while self.step < stage.steps:
            sums.add(self._take_step(stream))
            self.step += 1
            is_last = self.step == stage.steps
            if self.step % LOG_EVERY == 0 or is_last:
                now = time.monotonic()
                rate = (self.step - ticked) / max(now - tick, 1e-9)
                tick, ticked = now, self.step
                taken = {"steps_per_second": rate} | read_peak(self.accelerator.device)
                self._log(sums.take() | taken, report)
            if self.step % self.lesson.settings.checkpoint_every == 0 or is_last:
                self._save(stream)
            if look is not None and self.step % look.every == 0:
                self._show(look.show)
        if self.average is not None:
            self.average.settle(self.student.unet)
        if self.cache is not None and self.accelerator.is_main_process:
            self.cache.clear()
        self.release()

    def release(self) -> None:
        """Leave both UNets unwoven."""
        self.learner.release()
        self.teacher.release()

    def compare(self, example: Example) -> Outcome:
        """What the student makes of an example, beside the teacher's."""
        with self.accelerator.autocast():
            return learn(self.model, example, self.schedule)

    def show(self, batch: Batch, draw: Draw) -> Example:
        """A batch as the teacher sees it."""
        with self.accelerator.autocast():
            return teach(self.teacher, batch, draw, self.schedule)

    def _take_example(self, stream: Stream, part: int) -> Example:
        """The next batch of the stream, or what is kept of an earlier one."""
        device, cache = self.accelerator.device, self.cache
        if cache is not None and self.step >= cache.steps:
            return cache.load(self.step, part, device)
        batch = next(stream).to(device)
        example = self.show(batch, self._draw(batch, part))
        if cache is not None:
            cache.keep(self.step, part, example)
        return example

    def weigh(self, outcome: Outcome) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its parts before they are weighed: float32 scalars, outside autocast."""
        progress = self.step / self.lesson.stage.steps
        parts = {term.name: term.loss(outcome) for term in self.terms}
        weights = {term.name: term.weigh(progress) for term in self.terms}
        return torch.stack([weights[name] * part for name, part in parts.items()]).sum(), parts

    def _take_step(self, stream: Stream) -> dict[str, float]:
        settings, stage = self.lesson.settings, self.lesson.stage
        factor = warm_up(self.step, stage.warmup) * RAMPS[stage.decay](self.step / stage.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = stage.learning_rate * factor
        sums = Sums()
        outcome: Outcome | None = None
        for part in range(settings.accumulate):
            with self.accelerator.accumulate(self.model):
                outcome = self.compare(self._take_example(stream, part))
                loss, parts = self.weigh(outcome)
                if not is_finite(loss):
                    self.guard.dump(outcome, self.step, self.accelerator.process_index)
                self.accelerator.backward(loss)
            sums.add({name: float(value.detach()) for name, value in parts.items()})
            sums.values["loss"] = sums.values.get("loss", 0.0) + float(loss.detach())
        if self.step == 0:
            self._check_gradients()
        norm = self.accelerator.clip_grad_norm_(list_trained(self.student.unet), settings.clip)
        assert norm is not None
        # Gradients are summed over all processes, so all of them decide alike.
        if is_finite(torch.as_tensor(norm)):
            self.optimizer.step()
            if self.average is not None:
                self.average.update(self.student.unet)
            self.guard.pass_step()
        else:
            assert outcome is not None
            self.guard.dump(outcome, self.step, self.accelerator.process_index)
            self.guard.skip_step(self.step)
        self.optimizer.zero_grad()
        return sums.take() | {"norm": float(norm), "learning_rate": stage.learning_rate * factor}

    def _draw(self, batch: Batch, part: int) -> Draw:
        """Time steps and noise, by the numbers that its samples have in the whole stage."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        count = len(batch) // batch.group
        strata = count * world * self.lesson.settings.accumulate
        first = self.step * strata + (part * world + rank) * count
        draw = draw_noise(
            self.lesson.seed,
            [number for number in range(first, first + count) for _ in range(batch.group)],
            batch.latents.shape[1:],
            strata=strata,
            timesteps=len(self.schedule),
        )
        device = self.accelerator.device
        return Draw(draw.timesteps.to(device), draw.noise.to(device, batch.latents.dtype))

    def _check_gradients(self) -> None:
        """Refuse to go on where nothing teaches a unit that is to train."""
        unet = self.student.unet
        silent = {n for n, p in unet.named_parameters() if p.requires_grad and p.grad is None}
        anatomy = read_anatomy(unet)
        for at in self.student.trained:
            path = anatomy[at].path + "."
            if any(name.startswith(path) for name in silent):
                raise LeansdError(
                    f"stage {self.lesson.stage.name}: no loss teaches {at}; compare features "
                    "that follow it, or do not train it"
                )

    def _resume(self) -> Stream:
        state: Mapping[str, Any] | None = None
        last = self.checkpoints.find_last()
        if last is not None:
            position = self.checkpoints.load(self.accelerator, self.average, last)
            self.step, state = position.step, position.stream
            self.guard.skipped, self.guard.row = position.skipped, position.row
            self.sums = Sums(dict(position.sums), position.count)
        self.lesson.folder.mkdir(parents=True, exist_ok=True)
        if self.accelerator.is_main_process:
            self.curves.cut(self.step)
            self.checkpoints.clean()
        return self.lesson.source.open(
            batch=self.lesson.settings.batch,
            seed=self.lesson.seed,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            state=state,
        )

    def _save(self, stream: Stream) -> None:
        position = Position(
            self.step,
            stream.state(),
            self.guard.skipped,
            self.guard.row,
            self.sums.values,
            self.sums.count,
        )
        self.checkpoints.save(self.accelerator, self.average, position)

    def _log(self, values: dict[str, float], report: Report | None) -> None:
        row = {"step": self.step, **values, "skipped": self.guard.skipped}
        if self.accelerator.is_main_process:
            self.curves.add(row)
            if report is not None:
                report(row)
        name = self.lesson.stage.name
        self.accelerator.log({f"{name}/{key}": value for key, value in values.items()}, self.step)

    def _show(self, show: Callable[[int], None]) -> None:
        """Let the averaged student be looked at."""
        if not self.accelerator.is_main_process:
            return
        unet = self.student.unet
        self.learner.rest()
        if self.average is None:
            show(self.step)
            return
        with self.average.applied(unet):
            show(self.step)


def read_peak(device: torch.device) -> dict[str, float]:
    """The most that tensors took on a GPU since this was last asked, in GiB; nothing elsewhere."""
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {"peak_gib": peak / 2**30}


def build_terms(
    stage: Stage, student: Student, projection: Tensor | None, device: torch.device
) -> tuple[Term, ...]:
    """The losses of a stage; what weighs nothing is left out."""
    comparisons = student.list_comparisons(stage.mode)
    setting = Setting(student.lineage, comparisons, projection, device)
    return tuple(
        Term(name, build_loss(name, settings.options, setting), settings)
        for name, settings in stage.losses.items()
        if settings.weight
    )


def list_comparisons(terms: tuple[Term, ...]) -> tuple[Comparison, ...]:
    """All that some term compares, once."""
    return tuple(dict.fromkeys(each for term in terms for each in term.loss.compares))


def list_trained(net: nn.Module) -> list[nn.Parameter]:
    """The parameters that train."""
    return [each for each in net.parameters() if each.requires_grad]


def prepare_teacher(
    accelerator: Accelerator, original: UNet2DConditionModel
) -> UNet2DConditionModel:
    """The original on the device; a copy in the precision of frozen nets, where that is another.

    Students are made of the original itself, whose weights no precision has rounded.
    """
    # `to` is that of `nn.Module`: diffusers' own warns where it has nothing to warn of.
    if accelerator.mixed_precision != "bf16":
        nn.Module.to(original, accelerator.device)
        return original
    nn.Module.to(original, "cpu")
    teacher = copy.deepcopy(original)
    nn.Module.to(teacher, accelerator.device, torch.bfloat16)
    return teacher
