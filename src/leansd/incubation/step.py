"""A stage's student and the training step, as the papers write it: one batch through both nets.

x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e             noise from a seed and the sample's number
y_T, f_T = teacher(x_t, t, c)                     without gradients
y_S, f_S = student(x_t, t, c)                     decoupled: on f_T in place of what is frozen
loss = sum of w_i(progress) L_i(y_S, f_S; y_T, f_T, target)
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from leansd.anatomy import read_anatomy
from leansd.errors import LeansdError
from leansd.incubation.data.batches import Batch
from leansd.incubation.losses import (
    Features,
    FeatureTaps,
    Loss,
    LossContext,
    StepOutputs,
    TeacherInputs,
    build_loss,
    list_boundary,
)
from leansd.incubation.noise import DiffusionSchedule, NoiseDraw
from leansd.incubation.recipe import SCHEDULES, TEACHER, LossSettings, Stage
from leansd.loading import load_outline, load_unet
from leansd.plans.address import get_block
from leansd.plans.anatomy import Anatomy
from leansd.surgery.apply import operate
from leansd.surgery.lineage import Lineage, Pair

# -- the student of a stage: made by surgery, with what trains, is frozen and is compared ----------
#
# Frozen is what came unchanged from the teacher and was never trained. What an earlier stage left
# frozen stays so when a later one takes it over.

ABOUT = "incubation.json"


@dataclass(frozen=True)
class StageNet:
    """A UNet that a stage may start from."""

    unet: UNet2DConditionModel
    lineage: Lineage | None = None
    """Back to the teacher; none of the teacher itself."""
    frozen: frozenset[str] = frozenset()
    """Units that are still the teacher's."""


@dataclass(frozen=True)
class Student:
    """What a stage trains."""

    unet: UNet2DConditionModel
    lineage: Lineage
    """Back to the teacher."""
    anatomy: Anatomy
    trained: tuple[str, ...]
    """Units, in running order."""
    frozen: frozenset[str]
    """Units that are the teacher's, and stay so."""

    def list_pairs(self, mode: str) -> tuple[Pair, ...]:
        """What to distil: the end of every block, or all that leaves the blocks that train.

        Where blocks are trained apart, the skips that they hand over have no other teacher.
        """
        if mode == "end-to-end":
            return self.lineage.pairs()
        blocks = dict.fromkeys(get_block(at) for at in self.trained)
        leaving = [at for block in blocks for at in list_boundary(self.anatomy, block)]
        return tuple(Pair(at, self.lineage.stands_for(at)) for at in leaving)


def make_student(stage: Stage, nets: Mapping[str, StageNet]) -> Student:
    """Operate as a stage says, and freeze all but what it trains.

    Args:
        nets: the teacher, and what earlier stages made, by name.

    Raises:
        LeansdError: the surgery cannot be done, or nothing would train.
    """
    own = {name: nets[net] for name, net in stage.nets.items()}
    unet, made = operate({name: net.unet for name, net in own.items()}, stage.surgery)
    # Nets may be in half precision, what trains may not. `to` is that of `nn.Module`: diffusers'
    # own warns where it has nothing to warn of.
    nn.Module.to(unet, torch.float32)
    teachers = {name for name, net in stage.nets.items() if net == TEACHER}
    earlier = {name: net.lineage for name, net in own.items() if net.lineage is not None}
    lineage = rename_teacher(made, teachers).trace(earlier)
    anatomy = read_anatomy(unet)
    # The teacher's still, bit for bit.
    untouched = {
        at
        for at, (net, origin) in ((at, made.origins[at]) for at in made.units)
        if at not in made.changed and (net in teachers or origin in own[net].frozen)
    }
    if stage.train is None:
        picked = set(anatomy.addresses) - untouched
    else:
        picked = {unit.at for each in stage.train for unit in anatomy.select(each)}
    if not picked:
        raise LeansdError(
            f"stage {stage.name} trains nothing, since all of its student is the teacher's "
            "unchanged; say what trains, train: ['*'] for all of it"
        )
    # What lies in no unit, such as the time embedding, trains where all of it does.
    unet.requires_grad_(stage.train is not None and "*" in stage.train)
    for at in picked:
        unet.get_submodule(anatomy[at].path).requires_grad_(True)
    trained = tuple(at for at in anatomy.addresses if at in picked)
    return Student(unet, lineage, anatomy, trained, frozenset(untouched - picked))


