"""`denoising`: the diffusion objective itself, on real latents."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from leansd.incubation.losses.outcome import Comparison, Outcome, Setting


@dataclass(frozen=True)
class Denoising:
    """Squared error of the student's output to what the schedule wants predicted."""

    compares: tuple[Comparison, ...] = ()

    def __call__(self, outcome: Outcome) -> Tensor:
        return F.mse_loss(outcome.student.float(), outcome.target.float())


def build(setting: Setting) -> Denoising:
    return Denoising()
