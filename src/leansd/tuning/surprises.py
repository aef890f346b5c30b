"""What a run's computed outputs say beforehand of the next, and how wrong they are.

The output of a key step is corrected by multiples of these surprises (`Plan.correct`).
"""

from __future__ import annotations

import torch

from leansd.plans.methods import METHODS, weigh
from leansd.plans.row import How

CORRECTION_HOWS: tuple[How, ...] = ("forecast", "reuse")
"""The forecasts that `Correction`'s parts are by, in their order."""


class Memory:
    """The computed outputs of one run and where they lie in log-SNR."""

    def __init__(self) -> None:
        self._known: list[tuple[float, torch.Tensor]] = []

    def __len__(self) -> int:
        return len(self._known)

    def note(self, place: float, output: torch.Tensor) -> None:
        self._known.append((place, output))

    def forecast(self, place: float, how: How) -> torch.Tensor:
        """The polynomial through the last outputs, [B, C, H, W]."""
        known = self._known[-METHODS[how].depth :]
        points = [here for here, _ in known]
        return torch.stack([weigh(place, here, points) * each for here, each in known]).sum(0)

    def list_surprises(self, place: float, output: torch.Tensor) -> torch.Tensor:
        """What the forecasts that corrections are by were wrong by, [2, B, C, H, W]."""
        return torch.stack([output - self.forecast(place, how) for how in CORRECTION_HOWS])


def move_on(
    output: torch.Tensor, correct: tuple[float, float], surprises: torch.Tensor
) -> torch.Tensor:
    """The corrected output [B, C, H, W], by surprises [2, B, C, H, W]."""
    line, last = correct
    return output + line * surprises[0] + last * surprises[1]
