"""What a loss sees of one batch, and what it may ask for before training begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from leansd.incubation.batches import Batch
from leansd.incubation.noise import Schedule
from leansd.surgery.lineage import Lineage


@dataclass(frozen=True)
class Comparison:
    """A unit of the student and the teacher's unit whose output it is to give."""

    student: str
    teacher: str

    def __str__(self) -> str:
        return f"{self.student} as {self.teacher}"


@dataclass(frozen=True)
class Outcome:
    """One batch, and what student and teacher made of it."""

    batch: Batch
    schedule: Schedule
    timesteps: Tensor
    """[B]."""
    noised: Tensor
    """What both were given, [B, C, h, w]."""
    target: Tensor
    """What the schedule wants predicted, [B, C, h, w]."""
    student: Tensor
    """[B, C, h, w]; so is `teacher`."""
    teacher: Tensor
    student_features: Mapping[str, Tensor]
    """By the student's addresses, [B, C', h', w']."""
    teacher_features: Mapping[str, Tensor]
    """By the teacher's addresses."""


class Loss(Protocol):
    """A term: what it compares, and how much that differs."""

    @property
    def compares(self) -> tuple[Comparison, ...]:
        """The outputs of units that it needs; most terms need none."""
        ...

    def __call__(self, outcome: Outcome) -> Tensor:
        """A float32 scalar, the mean over samples of what each differs by."""
        ...


@dataclass(frozen=True)
class Setting:
    """What terms are built from."""

    lineage: Lineage
    """Of the student, traced back to the teacher."""
    comparisons: tuple[Comparison, ...]
    """What is to be distilled: block ends, or all that leaves trained blocks."""
    projection: Tensor | None = None
    """From latents to RGB; where a term needs pictures."""
    device: torch.device | str = "cpu"
