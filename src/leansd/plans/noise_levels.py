"""Noise levels that a plan was tuned for, and the same plan at others.

A sampler's settings (spacing of time steps, Karras sigmas, another model's noise schedule) place
the steps of a run at other noise levels. A key step is worth what it is at its noise level,
whatever its number, so key steps go along to the nearest level, in log-SNR.
"""

from __future__ import annotations

from collections.abc import Sequence

from leansd.errors import LeansdError
from leansd.plans.plan import Plan

CLOSE = 0.05
"""Log-SNRs that differ by no more are the same noise level: a hundredth of a step of thirty."""


def differ(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two runs have other noise levels, or another number of them."""
    if len(one) != len(other):
        return True
    return any(abs(here - there) > CLOSE for here, there in zip(one, other, strict=True))


def carry_over(plan: Plan, then: Sequence[float], now: Sequence[float]) -> Plan:
    """A plan for steps at the log-SNRs `then` as one for steps at `now`.

    Key steps move to the nearest noise level; two that meet at one become one. Every other step
    does what the step nearest to it did. A correction is a multiple of what a forecast over log-SNR
    was wrong by, so it goes along.

    Raises:
        LeansdError: the plan mixes outputs, whose weights are a sampler's at its own levels.
    """
    if plan.mixes:
        raise LeansdError(
            f"plan {plan.name} mixes outputs as fitted to other noise levels: run the sampler with "
            "the settings that it was fitted with, or tune a plan for these"
        )
    keys = {_find_nearest(now, then[key]): plan.rows[key] for key in plan.keys[1:]}
    keys[0] = plan.rows[0]
    others = [step for step in range(plan.steps) if step not in plan.keys]
    if not others:
        return plan.fit(len(now))
    levels = [then[step] for step in others]
    rows = tuple(
        keys[step] if step in keys else plan.rows[others[_find_nearest(levels, level)]]
        for step, level in enumerate(now)
    )
    return Plan(rows, plan.name, plan.drift, plan.tuned)


def _find_nearest(levels: Sequence[float], level: float) -> int:
    return min(range(len(levels)), key=lambda step: abs(levels[step] - level))
