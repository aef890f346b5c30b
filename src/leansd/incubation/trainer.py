"""The loop of one stage, on Accelerate; what a step computes is `step.py`.

All that is random comes from the seed and the numbers of steps and samples, so a position is the
whole random state: a run that was killed and resumed equals one that was not, bit for bit.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from leansd.core.devices import send
from leansd.errors import LeansdError
from leansd.incubation.data.batches import Batch, DataSource, Stream
from leansd.incubation.losses import StepOutputs
from leansd.incubation.noise import DiffusionSchedule, NoiseDraw, draw_noise
from leansd.incubation.recipe import Stage, TrainerSettings
from leansd.incubation.step import (
    Student,
    StudentUNet,
    TeacherBatch,
    TeacherUNet,
    build_losses,
    run_student,
    run_teacher,
    sum_losses,
)
from leansd.incubation.training_log import FILE, LogRow, LossLog
from leansd.incubation.training_state import (
    Checkpoints,
    Ema,
    Position,
    TeacherCache,
    build_optimizer,
    find_rate,
    list_trained,
    read_peak,
    reporting,
)

LOG_EVERY = 10
MOST_SKIPPED = 5
"""Steps in a row."""
OnLog = Callable[[LogRow], None]


@dataclass(frozen=True)
class ValidationHook:
    """What is done with the averaged student on the way."""

    every: int
    """Steps from one to the next."""
    show: Callable[[int], None]
    """Given the steps so far."""


@dataclass(frozen=True)
class StageContext:
    """What a stage is trained with besides its student."""

    stage: Stage
    settings: TrainerSettings
    seed: int
    source: DataSource
    schedule: DiffusionSchedule
    folder: Path
    projection: Tensor | None = None


@dataclass
class Sums:
    """What was logged since the last line."""

    values: dict[str, float] = field(default_factory=dict[str, float])
    count: int = 0

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.values[name] = self.values.get(name, 0.0) + value
        self.count += 1

    def take_means(self) -> dict[str, float]:
        """The means so far; counting begins anew."""
        means = {name: value / self.count for name, value in self.values.items()}
        self.values, self.count = {}, 0
        return means


def train_stage(
    accelerator: Accelerator,
    context: StageContext,
    student: Student,
    teacher: UNet2DConditionModel,
    *,
    on_log: OnLog | None = None,
    validation: ValidationHook | None = None,
) -> None:
    """Train a student to the end of its stage, from its last checkpoint if there is one.

    It is left with its averaged parameters. Whatever happens, the teacher is left as it was.

    Args:
        teacher: as `prepare_teacher` makes it.

    Raises:
        LeansdError: a loss cannot be had, nothing teaches what is to train, steps are not finite
            again and again, the data end, or a checkpoint cannot be written.
    """
    trainer = StageTrainer(accelerator, context, student, teacher)
    try:
        trainer.run(on_log, validation)
    finally:
        trainer.release()


class StageTrainer:
    """A stage under way, until `release`."""

    def __init__(
        self,
        accelerator: Accelerator,
        context: StageContext,
        student: Student,
        teacher: UNet2DConditionModel,
    ) -> None:
        self.accelerator, self.context, self.student = accelerator, context, student
        stage, settings, folder = context.stage, context.settings, context.folder
        self.unet = student.unet.train()
        if settings.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        if settings.compile:
            self.unet.compile_repeated_blocks()
        self.losses = build_losses(stage, student, context.projection, accelerator.device)
        optimizer = build_optimizer(settings, list_trained(self.unet).values(), stage.learning_rate)
        self.learner = StudentUNet(student, self.losses, stage.mode)
        self.model, self.optimizer = accelerator.prepare(self.learner, optimizer)
        self.ema = None if settings.ema is None else Ema(self.unet, settings.ema)
        self.schedule = context.schedule.to(accelerator.device)
        self.guard = NonfiniteGuard(folder / "skipped")
        self.log = LossLog(folder / FILE)
        self.checkpoints = Checkpoints(folder / "checkpoints", settings.keep)
        self.cache: TeacherCache | None = None
        if stage.cached is not None:
            rank = accelerator.process_index
            self.cache = TeacherCache(folder / "teacher", stage.cached, rank)
        self.sums = Sums()
        self.step = 0
        # At last, so that nothing goes wrong between hooking the user's UNet and `release`.
        self.teacher = TeacherUNet(teacher, self.learner.needs)

    def release(self) -> None:
        """Take the hooks off both UNets."""
        self.learner.release()
        self.teacher.release()

    def run(self, on_log: OnLog | None = None, validation: ValidationHook | None = None) -> None:
        """Train to the end."""
        with closing(self._resume()) as stream:
            self._run_steps(stream, on_log, validation)
        if self.ema is not None:
            self.ema.copy_to(self.unet)
        if self.cache is not None and self.accelerator.is_main_process:
            self.cache.clear()

    def _run_steps(
        self, stream: Stream, on_log: OnLog | None, validation: ValidationHook | None
    ) -> None:
        stage, settings = self.context.stage, self.context.settings
        logged_at, logged = time.monotonic(), self.step
        while self.step < stage.steps:
            self.sums.add(self.take_step(stream))
            self.step += 1
            is_last = self.step == stage.steps
            if self.step % LOG_EVERY == 0 or is_last:
                now = time.monotonic()
                rate = (self.step - logged) / max(now - logged_at, 1e-9)
                logged_at, logged = now, self.step
                taken = {"steps_per_second": rate} | read_peak(self.accelerator.device)
                self._log(self.sums.take_means() | taken, on_log)
            if self.step % settings.checkpoint_every == 0 or is_last:
                sums, guard = self.sums, self.guard
                position = Position(
                    self.step, stream.state(), guard.skipped, guard.row, sums.values, sums.count
                )
                self.checkpoints.save(self.accelerator, self.ema, position)
            if validation is not None and self.step % validation.every == 0:
                self._show(validation.show)

    def take_step(self, stream: Stream) -> dict[str, float]:
        """One step of the optimizer, or none where it would not be finite."""
        accelerator, settings, stage = self.accelerator, self.context.settings, self.context.stage
        rate = find_rate(stage, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        shown: list[StepOutputs] = []
        told: list[Tensor] = []
        for part in range(settings.accumulate):
            with accelerator.accumulate(self.model):
                outputs = self.show_student(self._next_taught(stream, part))
                loss, parts = sum_losses(self.losses, outputs, self.step / stage.steps)
                accelerator.backward(loss)
            told.append(torch.stack([*parts.values(), loss]).detach())
            shown.append(outputs.drop_features())
        if self.step == 0:
            self._check_gradients()
        clipped = accelerator.clip_grad_norm_(list(list_trained(self.unet).values()), settings.clip)
        assert clipped is not None
        # Read at once, when all that the device has to do is under way: one wait a step.
        *values, norm = torch.cat([*told, clipped.detach().reshape(1)]).tolist()
        names, sums = [each.name for each in self.losses] + ["loss"], Sums()
        for part, outputs in enumerate(shown):
            sums.add(dict(zip(names, values[part * len(names) :], strict=False)))
            if not math.isfinite(values[(part + 1) * len(names) - 1]):
                self.guard.dump(outputs, self.step, accelerator.process_index)
        # Gradients are summed over all processes, so all of them decide alike.
        if math.isfinite(norm):
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update(self.unet)
            self.guard.row = 0
        else:
            self.guard.dump(shown[-1], self.step, accelerator.process_index)
            self.guard.skip_step(self.step)
        self.optimizer.zero_grad()
        return sums.take_means() | {"norm": norm, "learning_rate": rate}

    def show_teacher(self, batch: Batch, draw: NoiseDraw) -> TeacherBatch:
        """A batch as the teacher sees it."""
        with self.accelerator.autocast():
            return run_teacher(self.teacher, batch, draw, self.schedule)

    def show_student(self, taught: TeacherBatch) -> StepOutputs:
        """What the student makes of it, beside the teacher's."""
        with self.accelerator.autocast():
            return run_student(self.model, taught, self.schedule)

    def _next_taught(self, stream: Stream, part: int) -> TeacherBatch:
        """The next batch of the stream, or what is kept of an earlier one."""
        device, cache = self.accelerator.device, self.cache
        if cache is not None and self.step >= cache.steps:
            return cache.load(self.step, part, device)
        batch = next(stream).to(device)
        taught = self.show_teacher(batch, self.draw(batch, part))
        if cache is not None:
            cache.keep(self.step, part, taught)
        return taught

    def draw(self, batch: Batch, part: int) -> NoiseDraw:
        """Time steps and noise, by the numbers that its samples have in the whole stage."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        count = len(batch) // batch.group
        strata = count * world * self.context.settings.accumulate
        first = self.step * strata + (part * world + rank) * count
        draw = draw_noise(
            self.context.seed,
            [number for number in range(first, first + count) for _ in range(batch.group)],
            batch.latents.shape[1:],
            strata=strata,
            timesteps=len(self.schedule),
        )
        device = self.accelerator.device
        noise = send(draw.noise, device, batch.latents.dtype)
        return NoiseDraw(send(draw.timesteps, device), noise)

    def _check_gradients(self) -> None:
        """Refuse to go on where nothing teaches a unit that is to train."""
        silent = [name for name, each in list_trained(self.unet).items() if each.grad is None]
        for at in self.student.trained:
            path = self.student.anatomy[at].path + "."
            if any(name.startswith(path) for name in silent):
                raise LeansdError(
                    f"stage {self.context.stage.name}: no loss teaches {at}; compare features "
                    "that follow it, or do not train it"
                )

    def _resume(self) -> Stream:
        context, accelerator = self.context, self.accelerator
        state: Mapping[str, Any] | None = None
        last = self.checkpoints.find_last()
        if last is not None:
            position = self.checkpoints.load(accelerator, self.ema, last)
            self.step, state = position.step, position.stream
            self.guard.skipped, self.guard.row = position.skipped, position.row
            self.sums = Sums(dict(position.sums), position.count)
        with reporting(f"cannot write into {context.folder}"):
            context.folder.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process:
            self.log.cut(self.step)
            self.checkpoints.clean()
        return context.source.open(
            batch=context.settings.batch,
            seed=context.seed,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            state=state,
        )

    def _log(self, values: dict[str, float], on_log: OnLog | None) -> None:
        row = {"step": self.step, **values, "skipped": self.guard.skipped}
        if self.accelerator.is_main_process:
            self.log.add(row)
            if on_log is not None:
                on_log(row)
        name = self.context.stage.name
        self.accelerator.log({f"{name}/{key}": value for key, value in values.items()}, self.step)

    def _show(self, show: Callable[[int], None]) -> None:
        """Let the averaged student be looked at."""
        if not self.accelerator.is_main_process:
            return
        self.learner.rest()
        if self.ema is None:
            show(self.step)
            return
        with self.ema.applied(self.unet):
            show(self.step)


@dataclass
class NonfiniteGuard:
    """Counts the steps whose loss or gradient is no finite number, and stops a run of such."""

    folder: Path
    """Where their batches are kept."""
    most: int = MOST_SKIPPED
    skipped: int = 0
    """In all."""
    row: int = 0
    """Since the last good step."""

    def skip_step(self, step: int) -> None:
        """Count a step that was not.

        Raises:
            LeansdError: too many in a row were not.
        """
        self.skipped += 1
        self.row += 1
        if self.row >= self.most:
            raise LeansdError(
                f"{self.row} steps in a row, up to {step}, gave no finite loss or gradient; their "
                f"batches lie in {self.folder}. Lower the learning rate, or train in bf16"
            )

    def dump(self, outputs: StepOutputs, step: int, rank: int) -> None:
        """Write the batch that a step failed on."""
        path = self.folder / f"step-{step:08d}-rank-{rank}.safetensors"
        tensors = {
            name: getattr(outputs, name).detach().cpu().contiguous()
            for name in ("timesteps", "noised", "student", "teacher")
        }
        for name in ("latents", "text"):
            tensors[name] = getattr(outputs.batch, name).detach().cpu().contiguous()
        with reporting(f"cannot keep the batch of a skipped step in {self.folder}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, path, {"keys": "\n".join(outputs.batch.keys)})


def prepare_teacher(
    accelerator: Accelerator, original: UNet2DConditionModel
) -> UNet2DConditionModel:
    """The original if it is on the device, in a frozen net's precision; else a copy that is.

    Students are made of the original itself, whose weights no precision has rounded.
    """
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    # `to` is that of `nn.Module`: diffusers' own warns where it has nothing to warn of.
    nn.Module.to(original, "cpu")
    if accelerator.device.type == "cpu" and original.dtype == dtype:
        return original
    teacher = copy.deepcopy(original)
    nn.Module.to(teacher, accelerator.device, dtype)
    return teacher
