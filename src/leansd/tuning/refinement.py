"""Refinement: plans tried on real trajectories, their corrections fitted as they run.

The error model proposes; what a plan really does, the UNet's answers to changed latents included,
only a run can tell. One run fits and tries a plan at once: at every key step the correction is
chosen that brings the latents nearest to where the full run's are, and the run goes on with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from leansd.measuring.fidelity import psnr
from leansd.measuring.trajectories import Finals, PipelineCall, run_calls
from leansd.plans.anatomy import HEAD
from leansd.plans.liveness import DEPTHS
from leansd.plans.plan import Plan
from leansd.runtime.store import weigh
from leansd.tuning.calibration import Calibration
from leansd.tuning.dynamic import Proposal, Stretch
from leansd.tuning.errors import CORRECTION_HOWS, HEAD_ACTIONS, Action
from leansd.tuning.taps import Seen, Step, tap

LIMIT = 3.0
"""Corrections beyond this are noise fitted to few calls."""
NUDGE = 0.1
"""By how much a correction is moved to see what it does."""
DAMPINGS = (0.01, 0.1, 1.0)
DAMPING = 1e-4
"""Tells the parts of a correction apart where they are nearly the same."""


@dataclass(frozen=True)
class Trial:
    """A plan as it did on the calls that it was fitted on."""

    plan: Plan
    psnr: float
    """Mean over the calls, in dB, against the full run of the step count that was asked for."""


@dataclass(frozen=True)
class Bench:
    """Where plans are tried: a pipeline, its calls and what their pictures should be."""

    pipe: Any
    calls: Sequence[PipelineCall]
    seed: int
    batch: int
    settings: Mapping[str, Any]
    targets: torch.Tensor
    """Pictures [N, 3, H, W] of the full run."""

    def run(self, steps: int, plan: Plan | None = None) -> Finals:
        return run_calls(
            self.pipe, self.calls, steps, plan,
            seed=self.seed, batch=self.batch, settings=self.settings,
        )  # fmt: skip

    def score(self, finals: Finals) -> float:
        return float(psnr(finals.pictures, self.targets).mean())


def build_plan(proposal: Proposal, calibration: Calibration, name: str = "tuned") -> Plan:
    """A proposal as a plan for the sampler's whole step count, without corrections."""
    plan = Plan.full(calibration.steps, name=name)
    start = calibration.steps - calibration.count
    for stretch in proposal.stretches:
        between = [start + step for step in range(stretch.key + 1, stretch.end)]
        if between:
            plan = plan.inherit(stretch.action.cut, at=between, how=stretch.action.how)
    return plan


def try_plan(plan: Plan, bench: Bench, calibration: Calibration) -> Trial:
    """Run a plan, fitting its corrections to the full run of the same step count on the way."""
    fitting = _Fitting(plan, calibration)
    with tap(bench.pipe.scheduler, fitting.steer):
        finals = bench.run(plan.steps, plan)
    return Trial(plan.correct(fitting.weights), bench.score(finals))


def polish(trial: Trial, bench: Bench, goal: torch.Tensor) -> Trial:
    """Fit all corrections of a plan together, to where the full run's latents end.

    One step of Levenberg and Marquardt: the last latents' derivative by each part of each
    correction is a difference of two runs, and the best of a few dampings is kept, if it is better
    at all.

    Args:
        goal: last latents [N, C, h, w] of the full run.
    """
    rows = trial.plan.rows
    corrections = {step: row.correct for step, row in enumerate(rows) if any(row.correct)}
    if not corrections:
        return trial
    base = _run_flat(trial.plan, bench)
    columns = [
        (_run_flat(trial.plan.correct({step: nudged}), bench) - base) / NUDGE
        for step, old in corrections.items()
        for nudged in (old._replace(line=old.line + NUDGE), old._replace(last=old.last + NUDGE))
    ]
    slopes = torch.stack(columns, dim=1)
    normal = slopes.T @ slopes
    missing = slopes.T @ (goal.double().flatten() - base)
    best = trial
    for damping in DAMPINGS:
        damped = normal + damping * torch.diag(normal.diagonal())
        change = torch.linalg.solve(damped, missing).reshape(-1, 2).tolist()
        moved = {
            step: (round(old.line + line, 4), round(old.last + last, 4))
            for (step, old), (line, last) in zip(corrections.items(), change, strict=True)
        }
        plan = trial.plan.correct(moved)
        other = Trial(plan, bench.score(bench.run(plan.steps, plan)))
        best = max(best, other, key=lambda each: each.psnr)
    return best


