"""`guided`: what guidance makes of the student's outputs is to be what it makes of the teacher's.

Pipelines step with the guided output: the unconditional one and a multiple of the difference that
the prompt makes. A student may be near in both and far off in their difference. It is compared as
velocity, whose errors count alike at all noise levels; errors of predicted noise are smallest where
most of a picture is decided. Needs pairs (`data: {paired: true}`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from leansd.incubation.losses.outcome import Comparison, Outcome, Setting
from leansd.incubation.paired import PAIR


@dataclass(frozen=True)
class Guided:
    """Squared error of guided velocities."""

    scale: float
    compares: tuple[Comparison, ...] = ()

    def __call__(self, outcome: Outcome) -> Tensor:
        student, teacher = outcome.student, outcome.teacher
        return F.mse_loss(self._guide(outcome, student), self._guide(outcome, teacher))

    def _guide(self, outcome: Outcome, output: Tensor) -> Tensor:
        velocity = outcome.schedule.predict_velocity(
            outcome.noised.float(), output.float(), outcome.timesteps
        )
        with_prompt, without = velocity[::PAIR], velocity[1::PAIR]
        return without + self.scale * (with_prompt - without)


def build(setting: Setting, scale: float = 7.5) -> Guided:
    """
    Args:
        scale: of the guidance that pictures will be drawn with.
    """
    return Guided(scale)
