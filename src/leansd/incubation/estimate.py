"""What a recipe takes, before anything is trained: counted on the meta device.

One step of every stage is run there, forward and backward: products are counted as they come, and
what autograd keeps is what the step needs in memory. Nothing is estimated but the time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from leansd.anatomy import count_macs
from leansd.anatomy.counting import copy_skeleton
from leansd.anatomy.inputs import make_inputs, pick_size
from leansd.incubation.data.batches import PAIR, Batch
from leansd.incubation.noise import DiffusionSchedule, NoiseDraw
from leansd.incubation.recipe import TEACHER, Recipe, Stage
from leansd.incubation.step import (
    StudentUNet,
    TeacherUNet,
    build_losses,
    call_unet,
    list_comparisons,
    run_student,
    run_teacher,
)
from leansd.incubation.students import StageNet, Student, make_student, outline_net
from leansd.incubation.training_state import pack_batch
from leansd.text import describe_duration
from leansd.unets import open_outline

GIB = 2**30
BYTES = {"no": 4, "bf16": 2}
"""Of a number of a frozen net."""
FULL = 4
"""Bytes of a float32: what trains is kept in it, whatever the precision."""
MOMENTS = {"adamw": 2 * FULL, "adamw8bit": 2}
"""Bytes of an optimizer's state for each parameter."""


@dataclass(frozen=True)
class StageCost:
    """What one stage takes."""

    name: str
    mode: str
    steps: int
    samples: int
    parameters: int
    trained: int
    """Of the parameters."""
    teacher_macs: int
    """Of one sample's forward; so is the next."""
    student_macs: int
    backward_macs: int
    """Of one sample's way back."""
    weights: int
    """Bytes of teacher and student, gradients, optimizer and averages."""
    activations: int
    """Bytes that are kept for one sample's way back."""
    disk: int
    """Bytes of checkpoints, nets and the teacher's tensors where they are kept."""
    taught: int
    """Samples that the teacher sees: fewer than all, where what it made of them is kept."""

    @property
    def macs(self) -> int:
        """Of one sample that both see."""
        return self.teacher_macs + self.student_macs + self.backward_macs

    @property
    def all_macs(self) -> int:
        """Of the whole stage."""
        own = self.student_macs + self.backward_macs
        return self.taught * self.teacher_macs + self.samples * own


@dataclass(frozen=True)
class Estimate:
    """What a recipe takes."""

    recipe: str
    batch: int
    """Samples of one process in one go."""
    stages: tuple[StageCost, ...]
    macs_per_second: float
    device: str

    def hours(self, cost: StageCost) -> float:
        """At the rate of the teacher's forward, measured here."""
        return cost.all_macs / self.macs_per_second / 3600

    def memory(self, cost: StageCost) -> int:
        """Bytes of one process at the recipe's batch."""
        return cost.weights + self.batch * cost.activations

    def to_fields(self) -> dict[str, Any]:
        """Plain JSON values."""
        stages = [
            {**asdict(each), "memory": self.memory(each), "hours": self.hours(each)}
            for each in self.stages
        ]
        rate = {"macs_per_second": self.macs_per_second, "device": self.device}
        return {"recipe": self.recipe, "batch": self.batch, "stages": stages, **rate}

    def __str__(self) -> str:
        lines = [f"{self.recipe}: batches of {self.batch}"]
        for each in self.stages:
            macs = (each.teacher_macs, each.student_macs, each.backward_macs)
            parts = " + ".join(f"{part / 1e9:.3g}" for part in macs)
            trained, whole = each.trained / 1e6, each.parameters / 1e6
            weights, activations = each.weights / GIB, each.activations / GIB
            lines += [
                f"{each.name} ({each.mode}): {each.steps} steps, {each.samples} samples",
                f"  trains  {trained:.3g} of {whole:.3g} M parameters",
                f"  MACs    {each.macs / 1e9:.3g} G a sample: teacher + student + back {parts}",
                f"  memory  {self.memory(each) / GIB:.3g} GiB: {weights:.3g} for weights and "
                f"optimizer, {activations:.3g} a sample",
                f"  disk    {each.disk / GIB:.3g} GiB",
                f"  time    {describe_duration(3600 * self.hours(each))}",
            ]
        lines.append(
            f"time: one {self.device} at {self.macs_per_second / 1e9:.3g} G MACs a second, as "
            "measured on the teacher's forward"
        )
        return "\n".join(lines)


