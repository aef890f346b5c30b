"""The error model: what a stretch between two key steps does to the final latents.

A *stretch* goes from one key step to the next; the steps between do not run the UNet in full. In
the model of `calibration` the errors of stretches add up, so that the best plan can be found by
dynamic programming.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from leansd.plans.liveness import DEPTHS
from leansd.plans.row import NO_CORRECTION, Correction, How
from leansd.runtime.store import weigh
from leansd.tuning.calibration import Calibration
from leansd.tuning.surprises import CORRECTION_HOWS


class Action(NamedTuple):
    """What the steps of a stretch do."""

    cut: str
    """What inherits; `head` for the UNet's whole output."""
    how: How


HEAD_ACTIONS = (Action("head", "forecast"), Action("head", "forecast2"))


class Judgement(NamedTuple):
    """The model's view of one stretch."""

    error: float
    """Mean squared error that it adds to the final latents."""
    correct: Correction = NO_CORRECTION
    """The correction at its end that makes the error least."""


@dataclass(frozen=True, eq=False)
class ErrorModel:
    """Errors of stretches in which the UNet's output is forecast."""

    calibration: Calibration
    _known: dict[Any, Judgement] = field(default_factory=dict[Any, Judgement], repr=False)

    def judge(self, keys: Sequence[int], end: int, action: Action) -> Judgement:
        """The stretch from the last of `keys` to `end`, the next key step or the end of the run.

        Remembered: the dynamic programme asks the same of every stretch for every speed.
        """
        asked = tuple(keys), end, action
        if asked not in self._known:
            self._known[asked] = self._judge(keys, end, action)
        return self._known[asked]

    def _judge(self, keys: Sequence[int], end: int, action: Action) -> Judgement:
        calibration = self.calibration
        count = calibration.count
        between = range(keys[-1] + 1, end)
        if not between:
            return Judgement(0.0)
        after = min(end + 1, count)
        change = np.zeros(count)
        for step in between:
            wrong = self._combine(keys, step, action.how)
            wrong[step] -= 1
            change += calibration.response[after, step] * wrong
        correct = NO_CORRECTION
        if end < count:
            remedies = np.stack([self._combine(keys, end, how) for how in CORRECTION_HOWS], axis=1)
            remedies = -remedies
            remedies[end] += 1
            remedies *= calibration.response[after, end]
            products = calibration.products
            # Where one output is known the two are the same; least squares shares between them.
            solution = np.linalg.lstsq(
                remedies.T @ products @ remedies, -remedies.T @ products @ change, rcond=1e-9
            )[0]
            correct = Correction(*solution.tolist())
            change = change + remedies @ solution
        error = float(change @ calibration.products @ change)
        return Judgement(error * float(calibration.carry[after]), correct)

    def _combine(self, keys: Sequence[int], step: int, how: How) -> np.ndarray:
        """The outputs of which a forecast at `step` is made, as weights of all calls, [n]."""
        known = list(keys)[-DEPTHS[how] :]
        points = [float(self.calibration.log_snr[key]) for key in known]
        at = float(self.calibration.log_snr[step])
        weights = np.zeros(self.calibration.count)
        for key, here in zip(known, points, strict=True):
            weights[key] = weigh(at, here, points)
        return weights