def rename_teacher(lineage: Lineage, names: Collection[str]) -> Lineage:
    """A lineage that calls the teacher so, whatever a surgery called it."""
    origins = {
        at: origin._replace(net=TEACHER) if origin.net in names else origin
        for at, origin in lineage.origins.items()
    }
    nets = {TEACHER if name in names else name: units for name, units in lineage.nets.items()}
    base = TEACHER if lineage.base in names else lineage.base
    return lineage.model_copy(update={"origins": origins, "nets": nets, "base": base})


def save_net(student: Student, folder: Path, about: Mapping[str, Any]) -> None:
    """Write a UNet in diffusers' layout, with its lineage and what of it is still the teacher's."""
    student.unet.save_pretrained(folder)
    student.lineage.save(folder / "lineage.json")
    text = json.dumps({**about, "frozen": sorted(student.frozen)}, indent=1)
    (folder / ABOUT).write_text(text + "\n", encoding="utf-8")


def open_net(folder: Path) -> StageNet:
    """A net as `save_net` wrote it, on the CPU in float32.

    Raises:
        LeansdError: there is none, or none that incubation left.
    """
    return StageNet(load_unet(folder, device="cpu", dtype=torch.float32), *_read_origin(folder))


def outline_net(folder: Path) -> StageNet:
    """A saved net's outline on the meta device, for counting."""
    return StageNet(load_outline(folder), *_read_origin(folder))


def _read_origin(folder: Path) -> tuple[Lineage, frozenset[str]]:
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        return Lineage.load(folder), frozenset(about["frozen"])
    except (OSError, ValueError, KeyError) as error:
        raise LeansdError(
            f"{folder} holds no net that incubation left: give the folder of a stage's or a run's "
            f"net, which has a {ABOUT}"
        ) from error


# -- the step --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TeacherBatch:
    """A noised batch, and what the teacher makes of it."""

    batch: Batch
    draw: NoiseDraw
    noised: Tensor
    """[B, C, h, w]."""
    output: Tensor
    """The teacher's, [B, C, h, w]."""
    features: Features
    """The teacher's, by its addresses."""


def run_teacher(
    teacher: TeacherUNet, batch: Batch, draw: NoiseDraw, schedule: DiffusionSchedule
) -> TeacherBatch:
    """Noise a batch and show it to the teacher; all are on its device."""
    noised = schedule.add_noise(batch.latents, draw.noise, draw.timesteps)
    output, features = teacher(noised, draw.timesteps, batch.text, batch.added)
    return TeacherBatch(batch, draw, noised, output, features)


def run_student(
    student: nn.Module, taught: TeacherBatch, schedule: DiffusionSchedule
) -> StepOutputs:
    """Show the same to the student.

    Args:
        student: a `StudentUNet`, or what distributed training wraps it in.
    """
    batch, (timesteps, noise) = taught.batch, taught.draw
    output, features = student(taught.noised, timesteps, batch.text, batch.added, taught.features)
    return StepOutputs(
        batch=batch,
        schedule=schedule,
        timesteps=timesteps,
        noised=taught.noised,
        target=schedule.make_target(batch.latents, noise, timesteps),
        student=output,
        teacher=taught.output,
        student_features=features,
        teacher_features=taught.features,
    )


