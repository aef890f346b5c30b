"""Regimes: what all plans of one search share besides their key steps, and what it costs.

Key steps, what they run, and how the steps between are forecast, dynamic programming finds. Two
things it cannot compare, so each has a search of its own, and runs decide between the best plans of
all: whether those steps forecast the UNet's whole output or compute what lies above a cut; and
whether key steps may run something cheaper, whose errors go the same way step after step and add up
to more than the model says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from leansd.evaluation.cost import CostModel
from leansd.plans.anatomy import Anatomy
from leansd.plans.compile import compile_plan
from leansd.plans.plan import Plan
from leansd.tuning.errors import HEAD_ACTIONS, Action
from leansd.tuning.variants import FULL, TICKS, WORTH, Variant


@dataclass(frozen=True)
class Regime:
    """One kind of plan.

    Attributes:
        actions: what steps between key steps may do, and their cost in ticks.
        variants: what key steps may run, the whole UNet first.
    """

    actions: Mapping[Action, int]
    variants: tuple[Variant, ...] = (FULL,)

    @property
    def key_costs(self) -> tuple[int, ...]:
        """Ticks of a key step, by what it runs."""
        return tuple(variant.ticks for variant in self.variants)


def list_regimes(
    cost: CostModel, anatomy: Anatomy, variants: Sequence[Variant] = (FULL,)
) -> list[Regime]:
    """Forecasts of the whole output first; then with cheaper key steps, where there are any; then a
    cut, where it costs noticeably less than a step.

    Args:
        variants: what key steps may run where the whole output is forecast between them.
    """
    nothing = cost.fixed.get("none", 0.0)
    whole = cost.full_call - nothing

    def share(plan: Plan, step: int) -> float:
        call = compile_plan(plan, anatomy).calls[step]
        return (cost.predict_call(call) - nothing) / whole

    heads = dict.fromkeys(HEAD_ACTIONS, 0)
    regimes = [Regime(heads)]
    if len(variants) > 1:
        regimes.append(Regime(heads, tuple(variants)))
    cut = Action(f"up{anatomy.up_blocks - 1}.l1", "forecast")
    above = share(Plan.full(4).inherit(cut.cut, at=3, how=cut.how), 3)
    if above < WORTH:
        regimes.append(Regime({cut: max(1, round(TICKS * above))}))
    return regimes
