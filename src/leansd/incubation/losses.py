"""Outputs of units, what a step gives, and the losses of a student beside its teacher, by name.

A new loss is a function of a `LossContext` and its options, and a line in `LOSSES`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from pydantic import ValidationError, validate_call
from torch import Tensor
from torch.nn import functional as F

from leansd.anatomy import read_anatomy
from leansd.core.outputs import guide
from leansd.errors import LeansdError
from leansd.incubation.data.batches import PAIR, Batch
from leansd.incubation.noise import DiffusionSchedule
from leansd.incubation.vgg import STAGES, load_vgg, project_latents
from leansd.plans.address import get_block, select
from leansd.plans.anatomy import HEAD, Anatomy, Unit
from leansd.runtime.hooks import Forward, ForwardHooks
from leansd.surgery.lineage import Lineage, Pair
from leansd.text import explain_validation, refuse_unknown, suggest_name

# -- features --------------------------------------------------------------------------------------
# Outputs of units by address, and units fed with another UNet's: both by patched forwards.
#
# A tapped UNet stays patched while it is trained, since gradient checkpointing calls its units
# again on the way back. Unless it is watched or fed, its units run as they were.

Features = dict[str, Tensor]
"""Outputs [B, C, h, w] of units by address."""


class FeatureTaps:
    """The outputs of some units of a UNet, while it is watched.

    Raises:
        LeansdError: an address is no unit's.
    """

    def __init__(self, unet: UNet2DConditionModel, addresses: Collection[str]) -> None:
        anatomy = read_anatomy(unet)
        modules = {at: unet.get_submodule(anatomy[at].path) for at in addresses}
        self._features: Features | None = None
        self._hooks = ForwardHooks(modules, self._keep)

    @contextmanager
    def watching(self) -> Iterator[Features]:
        """Outputs of the call within, filled as it runs."""
        self._features = features = {}
        try:
            yield features
        finally:
            self._features = None

    def release(self) -> None:
        """Leave the UNet as it was."""
        self._hooks.release()

    def _keep(self, at: str, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if self._features is not None:  # transformers wrap theirs
            first = output[0] if isinstance(output, tuple) else output
            self._features[at] = getattr(first, "sample", first)
        return output


class TeacherInputs:
    """A student that computes only the blocks that it trains, on the teacher's features.

    Units that are not trained give the output of the teacher's unit that they stand for, the head
    apart; a unit that reads another block's output is given the teacher's. No gradient then leaves
    a block, but for what the head gives back.

    Args:
        trained: addresses of units.
        stands_for: the teacher's unit that each unit of the student stands for.
    """

    def __init__(
        self, unet: UNet2DConditionModel, trained: Collection[str], stands_for: Mapping[str, str]
    ) -> None:
        self.anatomy = read_anatomy(unet)
        self.trained = frozenset(trained)
        self.stands_for = stands_for
        self.given: Mapping[str, Tensor] | None = None
        """The teacher's outputs to run on; without them the UNet computes all of itself.

        They must outlive the call: gradient checkpointing reads them again on the way back.
        """
        modules = {
            unit.at: unet.get_submodule(unit.path)
            for unit in self.anatomy
            if unit.at != HEAD and (unit.at not in self.trained or list_foreign(unit))
        }
        self._hooks = ForwardHooks(modules, self._feed)

    @property
    def addresses(self) -> tuple[str, ...]:
        """The teacher's units whose outputs are needed."""
        outside = {unit.at for unit in self.anatomy if unit.at not in self.trained}
        read = {at for unit in self.anatomy if unit.at in self.trained for at in list_foreign(unit)}
        return tuple(dict.fromkeys(self.stands_for[at] for at in (outside - {HEAD}) | read))

    def release(self) -> None:
        """Leave the UNet as it was."""
        self._hooks.release()

    def _feed(self, at: str, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        given = self.given
        if given is None:
            return forward(*args, **kwargs)
        if at not in self.trained:
            features = given[self.stands_for[at]]
            # In the form that a unit's caller takes: transformers are asked for a tuple.
            return (features,) if kwargs.get("return_dict") is False else features
        unit = self.anatomy[at]
        others = {each: given[self.stands_for[each]] for each in list_foreign(unit)}
        return forward(replace_inputs(self.anatomy, unit, args[0], others), *args[1:], **kwargs)


def list_foreign(unit: Unit) -> tuple[str, ...]:
    """What a unit reads of other blocks."""
    return tuple(at for at in unit.reads if get_block(at) != get_block(unit.at))


def list_boundary(anatomy: Anatomy, block: str) -> tuple[str, ...]:
    """The units of a block whose outputs leave it, skips included."""
    read = {at for unit in anatomy for at in list_foreign(unit)}
    return tuple(unit.at for unit in anatomy if unit.at in read and get_block(unit.at) == block)


def replace_inputs(
    anatomy: Anatomy, unit: Unit, inputs: Tensor, others: Mapping[str, Tensor]
) -> Tensor:
    """A unit's input [B, C, h, w], the hidden state and then the skip, with `others` in it."""
    skips = [anatomy[at].channels[1] for at in unit.reads[1:]]
    own = inputs.split([unit.channels[0] - sum(skips), *skips], dim=1)
    parts = [
        others.get(at, part).to(inputs.dtype) for at, part in zip(unit.reads, own, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


# -- losses ----------------------------------------------------------------------------------------

MID = "mid"
SMALLEST = 1e-6
"""Mean square under which a teacher's output counts as this large."""


@dataclass(frozen=True)
class StepOutputs:
    """One batch, and what student and teacher made of it."""

    batch: Batch
    schedule: DiffusionSchedule
    timesteps: Tensor
    """[B]."""
    noised: Tensor
    """What both were given, [B, C, h, w]."""
    target: Tensor
    """What the schedule wants predicted, [B, C, h, w]."""
    student: Tensor
    """[B, C, h, w]; so is `teacher`."""
    teacher: Tensor
    student_features: Features
    """Features by the student's addresses, [B, C', h', w']."""
    teacher_features: Features
    """Features by the teacher's addresses."""

    def drop_features(self) -> StepOutputs:
        """The outputs without gradients and features: a picture's worth of numbers, to be kept."""
        return replace(
            self, student=self.student.detach(), student_features={}, teacher_features={}
        )

    def list_features(self, pairs: Sequence[Pair]) -> list[tuple[Tensor, Tensor]]:
        """What the student and the teacher have at each pair, in single precision."""
        return [
            (self.student_features[at].float(), self.teacher_features[teacher.at].float())
            for at, teacher in pairs
        ]

    def predict(self, output: Tensor, predict: Callable[..., Tensor]) -> Tensor:
        """The clean latents, or the velocity, that an output [B, C, h, w] means."""
        return predict(self.schedule, self.noised.float(), output.float(), self.timesteps)


@dataclass(frozen=True)
class Loss:
    """How much something differs, and what of the features that takes."""

    compute: Callable[[StepOutputs], Tensor]
    """Gives a float32 scalar, the mean over samples of what each differs by."""
    compares: tuple[Pair, ...] = ()
    """The outputs of units that it needs; most losses need none."""

    def __call__(self, outputs: StepOutputs) -> Tensor:
        return self.compute(outputs)


@dataclass(frozen=True)
class LossContext:
    """What losses are built from."""

    lineage: Lineage
    """The student's origins in the teacher."""
    pairs: tuple[Pair, ...]
    """What is to be distilled: block ends, or all that leaves trained blocks."""
    projection: Tensor | None = None
    """From latents to RGB; where a loss needs pictures."""
    device: torch.device | str = "cpu"


def build_denoising(context: LossContext) -> Loss:
    """The diffusion objective itself: squared error to what the schedule wants predicted."""
    return Loss(lambda outputs: F.mse_loss(outputs.student.float(), outputs.target.float()))


def build_output(context: LossContext) -> Loss:
    """Squared error of the student's output to the teacher's."""
    return Loss(lambda outputs: F.mse_loss(outputs.student.float(), outputs.teacher.float()))


def build_features(context: LossContext, at: str | Sequence[str] | None = None) -> Loss:
    """The sum over blocks of plain squared errors of what leaves them (BK-SDM, 2305.15798).

    Args:
        at: addresses or globs of the student; all pairs but the middle block's, if none.
    """
    return _sum_errors(pick_pairs(context, at))


def _sum_errors(pairs: tuple[Pair, ...]) -> Loss:
    def compute(outputs: StepOutputs) -> Tensor:
        return torch.stack([F.mse_loss(*each) for each in outputs.list_features(pairs)]).sum()

    return Loss(compute, pairs)


def build_normalised(context: LossContext, at: str | Sequence[str] | None = None) -> Loss:
    """The mean over blocks of squared errors over the teacher's mean square.

    Blocks differ in scale by orders of magnitude; this way none of them drowns the others
    (LAPTOP-Diff, arXiv 2404.11098).

    Args: see `build_features`.
    """
    pairs = pick_pairs(context, at)

    def compute(outputs: StepOutputs) -> Tensor:
        return torch.stack([compare(*each) for each in outputs.list_features(pairs)]).mean()

    return Loss(compute, pairs)


def compare(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error over mean square of `teacher`, both [B, C, H, W]; [B].

    Each sample has a scale of its own, so that how a batch is split makes no difference.
    """
    student, teacher = student.flatten(1), teacher.flatten(1)
    error = (student - teacher).square().mean(1)
    return error / teacher.square().mean(1).clamp_min(SMALLEST)


def build_guided(context: LossContext, scale: float = 7.5) -> Loss:
    """Squared error of what guidance makes of the outputs, as velocities.

    Pipelines step with the guided output: the unconditional one and a multiple of the difference
    that the prompt makes. A student may be near in both and far off in their difference. Errors of
    a velocity count alike at all noise levels; those of predicted noise are smallest where most of
    a picture is decided. Needs pairs (`data: {paired: true}`).

    Args:
        scale: of the guidance that pictures will be drawn with.
    """

    def see(outputs: StepOutputs, output: Tensor) -> Tensor:
        velocity = outputs.predict(output, DiffusionSchedule.predict_velocity)
        return guide(velocity[1::PAIR], velocity[::PAIR], scale).output

    def compute(outputs: StepOutputs) -> Tensor:
        return F.mse_loss(see(outputs, outputs.student), see(outputs, outputs.teacher))

    return Loss(compute)


def build_mid(context: LossContext) -> Loss:
    """The output of the middle block, where a UNet's features mean most (A-SDM).

    Raises:
        LeansdError: the student has no middle block.
    """
    units = [at for at in context.lineage.units if get_block(at) == MID]
    if not units:
        raise LeansdError(
            "loss mid: the student has no middle block; compare the block before it with features"
        )
    return _sum_errors((Pair(units[-1], context.lineage.stands_for(units[-1])),))


def build_vgg(
    context: LossContext, weights: str = "imagenet", stages: Sequence[int] = (0, 1, 2)
) -> Loss:
    """Pictures as a VGG sees them: the mean over its stages of errors over the teacher's square.

    The half of A-SDM's semantic-aware supervision (arXiv 2406.00210) that the middle block's loss
    is not. Outputs become the clean latents that they mean, and these pictures by a fixed linear
    projection. What noise hides counts less: a sample weighs its share of signal.

    Args:
        weights: `imagenet` (torchvision's, downloaded or cached), `emoji` (the embedded model's
            own), a safetensors file of a VGG16 of any width, or `random` for smoke tests.
        stages: the stages compared, 0 to 4; each halves the picture after it.
    """
    if context.projection is None:
        raise LeansdError("loss vgg: there is no projection from latents to RGB; give its file")
    if not stages or not set(stages) <= set(range(STAGES)):
        raise LeansdError(f"loss vgg: stages are some of 0 to {STAGES - 1}, not {list(stages)}")
    vgg = load_vgg(weights, stages=max(stages) + 1).to(context.device)
    projection = context.projection.to(context.device)

    def see(outputs: StepOutputs, output: Tensor) -> list[Tensor]:
        clean = outputs.predict(output, DiffusionSchedule.predict_clean)
        return vgg(project_latents(projection, clean))

    def compute(outputs: StepOutputs) -> Tensor:
        student = see(outputs, outputs.student)
        with torch.no_grad():
            teacher = see(outputs, outputs.teacher)
        errors = [compare(student[stage].float(), teacher[stage].float()) for stage in stages]
        weight = outputs.schedule.alphas[outputs.timesteps]
        return (weight * torch.stack(errors).mean(0)).mean()

    return Loss(compute)


LOSSES: Mapping[str, Callable[..., Loss]] = {
    "denoising": build_denoising,
    "output": build_output,
    "features": build_features,
    "normalised-features": build_normalised,
    "guided": build_guided,
    "mid": build_mid,
    "vgg": build_vgg,
}


def pick_pairs(context: LossContext, at: str | Sequence[str] | None) -> tuple[Pair, ...]:
    """The pairs of a context under addresses or globs of the student.

    Raises:
        LeansdError: nothing is compared there.
    """
    there = {each.student: each for each in context.pairs}
    if at is None:
        picked = tuple(each for each in there.values() if get_block(each.student) != MID)
        if not picked:
            raise LeansdError("no block's output is compared; leave the features' loss out")
        return picked
    patterns = [at] if isinstance(at, str) else at
    names = dict.fromkeys(name for each in patterns for name in select(each, tuple(there)))
    return tuple(there[name] for name in names)


def check_loss(name: str, options: Mapping[str, Any]) -> None:
    """Refuse a name that no loss has, and options that this one has not.

    Raises:
        LeansdError: the message names what there is.
    """
    if name not in LOSSES:
        raise LeansdError(f"no loss {name!r}{suggest_name(name, LOSSES)}")
    _, *known = inspect.signature(LOSSES[name]).parameters
    refuse_unknown(f"loss {name}", options, known)


def build_loss(name: str, options: Mapping[str, Any], context: LossContext) -> Loss:
    """A loss by its name.

    Raises:
        LeansdError: there is none, or it cannot be had with these options or of this student.
    """
    check_loss(name, options)
    build: Callable[..., Loss] = validate_call(partial(LOSSES[name], context))
    try:
        return build(**options)
    except ValidationError as error:
        raise LeansdError(f"loss {name}: {explain_validation(error)}") from None
