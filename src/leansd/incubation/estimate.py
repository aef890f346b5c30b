"""What a recipe takes, before anything is trained: counted on the meta device.

One step of every stage is run there, forward and backward: products are counted as they come, and
what autograd keeps is what the step needs in memory. Nothing is estimated but the time.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from leansd.anatomy import count_macs
from leansd.anatomy.counting import copy_skeleton
from leansd.anatomy.inputs import make_inputs, pick_size
from leansd.incubation.data.batches import PAIR, Batch
from leansd.incubation.noise import DiffusionSchedule, NoiseDraw
from leansd.incubation.recipe import TEACHER, Recipe, Stage
from leansd.incubation.step import (
    StageNet,
    Student,
    StudentUNet,
    TeacherUNet,
    build_losses,
    call_unet,
    make_student,
    outline_net,
    run_student,
    run_teacher,
)
from leansd.incubation.training_state import pack_batch, read_processes
from leansd.loading import find_dtype
from leansd.text import describe_duration
from leansd.unets import open_outline

GIB = 2**30
BYTES = {"no": 4, "bf16": 2}
"""Bytes of a frozen net's number, by precision."""
FULL = 4
"""Bytes of a float32: what trains is kept in it, whatever the precision."""
MOMENTS = {"adamw": 2 * FULL, "adamw8bit": 2}
"""Bytes of an optimizer's state for each parameter."""
ENOUGH = 2.0
"""Seconds of calls after which no more are measured."""


@dataclass(frozen=True)
class StageCost:
    """What one stage takes."""

    name: str
    mode: str
    steps: int
    samples: int
    parameters: int
    trained: int
    """Parameters that are trained."""
    teacher_macs: int
    """MACs of one sample's forward, here and of the student."""
    student_macs: int
    backward_macs: int
    """MACs of one sample's backward."""
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
        """MACs of one sample in both nets."""
        return self.teacher_macs + self.student_macs + self.backward_macs

    @property
    def all_macs(self) -> int:
        """MACs of the whole stage."""
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


def estimate_recipe(recipe: Recipe) -> Estimate:
    """What a recipe takes on this machine.

    Raises:
        LeansdError: its model cannot be found.
    """
    state = read_processes()
    device = torch.device(state.device or "cpu")
    outline = open_outline(recipe.model)
    macs = count_macs(outline).total
    rate = measure_rate(fill_outline(outline, device), macs, recipe.trainer.batch)
    world = state.num_processes
    return estimate(recipe, outline, macs_per_second=rate, device=str(device), world=world)


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
    recipe: Recipe, stage: Stage, student: Student, teacher: UNet2DConditionModel, world: int
) -> StageCost:
    """Run one step of one sample, or of a pair, on the meta device."""
    settings = recipe.trainer
    samples = PAIR if recipe.data.paired else 1
    count = count_step(stage, student, teacher, samples, settings.gradient_checkpointing)
    parameters = count_parameters(student.unet)
    trained = sum(each.numel() for each in student.unet.parameters() if each.requires_grad)
    kept = MOMENTS[settings.optimizer] + (0 if settings.ema is None else FULL)
    checkpoint = parameters * FULL + trained * kept
    frozen = count_parameters(teacher) * BYTES[settings.precision]
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
        weights=frozen + parameters * FULL + trained * (FULL + kept),
        activations=count.kept,
        disk=checkpoint * settings.keep + parameters * FULL + cached * a_step * count.example,
        taught=(cached or stage.steps) * a_step,
    )


def count_parameters(net: nn.Module) -> int:
    return sum(each.numel() for each in net.parameters())


@dataclass(frozen=True)
class StepCount:
    """Multiply-accumulates of one sample's step, and the bytes that autograd kept for it."""

    teacher: int
    student: int
    backward: int
    kept: int
    example: int
    """Bytes of one sample with what the teacher makes of it."""


def count_step(
    stage: Stage,
    student: Student,
    teacher: UNet2DConditionModel,
    samples: int,
    gradient_checkpointing: bool,
) -> StepCount:
    """What a step takes of a student and teacher on the meta device, for each of its samples."""
    unet = student.unet.train()
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    projection = torch.empty(unet.config["in_channels"] + 1, 3, device="meta")
    losses = build_losses(stage, student, projection, "meta")
    inputs = _make_inputs(teacher, samples, device="meta")
    batch = Batch(inputs["sample"], inputs["encoder_hidden_states"], inputs["added_cond_kwargs"])
    draw = NoiseDraw(
        torch.zeros(samples, dtype=torch.long, device="meta"), torch.empty_like(batch.latents)
    )
    schedule = DiffusionSchedule(torch.empty(1000, device="meta"), "epsilon")
    with ExitStack() as exits:
        exits.callback(unet.disable_gradient_checkpointing)
        exits.callback(unet.zero_grad)
        learner = StudentUNet(student, losses, stage.mode)
        exits.callback(learner.release)
        tutor = TeacherUNet(teacher, learner.needs)
        exits.callback(tutor.release)
        counters = [FlopCounterMode(display=False) for _ in range(3)]
        kept = KeptTensors(unet)
        with counters[0]:
            taught = run_teacher(tutor, batch, draw, schedule)
        with counters[1], saved_tensors_hooks(kept.add, lambda tensor: tensor):
            outputs = run_student(learner, taught, schedule)
            loss = torch.stack([each.loss(outputs) for each in losses]).sum()
        with counters[2]:
            loss.backward()
    forth, along, back = (each.get_total_flops() // 2 // samples for each in counters)
    example = sum(tensor.nbytes for tensor in pack_batch(taught).values()) // samples
    return StepCount(forth, along, back, kept.bytes // samples, example)


class KeptTensors:
    """Adds up what autograd keeps, parameters of a net apart."""

    def __init__(self, net: nn.Module) -> None:
        self.own = {id(each) for each in net.parameters()}
        self.alive: dict[int, Tensor] = {}
        """Tensors by their id, which is theirs as long as they live."""

    def add(self, tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in self.own:
            self.alive[id(base)] = base
        return tensor

    @property
    def bytes(self) -> int:
        return sum(each.nbytes for each in self.alive.values())


def _make_inputs(unet: UNet2DConditionModel, batch: int, **where: Any) -> dict[str, Any]:
    inputs = make_inputs(unet, size=pick_size(unet, None), batch=batch, **where)
    return {"added_cond_kwargs": {}, **inputs}


@torch.no_grad()
def fill_outline(outline: UNet2DConditionModel, device: torch.device) -> UNet2DConditionModel:
    """A UNet of this shape with random weights: it takes as long as any."""
    unet: Any = copy_skeleton(outline).to_empty(device=device).eval()
    for parameter in unet.parameters():
        parameter.normal_(std=0.02)
    return unet.to(find_dtype(device))


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
    inputs = _make_inputs(unet, batch, device=unet.device, dtype=unet.dtype)
    times = inputs["timestep"].reshape(-1).expand(batch)
    text, added = inputs["encoder_hidden_states"], inputs["added_cond_kwargs"]
    start = time.perf_counter()
    call_unet(unet, inputs["sample"], times, text, added)
    if unet.device.type == "cuda":
        torch.cuda.synchronize(unet.device)
    return time.perf_counter() - start
