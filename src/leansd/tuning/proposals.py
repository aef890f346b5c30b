"""Proposals: what the error model holds to be the best plans, for every speed at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from leansd.evaluation.cost import CostModel
from leansd.tuning.candidates import Candidate
from leansd.tuning.dynamic import Keys, find_best
from leansd.tuning.errors import Action, ErrorModel
from leansd.tuning.regimes import Regime
from leansd.tuning.variants import TICKS, allows

FEWER = 2
"""Proposals of each regime but the first that are tried for each speed."""
FINALISTS = 3
"""Plans of different step counts for each speed; the held-out calls help to decide between them."""
LONGEST = 0.2
"""The most steps between two key steps, as a share of all."""


@dataclass(frozen=True)
class Model:
    """The error model of one step count."""

    errors: ErrorModel
    lag: float
    """The error of its full run against that of all steps."""


def propose(
    models: Sequence[Model],
    regimes: Sequence[Regime],
    cost: CostModel,
    whole: float,
    speeds: Sequence[float],
    tell: Callable[[str], None],
) -> list[list[Candidate]]:
    """For each speed the best plan of every step count, and a few of each other regime.

    Of every one, since where key steps are few the model thinks too well of many steps.

    Errors of different regimes do not compare: of what a cut or an older guidance difference makes
    better or worse the model knows nothing.

    Args:
        regimes: the main one first.
        whole: seconds of the full run that speeds are against.
        tell: told what is being sought.
    """
    found: list[list[Candidate]] = [[] for _ in speeds]
    for place, regime in enumerate(regimes):
        best: list[list[Candidate]] = [[] for _ in speeds]
        for model in models:
            calibration = model.errors.calibration
            tell(f"looking for plans of {calibration.steps} steps")
            budgets = [_count_ticks(whole / speed, calibration.count, cost) for speed in speeds]
            for candidates, candidate in zip(best, search(model, regime, budgets), strict=True):
                candidates += filter(None, [candidate])
        for few, candidates in zip(found, best, strict=True):
            candidates.sort(key=lambda each: each.error)
            few += candidates[:FEWER] if place else candidates
    return found


def search(model: Model, regime: Regime, budgets: Sequence[int]) -> list[Candidate | None]:
    """The best plan of one step count within each budget, in ticks."""
    calibration = model.errors.calibration

    def judge(keys: Keys, end: int, action: Action) -> float:
        if not allows(regime.variants, keys):
            return float("inf")
        return model.errors.judge(keys, end, action).error

    longest = max(4, round(LONGEST * calibration.steps))
    proposals = find_best(
        calibration.count, judge, regime.actions, regime.key_costs, budgets, longest=longest
    )
    return [each and Candidate(each, model.errors, regime, model.lag) for each in proposals]


def _count_ticks(seconds: float, count: int, cost: CostModel) -> int:
    """The ticks that key steps may take for a run to take no longer.

    What a call takes that computes nothing, every step takes; ticks are of the rest.
    """
    nothing = cost.fixed.get("none", 0.0)
    left = seconds - cost.overhead_per_run - count * (cost.per_step + nothing)
    return int(left / (cost.full_call - nothing) * TICKS + 0.5)
