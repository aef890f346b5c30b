"""Regimes: what all plans of one search share besides their key steps, and what it costs.

Key steps, and how the steps between are forecast, dynamic programming finds; whether those steps
forecast the UNet's whole output or compute what lies above a cut, and whether key steps run both
guidance lanes, changes what a step costs. So each regime has a search of its own, and runs decide
between the best plans of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from leansd.measuring.cost import CostModel
from leansd.plans.anatomy import Anatomy
from leansd.plans.plan import Plan
from leansd.plans.tracing import compile_plan
from leansd.tuning.errors import HEAD_ACTIONS, Action

TICKS = 16
"""Ticks of a key step that runs both lanes, in the dynamic programme's budgets."""
WORTH = 0.9
"""A step that costs more than this share of a full one is not worth inheriting for."""
FIRST_ALTERNATE = 3
"""The key step from which on every second one forecasts guidance: a line needs two before."""


@dataclass(frozen=True)
class Regime:
    """One kind of plan.

    Attributes:
        actions: what steps between key steps may do, and their cost in ticks.
        key: ticks of a key step, on average.
        alternates: whether every second key step forecasts guidance.
    """

    actions: Mapping[Action, int]
    key: int = TICKS
    alternates: bool = False

    def dress(self, plan: Plan) -> Plan:
        """A plan of the right key steps with the regime's guidance."""
        if not self.alternates:
            return plan
        return plan.guide("forecast", at=plan.keys[FIRST_ALTERNATE::2])


def list_regimes(cost: CostModel, anatomy: Anatomy) -> list[Regime]:
    """Forecasts of the whole output first; others where they cost noticeably less than a step."""
    nothing = cost.fixed.get("none", 0.0)
    whole = cost.full_call - nothing

    def share(plan: Plan, step: int) -> float:
        call = compile_plan(plan, anatomy).calls[step]
        return (cost.predict_call(call) - nothing) / whole

    heads = dict.fromkeys(HEAD_ACTIONS, 0)
    regimes = [Regime(heads)]
    if cost.is_guided:
        half = share(Plan.full(4).guide("forecast", at=3), 3)
        if half < WORTH:
            regimes.append(Regime(heads, round(TICKS * (1 + half) / 2), alternates=True))
    cut = Action(f"up{anatomy.up_blocks - 1}.l1", "forecast")
    above = share(Plan.full(4).inherit(cut.cut, at=3, how=cut.how), 3)
    if above < WORTH:
        regimes.append(Regime({cut: max(1, round(TICKS * above))}))
    return regimes