def estimate(
    recipe: Recipe,
    teacher: UNet2DConditionModel,
    *,
    macs_per_second: float,
    device: str,
    world: int = 1,
) -> Estimate:
    """Count every stage of a recipe.

    Args:
        teacher: only its shape is asked for; it may be on the meta device.
        macs_per_second: of this machine; see `measure_rate`.
    """
    skeleton = copy_skeleton(teacher)
    nets: dict[str, StageNet] = {TEACHER: StageNet(skeleton)}
    nets |= {name: outline_net(Path(folder)) for name, folder in recipe.nets.items()}
    costs: list[StageCost] = []
    for stage in recipe.stages:
        student = make_student(stage, nets)
        costs.append(count_stage(recipe, stage, student, skeleton, world))
        nets[stage.name] = StageNet(student.unet, student.lineage, student.frozen)
    return Estimate(recipe.name, recipe.trainer.batch, tuple(costs), macs_per_second, device)


def count_stage(
    recipe: Recipe,
    stage: Stage,
    student: Student,
    teacher: UNet2DConditionModel,
    world: int,
) -> StageCost:
    """Run one step of one sample, or of a pair, on the meta device."""
    settings = recipe.trainer
    samples = PAIR if recipe.data.paired else 1
    count = count_step(stage, student, teacher, samples, settings.gradient_checkpointing)
    parameters = sum(each.numel() for each in student.unet.parameters())
    trained = sum(each.numel() for each in student.unet.parameters() if each.requires_grad)
    of_teacher = sum(each.numel() for each in teacher.parameters())
    average = FULL if settings.ema is not None else 0
    kept = MOMENTS[settings.optimizer] + average
    checkpoint = parameters * FULL + trained * kept
    a_step = settings.batch * settings.accumulate * world
    cached = 0 if stage.cached is None else min(stage.cached, stage.steps)
    return StageCost(
        name=stage.name,
        mode=stage.mode,
        steps=stage.steps,
        samples=stage.steps * a_step,
        parameters=parameters,
        trained=trained,
        teacher_macs=count.teacher,
        student_macs=count.student,
        backward_macs=count.backward,
        weights=of_teacher * BYTES[settings.precision]
        + parameters * FULL
        + trained * (FULL + kept),
        activations=count.kept,
        disk=checkpoint * settings.keep + parameters * FULL + cached * a_step * count.example,
        taught=(cached or stage.steps) * a_step,
    )


@dataclass
class StepCount:
    """Multiply-accumulates of one sample's step, and the bytes that autograd kept for it."""

    teacher: int = 0
    student: int = 0
    backward: int = 0
    kept: int = 0
    example: int = 0
    """Bytes of one sample with what the teacher makes of it."""
    seen: set[int] = field(default_factory=set)


def count_step(
    stage: Stage,
    student: Student,
    teacher: UNet2DConditionModel,
    samples: int = 1,
    gradient_checkpointing: bool = False,
) -> StepCount:
    """What a step takes of a student and teacher on the meta device, for each of its samples."""
    unet = student.unet.train()
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    config: Any = unet.config
    projection = torch.empty(config.in_channels + 1, 3, device="meta")
    losses = build_losses(stage, student, projection, "meta")
    compares = list_comparisons(losses)
    learner = StudentUNet(student, compares, stage.mode)
    tutor = TeacherUNet(teacher, (*(each.teacher for each in compares), *learner.needs))
    batch, draw = _make_samples(teacher, samples)
    schedule = DiffusionSchedule(torch.empty(1000, device="meta"), "epsilon")
    count = StepCount()
    try:
        with counting() as counter:
            taught = run_teacher(tutor, batch, draw, schedule)
        count.teacher = counter() // samples
        count.example = sum(tensor.nbytes for tensor in pack_batch(taught).values()) // samples
        with counting() as counter, keeping(count, unet):
            outputs = run_student(learner, taught, schedule)
            loss = torch.stack([each.loss(outputs) for each in losses]).sum()
        count.student = counter() // samples
        count.kept //= samples
        with counting() as counter:
            loss.backward()
        count.backward = counter() // samples
    finally:
        unet.zero_grad()
        unet.disable_gradient_checkpointing()
        learner.release()
        tutor.release()
    return count


