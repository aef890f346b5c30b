"""`output`: the student's output is to be the teacher's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from leansd.incubation.losses.outcome import Comparison, Outcome, Setting


@dataclass(frozen=True)
class Output:
    """Squared error of the student's output to the teacher's."""

    compares: tuple[Comparison, ...] = ()

    def __call__(self, outcome: Outcome) -> Tensor:
        return F.mse_loss(outcome.student.float(), outcome.teacher.float())


def build(setting: Setting) -> Output:
    return Output()
