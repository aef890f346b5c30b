"""Candidates: plans that the search proposes, and what lies beside them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from leansd.plans.plan import Plan
from leansd.tuning.dynamic import MEMORY, Proposal, Stretch
from leansd.tuning.errors import ErrorModel
from leansd.tuning.refinement import list_neighbours
from leansd.tuning.regimes import Regime
from leansd.tuning.trials import build_plan
from leansd.tuning.variants import allows


@dataclass(frozen=True)
class Candidate:
    """A plan to try, as the search found it."""

    proposal: Proposal
    model: ErrorModel
    regime: Regime
    lag: float
    """Squared error of the full run of its step count against that of all steps."""

    @property
    def error(self) -> float:
        """What the model expects of it."""
        return self.proposal.error + self.lag

    def build(self) -> Plan:
        calibration = self.model.calibration
        plan = build_plan(self.proposal, calibration)
        start = calibration.steps - calibration.count
        for key in self.proposal.keys:
            plan = self.regime.variants[key.variant].dress(plan, start + key.step)
        return plan

    def list_neighbours(self) -> list[Candidate]:
        count = self.model.calibration.count
        found = list_neighbours(self.proposal, count, self.regime.actions)
        moved = (self._move(stretches) for stretches in found)
        return [each for each in moved if np.isfinite(each.error)]

    def _move(self, stretches: tuple[Stretch, ...]) -> Candidate:
        error, keys = 0.0, ()
        for stretch in stretches:
            keys = (*keys, stretch.key)[-MEMORY:]
            if not allows(self.regime.variants, keys):
                error = float("inf")
                break
            error += self.model.judge(keys, stretch.end, stretch.action).error
        return replace(self, proposal=Proposal(stretches, error, self.proposal.ticks))
