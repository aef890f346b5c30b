"""One batch through teacher and student: all that losses see of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from leansd.incubation.batches import Batch
from leansd.incubation.losses import Comparison, Outcome
from leansd.incubation.noise import Draw, Schedule
from leansd.incubation.students import Student
from leansd.incubation.taps import Features, Feeds, Taps


class Learner(nn.Module):
    """A student that gives its output and the features that are compared.

    Features are part of what it returns, so that the wrappers of distributed training see them.
    """

    def __init__(self, student: Student, compares: Sequence[Comparison], mode: str) -> None:
        super().__init__()
        self.unet = student.unet
        is_apart = mode == "decoupled"
        self.feeds = Feeds(student.unet, student.trained, student.stands) if is_apart else None
        self._taps = Taps(student.unet, dict.fromkeys(each.student for each in compares))

    @property
    def needs(self) -> tuple[str, ...]:
        """The teacher's units that it is fed."""
        return () if self.feeds is None else self.feeds.addresses

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
        if self.feeds is not None:
            self.feeds.feed(given)
        with self._taps.watching() as features:
            output = call_unet(self.unet, noised, timesteps, text, added)
        return output, features

    def rest(self) -> None:
        """Let the UNet run as any other, until the next batch."""
        if self.feeds is not None:
            self.feeds.stop()

    def release(self) -> None:
        """Leave the UNet as it was."""
        self._taps.release()
        if self.feeds is not None:
            self.feeds.release()


class Teacher:
    """The original UNet, frozen."""

    def __init__(self, unet: UNet2DConditionModel, addresses: Sequence[str]) -> None:
        self.unet = unet.requires_grad_(False).eval()
        self._taps = Taps(unet, dict.fromkeys(addresses))

    @torch.no_grad()
    def __call__(
        self, noised: Tensor, timesteps: Tensor, text: Tensor, added: Mapping[str, Tensor]
    ) -> tuple[Tensor, Features]:
        """As a learner's forward."""
        dtype = self.unet.dtype
        added = {name: tensor.to(dtype) for name, tensor in added.items()}
        with self._taps.watching() as features:
            output = call_unet(self.unet, noised.to(dtype), timesteps, text.to(dtype), added)
        return output, features

    def release(self) -> None:
        """Leave the UNet as it was."""
        self._taps.release()


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
class Example:
    """A noised batch, and what the teacher makes of it."""

    batch: Batch
    draw: Draw
    noised: Tensor
    """[B, C, h, w]."""
    output: Tensor
    """The teacher's, [B, C, h, w]."""
    features: Features
    """The teacher's, by its addresses."""


def teach(teacher: Teacher, batch: Batch, draw: Draw, schedule: Schedule) -> Example:
    """Show a batch to the teacher.

    Args:
        batch: on the device; so are `draw` and `schedule`.
    """
    noised = schedule.add_noise(batch.latents, draw.noise, draw.timesteps)
    output, features = teacher(noised, draw.timesteps, batch.text, batch.added)
    return Example(batch, draw, noised, output, features)


def learn(learner: nn.Module, example: Example, schedule: Schedule) -> Outcome:
    """Show a batch to the student.

    Args:
        learner: a `Learner`, or what distributed training wraps it in.
    """
    batch, timesteps = example.batch, example.draw.timesteps
    output, features = learner(example.noised, timesteps, batch.text, batch.added, example.features)
    return Outcome(
        batch=batch,
        schedule=schedule,
        timesteps=timesteps,
        noised=example.noised,
        target=schedule.make_target(batch.latents, example.draw.noise, timesteps),
        student=output,
        teacher=example.output,
        student_features=features,
        teacher_features=example.features,
    )