class StudentUNet(nn.Module):
    """A student that gives its output and the features that are compared.

    Features are part of what it returns, so that the wrappers of distributed training see them.
    """

    def __init__(self, student: Student, losses: Sequence[WeightedLoss], mode: str) -> None:
        super().__init__()
        self.unet = student.unet
        self.inputs: TeacherInputs | None = None
        if mode == "decoupled":
            lineage = student.lineage
            stands_for = {at: lineage.stands_for(at).at for at in lineage.units}
            self.inputs = TeacherInputs(student.unet, student.trained, stands_for)
        pairs = dict.fromkeys(pair for each in losses for pair in each.loss.compares)
        self._taps = FeatureTaps(student.unet, dict.fromkeys(at for at, _ in pairs))
        fed = () if self.inputs is None else self.inputs.addresses
        self.needs = tuple(dict.fromkeys([*(teacher.at for _, teacher in pairs), *fed]))
        """The teacher's units whose outputs it is compared with or fed."""

    def forward(
        self,
        noised: Tensor,
        timesteps: Tensor,
        text: Tensor,
        added: Mapping[str, Tensor],
        given: Mapping[str, Tensor],
    ) -> tuple[Tensor, Features]:
        """Output [B, C, h, w] and features by address, of inputs as a UNet takes them.

        Args:
            given: the teacher's features that it is fed, by the teacher's addresses.
        """
        if self.inputs is not None:
            self.inputs.given = given
        with self._taps.watching() as features:
            output = call_unet(self.unet, noised, timesteps, text, added)
        return output, features

    def rest(self) -> None:
        """Let the UNet run as any other, until the next batch."""
        if self.inputs is not None:
            self.inputs.given = None

    def release(self) -> None:
        """Leave the UNet as it was."""
        self._taps.release()
        if self.inputs is not None:
            self.inputs.release()


class TeacherUNet:
    """The original UNet, frozen and watched until `release`.

    Raises:
        LeansdError: an address is no unit's; the UNet is as it was.
    """

    def __init__(self, unet: UNet2DConditionModel, addresses: Sequence[str]) -> None:
        self.unet = unet
        self._taps = FeatureTaps(unet, addresses)
        self._exits = ExitStack()
        self._exits.enter_context(frozen(unet))
        self._exits.callback(self._taps.release)

    @torch.no_grad()
    def __call__(
        self, noised: Tensor, timesteps: Tensor, text: Tensor, added: Mapping[str, Tensor]
    ) -> tuple[Tensor, Features]:
        """The student's output and features."""
        dtype = self.unet.dtype
        added = {name: tensor.to(dtype) for name, tensor in added.items()}
        with self._taps.watching() as features:
            output = call_unet(self.unet, noised.to(dtype), timesteps, text.to(dtype), added)
        return output, features

    def release(self) -> None:
        """Leave the UNet as it was."""
        self._exits.close()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No gradients and no dropout within; afterwards what trained before does so again."""
    wanted = [(each, each.requires_grad) for each in module.parameters()]
    modes = [(each, each.training) for each in module.modules()]
    module.requires_grad_(False).eval()
    try:
        yield
    finally:
        for parameter, is_wanted in wanted:
            parameter.requires_grad_(is_wanted)
        for each, was_training in modes:
            each.training = was_training


def call_unet(
    unet: UNet2DConditionModel,
    noised: Tensor,
    timesteps: Tensor,
    text: Tensor,
    added: Mapping[str, Tensor],
) -> Tensor:
    """The output [B, C, h, w] of a UNet."""
    options: dict[str, Any] = {"added_cond_kwargs": dict(added)} if added else {}
    return unet(noised, timesteps, text, return_dict=False, **options)[0]


@dataclass(frozen=True)
class WeightedLoss:
    """A loss with its weight over the stage."""

    name: str
    loss: Loss
    settings: LossSettings


def build_losses(
    stage: Stage, student: Student, projection: Tensor | None, device: torch.device | str
) -> tuple[WeightedLoss, ...]:
    """The losses of a stage; what weighs nothing is left out."""
    context = LossContext(student.lineage, student.list_pairs(stage.mode), projection, device)
    return tuple(
        WeightedLoss(name, build_loss(name, settings.options, context), settings)
        for name, settings in stage.losses.items()
        if settings.weight
    )


def sum_losses(
    losses: Sequence[WeightedLoss], outputs: StepOutputs, progress: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and its parts before they are weighed: float32 scalars, outside autocast.

    Args:
        progress: the share of the stage that is done.
    """
    parts = {each.name: each.loss(outputs) for each in losses}
    weights = {e.name: e.settings.weight * SCHEDULES[e.settings.schedule](progress) for e in losses}
    return torch.stack([weights[name] * part for name, part in parts.items()]).sum(), parts