@contextmanager
def counting() -> Iterator[Any]:
    """A function that says the multiply-accumulates of what ran within."""
    with FlopCounterMode(display=False) as counter:
        yield lambda: counter.get_total_flops() // 2


@contextmanager
def keeping(count: StepCount, unet: UNet2DConditionModel) -> Iterator[None]:
    """Add up what autograd keeps within, parameters apart."""
    alive: list[Tensor] = []
    own = {id(each) for each in unet.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in own and id(base) not in count.seen:
            count.seen.add(id(base))
            alive.append(base)  # its id is its own as long as it lives
            count.kept += base.numel() * base.element_size()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def _make_samples(unet: UNet2DConditionModel, count: int) -> tuple[Batch, NoiseDraw]:
    inputs = make_inputs(unet, size=pick_size(unet, None), batch=count, device="meta")
    added: Mapping[str, Tensor] = inputs.get("added_cond_kwargs", {})
    batch = Batch(inputs["sample"], inputs["encoder_hidden_states"], added)
    timesteps = torch.zeros(count, dtype=torch.long, device="meta")
    return batch, NoiseDraw(timesteps, torch.empty_like(inputs["sample"]))


def estimate_recipe(recipe: Recipe) -> Estimate:
    """What a recipe takes on this machine.

    Raises:
        LeansdError: its model cannot be found.
    """
    state = PartialState()
    device = torch.device(state.device or "cpu")
    outline = open_outline(recipe.model)
    macs = count_macs(outline).total
    rate = measure_rate(fill_outline(outline, device), macs, recipe.trainer.batch)
    return estimate(
        recipe, outline, macs_per_second=rate, device=str(device), world=state.num_processes
    )


@torch.no_grad()
def fill_outline(outline: UNet2DConditionModel, device: torch.device) -> UNet2DConditionModel:
    """A UNet of this shape with random weights: it takes as long as any."""
    unet: UNet2DConditionModel = copy_skeleton(outline).to_empty(device=device).eval()
    for parameter in unet.parameters():
        parameter.normal_(std=0.02)
    return unet.half() if device.type == "cuda" else unet


ENOUGH = 2.0
"""Seconds of calls after which no more are measured."""


@torch.no_grad()
def measure_rate(unet: UNet2DConditionModel, macs: int, batch: int = 1, *, most: int = 10) -> float:
    """Multiply-accumulates a second of a UNet's forward, where it is.

    Args:
        macs: of one sample.
        batch: samples of one call; fewer where so many would take long.
    """
    samples = 1
    lap = _time_call(unet, samples)
    while samples < batch and 2 * lap < ENOUGH / 4:
        samples = min(2 * samples, batch)
        lap = _time_call(unet, samples)
    laps = [_time_call(unet, samples)]
    while len(laps) < most and sum(laps) < ENOUGH:
        laps.append(_time_call(unet, samples))
    return samples * macs / min(laps)


def _time_call(unet: UNet2DConditionModel, batch: int) -> float:
    """Seconds of one call."""
    inputs = make_inputs(
        unet, size=pick_size(unet, None), batch=batch, device=unet.device, dtype=unet.dtype
    )
    added = inputs.get("added_cond_kwargs", {})
    moments = inputs["timestep"].reshape(-1).expand(batch)
    start = time.perf_counter()
    call_unet(unet, inputs["sample"], moments, inputs["encoder_hidden_states"], added)
    if unet.device.type == "cuda":
        torch.cuda.synchronize(unet.device)
    return time.perf_counter() - start