def _run_flat(plan: Plan, bench: Bench) -> torch.Tensor:
    return bench.run(plan.steps, plan).latents.double().flatten()


def list_corrected(plan: Plan) -> set[int]:
    """The key steps that come right after a forecast of the UNet's output."""
    pairs = enumerate(zip(plan.rows, plan.rows[1:], strict=False), start=1)
    return {step for step, (before, row) in pairs if HEAD in before.inherit and row.is_key}


class _Fitting:
    """Finds the correction at each key step while runs go by, and lets them go on with it."""

    def __init__(self, plan: Plan, calibration: Calibration) -> None:
        self._plan = plan
        self._calibration = calibration
        self._start = calibration.steps - calibration.count
        self._corrected = list_corrected(plan)
        self._sums: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Normal equations of each key step over all runs: [2, 2] and [2]."""
        self._known: list[tuple[float, torch.Tensor]] = []
        """Place in log-SNR and output of the key steps of the present run."""

    @property
    def weights(self) -> dict[int, tuple[float, float]]:
        """The corrections by step, over all runs."""
        return {step: _solve(*sums) for step, sums in self._sums.items()}

    def steer(self, run: int, index: int, seen: Seen, step: Step) -> torch.Tensor:
        row = self._start + index
        if index == 0:
            self._known = []
        if index and not self._plan.rows[row].is_key:
            return seen.output
        here = float(self._calibration.log_snr[index])
        output = seen.output
        if row in self._corrected and self._known:
            changes = [seen.output - self._forecast(here, DEPTHS[how]) for how in CORRECTION_HOWS]
            plain = step(seen.output)
            gains = torch.stack([(step(seen.output + each) - plain).flatten() for each in changes])
            gains = gains.double()
            missing = (self._calibration.runs[run][index].previous - plain).double().flatten()
            normal, target = self._sums.get(row, (0.0, 0.0))
            self._sums[row] = (normal + gains @ gains.T, target + gains @ missing)
            line, last = _solve(gains @ gains.T, gains @ missing)
            output = seen.output + line * changes[0] + last * changes[1]
        self._known.append((here, seen.output))
        return output

    def _forecast(self, here: float, count: int) -> torch.Tensor:
        """The polynomial through the last `count` outputs, [B, C, H, W]."""
        known = self._known[-count:]
        points = [place for place, _ in known]
        return torch.stack([weigh(here, place, points) * each for place, each in known]).sum(0)


def _solve(normal: torch.Tensor, target: torch.Tensor) -> tuple[float, float]:
    """Line and last of least squares, slightly damped, and within the limit."""
    damped = normal + DAMPING * normal.trace() * torch.eye(2, dtype=normal.dtype)
    line, last = torch.linalg.solve(damped, target).clamp(-LIMIT, LIMIT).tolist()
    return round(line, 4), round(last, 4)


def list_neighbours(proposal: Proposal, count: int) -> list[tuple[Stretch, ...]]:
    """Every proposal with one key step moved by one place, or one stretch forecast otherwise."""
    keys, actions = proposal.keys, [stretch.action for stretch in proposal.stretches]
    neighbours: list[tuple[Stretch, ...]] = []
    for place in range(1, len(keys)):
        for moved in (keys[place] - 1, keys[place] + 1):
            if moved < count and moved not in keys:
                others = [*keys[:place], moved, *keys[place + 1 :]]
                neighbours.append(_join(others, actions, count))
    for place, stretch in enumerate(proposal.stretches):
        if stretch.end - stretch.key > 1:
            for action in HEAD_ACTIONS:
                # With fewer key steps behind it, a parabola is a line.
                if action != stretch.action and place + 1 >= DEPTHS[action.how]:
                    changed = [*actions[:place], action, *actions[place + 1 :]]
                    neighbours.append(_join(keys, changed, count))
    return neighbours


def _join(keys: Sequence[int], actions: Sequence[Action], count: int) -> tuple[Stretch, ...]:
    ends = [*keys[1:], count]
    return tuple(
        Stretch(key, end, action) for key, end, action in zip(keys, ends, actions, strict=True)
    )
