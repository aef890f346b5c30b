"""Refinement: plans tried on real trajectories, their corrections fitted as they run.

The error model proposes; what a plan really does, the UNet's answers to changed latents included,
only a run can tell. One run fits and tries a plan at once: at every key step the correction is
chosen that brings the latents nearest to where the full run's are, and the run goes on with it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from leansd.plans.anatomy import HEAD
from leansd.plans.methods import METHODS
from leansd.plans.plan import Plan
from leansd.tuning.calibration import Calibration
from leansd.tuning.dynamic import Proposal, Stretch
from leansd.tuning.errors import Action, Key
from leansd.tuning.surprises import Memory, move_on
from leansd.tuning.taps import Seen, Step, tap
from leansd.tuning.trials import Bench, Trial

LIMIT = 3.0
"""Corrections beyond this are noise fitted to few calls."""
DAMPING = 1e-4
"""Tells the parts of a correction apart where they are nearly the same."""


def try_plan(plan: Plan, bench: Bench, calibration: Calibration) -> Trial:
    """Run a plan, fitting its corrections to the full run of the same step count on the way."""
    fitting = _Fitting(plan, calibration)
    with tap(bench.pipe.scheduler, fitting.steer):
        finals = bench.run(plan.steps, plan)
    fitted = plan.correct(fitting.weights)
    return Trial(fitted, bench.score(finals))


def list_corrected(plan: Plan) -> set[int]:
    """The key steps that come right after a forecast of the UNet's output and run both lanes."""
    pairs = enumerate(zip(plan.rows, plan.rows[1:], strict=False), start=1)
    return {
        step
        for step, (before, row) in pairs
        if HEAD in before.inherit and row.is_key and row.guidance == "compute"
    }


class _Fitting:
    """Finds the correction at each key step while runs go by, and lets them go on with it."""

    def __init__(self, plan: Plan, calibration: Calibration) -> None:
        self._plan = plan
        self._calibration = calibration
        self._start = calibration.steps - calibration.count
        self._corrected = list_corrected(plan)
        self._sums: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Normal equations of each key step over all runs: [2, 2] and [2]."""
        self._memory = Memory()

    @property
    def weights(self) -> dict[int, tuple[float, float]]:
        """The corrections by step, over all runs."""
        return {step: _solve(*sums) for step, sums in self._sums.items()}

    def steer(self, run: int, index: int, seen: Seen, step: Step) -> torch.Tensor:
        row = self._start + index
        if index == 0:
            self._memory = Memory()
        if index and not self._plan.rows[row].is_key:
            return seen.output
        place = float(self._calibration.log_snr[index])
        output = seen.output
        if row in self._corrected and len(self._memory):
            surprises = self._memory.list_surprises(place, seen.output)
            plain = step(seen.output)
            gains = torch.stack([step(seen.output + each) - plain for each in surprises])
            gains = gains.flatten(1).double()
            missing = (self._calibration.runs[run][index].previous - plain).double().flatten()
            normal, target = gains @ gains.T, gains @ missing
            output = move_on(seen.output, _solve(normal, target), surprises)
            before = self._sums.get(row, (0.0, 0.0))
            self._sums[row] = (before[0] + normal, before[1] + target)
        self._memory.note(place, seen.output)
        return output


def _solve(normal: torch.Tensor, target: torch.Tensor) -> tuple[float, float]:
    """Line and last of least squares, slightly damped, and within the limit."""
    damped = normal + DAMPING * normal.trace() * torch.eye(2).to(normal)
    line, last = torch.linalg.solve(damped, target).clamp(-LIMIT, LIMIT).tolist()
    return round(line, 4), round(last, 4)


def list_neighbours(
    proposal: Proposal, count: int, choices: Collection[Action]
) -> list[tuple[Stretch, ...]]:
    """Every proposal with one small change that costs nothing.

    One key step moved by one place, two neighbours that change what they run, or one stretch
    forecast otherwise.
    """
    keys, actions = proposal.keys, [stretch.action for stretch in proposal.stretches]
    taken = {key.step for key in keys}
    neighbours: list[tuple[Stretch, ...]] = []
    for place in range(1, len(keys)):
        for step in (keys[place].step - 1, keys[place].step + 1):
            if step < count and step not in taken:
                moved = keys[place]._replace(step=step)
                others = [*keys[:place], moved, *keys[place + 1 :]]
                neighbours.append(_join(others, actions, count))
    for place in range(len(keys) - 1):
        one, other = keys[place : place + 2]
        if one.variant != other.variant:
            swapped = one._replace(variant=other.variant), other._replace(variant=one.variant)
            neighbours.append(_join([*keys[:place], *swapped, *keys[place + 2 :]], actions, count))
    for place, stretch in enumerate(proposal.stretches):
        if stretch.end - stretch.key.step > 1:
            for action in choices:
                # With fewer key steps behind it, a parabola is a line.
                if action != stretch.action and place + 1 >= METHODS[action.how].depth:
                    changed = [*actions[:place], action, *actions[place + 1 :]]
                    neighbours.append(_join(keys, changed, count))
    return neighbours


def _join(keys: Sequence[Key], actions: Sequence[Action], count: int) -> tuple[Stretch, ...]:
    ends = [*(key.step for key in keys[1:]), count]
    return tuple(
        Stretch(key, end, action) for key, end, action in zip(keys, ends, actions, strict=True)
    )
