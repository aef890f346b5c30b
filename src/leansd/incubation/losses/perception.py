"""`vgg`: pictures as a VGG sees them, the teacher's and the student's.

The other half of semantic-aware supervision. Both outputs become the clean latents that they mean,
and these pictures by a fixed linear projection. What noise hides counts less: a sample weighs its
share of signal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leansd.errors import LeansdError
from leansd.incubation.losses.normalised import compare_samples
from leansd.incubation.losses.outcome import Comparison, Outcome, Setting
from leansd.incubation.vgg import STAGES, load_vgg, project_latents


@dataclass(frozen=True)
class Perception:
    """The mean over a VGG's stages of squared errors over the teacher's mean square."""

    vgg: nn.Module
    """Gives the features of its stages for pictures [B, 3, H, W] in [-1, 1]."""
    projection: Tensor
    stages: tuple[int, ...]
    compares: tuple[Comparison, ...] = ()

    def __call__(self, outcome: Outcome) -> Tensor:
        student = self._see(outcome, outcome.student)
        with torch.no_grad():
            teacher = self._see(outcome, outcome.teacher)
        errors = [compare_samples(student[number], teacher[number]) for number in self.stages]
        weight = outcome.schedule.alphas[outcome.timesteps]
        return (weight * torch.stack(errors).mean(0)).mean()

    def _see(self, outcome: Outcome, output: Tensor) -> list[Tensor]:
        clean = outcome.schedule.predict_clean(
            outcome.noised.float(), output.float(), outcome.timesteps
        )
        return self.vgg(project_latents(self.projection, clean))


def build(
    setting: Setting,
    weights: str = "imagenet",
    stages: Sequence[int] = (0, 1, 2),
) -> Perception:
    """
    Args:
        weights: `imagenet` (torchvision's, downloaded or cached), `emoji` (the embedded model's
            own), a safetensors file of a VGG16 of any width, or `random` for smoke tests.
        stages: the stages compared, 0 to 4; each halves the picture after it.
    """
    if setting.projection is None:
        raise LeansdError("loss vgg: there is no projection from latents to RGB; give its file")
    if not stages or not set(stages) <= set(range(STAGES)):
        raise LeansdError(f"loss vgg: stages are some of 0 to {STAGES - 1}, not {list(stages)}")
    vgg = load_vgg(weights, stages=max(stages) + 1).to(setting.device)
    return Perception(vgg, setting.projection.to(setting.device), tuple(stages))
