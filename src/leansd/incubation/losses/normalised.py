"""`normalised-features`: as `features`, each error relative to the size of the teacher's output.

Blocks differ in scale by orders of magnitude; this way none of them drowns the others (LAPTOP-Diff,
arXiv 2404.11098).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from leansd.incubation.losses.features import pick_comparisons
from leansd.incubation.losses.outcome import Comparison, Outcome, Setting

SMALLEST = 1e-6
"""Mean square under which a teacher's output counts as this large."""


@dataclass(frozen=True)
class NormalisedFeatures:
    """The mean over blocks of their outputs' squared errors over the teacher's mean square."""

    compares: tuple[Comparison, ...]

    def __call__(self, outcome: Outcome) -> Tensor:
        errors = [
            compare_samples(
                outcome.student_features[each.student], outcome.teacher_features[each.teacher]
            )
            for each in self.compares
        ]
        return torch.stack(errors).mean()


def compare_samples(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error over mean square of `teacher`, both [B, C, H, W]; [B].

    Each sample has a scale of its own, so that how a batch is split makes no difference.
    """
    student, teacher = student.float().flatten(1), teacher.float().flatten(1)
    error = (student - teacher).square().mean(1)
    return error / teacher.square().mean(1).clamp_min(SMALLEST)


def build(setting: Setting, at: str | Sequence[str] | None = None) -> NormalisedFeatures:
    """
    Args:
        at: addresses or globs of the student; all comparisons but the middle block's, if none.
    """
    return NormalisedFeatures(pick_comparisons(setting, at))
