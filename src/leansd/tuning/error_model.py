"""The error model: what a segment between two key steps does to the final latents.

A *segment* goes from one key step to the next; the steps between do not run the UNet in full. In
the model of `calibration` the errors of segments add up, so that the best plan can be found by
dynamic programming.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from leansd.plans.methods import METHODS, weigh
from leansd.plans.row import NO_CORRECTION, Correction, How
from leansd.tuning.calibration import Calibration

CORRECTION_HOWS: tuple[How, ...] = ("forecast", "reuse")
"""The forecasts that `Correction`'s parts are by, in their order."""


class Action(NamedTuple):
    """What the steps of a segment do."""

    cut: str
    """What inherits; `head` for the UNet's whole output."""
    how: How


HEAD_ACTIONS = (Action("head", "forecast"), Action("head", "forecast2"))
REUSE = Action("head", "reuse")


class Key(NamedTuple):
    """A key step."""

    step: int
    variant: int = 0
    """What it runs, by its place among the variants of the error model; 0 is the UNet in full."""


class SegmentError(NamedTuple):
    """The model's view of one segment."""

    error: float
    """Mean squared error that it adds to the final latents."""
    correct: Correction = NO_CORRECTION
    """The correction at its end that makes the error least."""


@dataclass(frozen=True, eq=False)
class ErrorModel:
    """Errors of segments in which the UNet's output is forecast.

    The outputs of all calls are its basis, and behind them, for every variant of a key step, by how
    much that is wrong at all calls: [n (1 + variants)]. Where a variant forecasts something by the
    line through its last two values, that is what leaving it out would be wrong by; the forecast
    makes most of it good, and the less of it the longer ago those two key steps were.
    """

    calibration: Calibration
    products: np.ndarray
    """Mean products of every two of the basis."""
    forecasts: frozenset[int] = frozenset()
    """The variants that forecast something."""
    _known: dict[Any, SegmentError] = field(default_factory=dict[Any, SegmentError], repr=False)
    _made: dict[Any, np.ndarray] = field(default_factory=dict[Any, np.ndarray], repr=False)

    @classmethod
    def of(
        cls,
        calibration: Calibration,
        deviations: Sequence[np.ndarray] = (),
        forecasts: Iterable[int] = (),
    ) -> ErrorModel:
        """The model of a full run.

        Args:
            deviations: for every variant but the full one, its outputs at all calls minus the full
                ones, [n, numbers], as `calibration.outputs` has those.
            forecasts: the variants, counted from 1, whose deviations are of leaving out what they
                forecast.
        """
        if not deviations:
            return cls(calibration, calibration.products)
        basis = np.concatenate([calibration.outputs, *deviations])
        return cls(calibration, basis @ basis.T / basis.shape[1], frozenset(forecasts))

    def judge(self, keys: Sequence[Key], end: int, action: Action) -> SegmentError:
        """The segment from the last of `keys` to `end`, the next key step or the end of the run.

        What is wrong with the last key step itself counts with it.

        Remembered: the dynamic programme asks the same of every segment for every speed.
        """
        asked = tuple(keys), end, action
        if asked not in self._known:
            self._known[asked] = self._judge(keys, end, action)
        return self._known[asked]

    def _judge(self, keys: Sequence[Key], end: int, action: Action) -> SegmentError:
        calibration, products = self.calibration, self.products
        count = calibration.count
        between = range(keys[-1].step + 1, end)
        after = min(end + 1, count)
        change = np.zeros(len(products))
        if keys[-1].variant:
            change += calibration.response[after, keys[-1].step] * self._deviate(keys)
        if not between and not keys[-1].variant:
            return SegmentError(0.0)
        for step in between:
            change += calibration.response[after, step] * self._combine(keys, step, action.how)
            change[step] -= calibration.response[after, step]
        correct = NO_CORRECTION
        if between and end < count:
            remedies = np.stack([self._combine(keys, end, how) for how in CORRECTION_HOWS], axis=1)
            remedies = -remedies
            remedies[end] += 1
            remedies *= calibration.response[after, end]
            # Where one output is known the two are the same; least squares shares between them.
            solution = np.linalg.lstsq(
                remedies.T @ products @ remedies, -remedies.T @ products @ change, rcond=1e-9
            )[0]
            correct = Correction(*solution.tolist())
            change = change + remedies @ solution
        error = float(change @ products @ change)
        return SegmentError(error * float(calibration.error_gain[after]), correct)

    def _place(self, key: Key) -> int:
        """Where in the basis lies what is wrong with a key step that is not full."""
        return self.calibration.count * key.variant + key.step

    def _combine(self, keys: Sequence[Key], step: int, how: How) -> np.ndarray:
        """What a forecast at `step` is made of, in the basis; not to be written to."""
        asked = tuple(keys), step, how
        if asked not in self._made:
            self._made[asked] = self._make_forecast(asked[0], step, METHODS[how].depth)
        return self._made[asked]

    def _make_forecast(self, keys: Sequence[Key], step: int, depth: int) -> np.ndarray:
        weights = np.zeros(len(self.products))
        begin = max(0, len(keys) - depth)
        shares = self._weigh(step, [key.step for key in keys[begin:]])
        for place, weight in enumerate(shares, start=begin):
            weights[keys[place].step] += weight
            if keys[place].variant:
                weights += weight * self._deviate(keys[: place + 1])
        return weights

    def _deviate(self, keys: Sequence[Key]) -> np.ndarray:
        """What is wrong with the last of some key steps, in the basis."""
        last = keys[-1]
        weights = np.zeros(len(self.products))
        weights[self._place(last)] = 1.0
        if last.variant in self.forecasts:
            known = _list_two([key.step for key in keys])
            for step, weight in zip(known, self._weigh(last.step, known), strict=True):
                weights[self._place(Key(step, last.variant))] -= weight
        return weights

    def _weigh(self, step: int, known: Sequence[int]) -> list[float]:
        """The shares that outputs at known steps have in the forecast at a step."""
        points = [float(self.calibration.log_snr[each]) for each in known]
        at = float(self.calibration.log_snr[step])
        return [weigh(at, here, points) for here in points]


def _list_two(steps: Sequence[int]) -> list[int]:
    """The two steps before the last; where one is out of sight, as far off as the next is."""
    seen = list(steps)
    while len(seen) < 3:
        gap = seen[1] - seen[0] if len(seen) > 1 else 1
        seen.insert(0, seen[0] - gap)
    first, second = (max(0, step) for step in seen[-3:-1])
    return [first, second] if first < second else [second]
