"""Polishing: all corrections of a plan fitted together, to where the full run's latents end.

For that the last latents' derivative by every correction is needed: a run for each. But a plan that
forecasts the UNet's whole output can be followed from the scheduler's side alone, where forecasts
are combinations of the key steps' outputs; so before the step whose correction is moved, nothing
has to be computed again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch

from leansd.plans.anatomy import HEAD
from leansd.plans.plan import Plan
from leansd.tuning.calibration import Calibration
from leansd.tuning.surprises import Memory, move_on
from leansd.tuning.taps import Seen, Step, tap
from leansd.tuning.trials import Bench, Trial

NUDGE = 0.1
"""By how much a correction is moved to see what it does."""
DAMPINGS = (0.01, 0.1, 1.0)
SLOPE_CALLS = 4
"""Derivatives are taken on so many calls; all decide whether they led anywhere."""

Outputs: TypeAlias = Mapping[int, torch.Tensor]
"""Guided outputs [B, C, H, W] of one run by key step, before correction."""


def polish(trial: Trial, bench: Bench, calibration: Calibration) -> Trial:
    """One step of Levenberg and Marquardt; the best of a few dampings, if it is better at all.

    Args:
        calibration: of the plan's step count.
    """
    rows = trial.plan.rows
    corrections = {step: row.correct for step, row in enumerate(rows) if any(row.correct)}
    if not corrections or bench.goals is None:
        return trial
    few = replace(bench, calls=bench.calls[:SLOPE_CALLS])
    base, past = replay(trial.plan, few, calibration)
    columns: list[torch.Tensor] = []
    for step, old in corrections.items():
        for moved in (old._replace(line=old.line + NUDGE), old._replace(last=old.last + NUDGE)):
            nudged = trial.plan.correct({step: moved})
            ended, _ = replay(nudged, few, calibration, since=step, past=past)
            columns.append((ended - base) / NUDGE)
    slopes = torch.stack(columns, dim=1)
    normal = slopes.T @ slopes
    goal = bench.goals.latents[: len(few.calls)].double().flatten()
    missing = slopes.T @ (goal - base)
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


def replay(
    plan: Plan,
    bench: Bench,
    calibration: Calibration,
    *,
    since: int = 0,
    past: Sequence[Outputs] = (),
) -> tuple[torch.Tensor, list[Outputs]]:
    """The last latents of all calls, flat, and the outputs of every run of the pipeline.

    Args:
        plan: one that inherits nothing but the head, by polynomials.
        since: the first step that is computed anew.
        past: the outputs of every run before that.
    """
    keys = {0, *(key for key in plan.keys if key >= since)}
    keys.update(*(_list_sources(plan, key) for key in keys))
    follower = _Follower(plan, calibration, since, past)
    with tap(bench.pipe.scheduler, follower.steer):
        finals = bench.run(plan.steps, _keep_keys(plan, keys))
    return finals.latents.double().flatten(), list(follower.outputs)


def _list_sources(plan: Plan, key: int) -> list[int]:
    """The key steps that the guidance of a key step is forecast from."""
    if plan.rows[key].guidance == "compute":
        return []
    return [each for each in plan.keys if each < key and plan.rows[each].guidance == "compute"][-2:]


def _keep_keys(plan: Plan, keys: Collection[int]) -> Plan:
    """What a plan computes at some of its key steps, and nothing else of it."""
    bare = Plan.between(keys, cut=HEAD, steps=plan.steps)
    for step in keys:
        row = plan.rows[step]
        bare = bare.switch(row.net, at=step).guide(row.guidance, at=step)
        for at, by in row.attend.items():
            bare = bare.attend(at, by=by, at=step)
    return bare


class _Follower:
    """Hands the scheduler what a plan would."""

    def __init__(
        self, plan: Plan, calibration: Calibration, since: int, past: Sequence[Outputs]
    ) -> None:
        self._plan = plan
        self._places = calibration.log_snr.tolist()
        self._start = calibration.steps - calibration.count
        self._since = since
        self._past = past
        self._memory = Memory()
        self.outputs: list[dict[int, torch.Tensor]] = []

    def steer(self, run: int, index: int, seen: Seen, step: Step) -> torch.Tensor:
        at = self._start + index
        place, row = self._places[index], self._plan.rows[at]
        if index == 0:
            self._memory = Memory()
            self.outputs.append({})
        elif not row.is_key:
            return self._memory.forecast(place, row.inherit[HEAD])
        # Some steps before are computed only for what guidance is forecast from.
        output = self._past[run][at] if at < self._since else seen.output
        corrected = output
        if any(row.correct) and len(self._memory):
            surprises = self._memory.list_surprises(place, output)
            corrected = move_on(output, row.correct, surprises)
        self.outputs[run][at] = output
        self._memory.note(place, output)
        return corrected
