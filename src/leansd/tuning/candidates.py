"""Candidates: plans that the search proposes, and what lies beside them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from leansd.plans.plan import Plan
from leansd.tuning.dynamic import Proposal, Stretch
from leansd.tuning.errors import ErrorModel
from leansd.tuning.refinement import list_neighbours
from leansd.tuning.regimes import Regime
from leansd.tuning.trials import build_plan


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
        return self.regime.dress(build_plan(self.proposal, self.model.calibration))

    def list_neighbours(self) -> list[Candidate]:
        count = self.model.calibration.count
        found = list_neighbours(self.proposal, count, self.regime.actions)
        return [self._move(stretches) for stretches in found]

    def _move(self, stretches: tuple[Stretch, ...]) -> Candidate:
        error, keys = 0.0, ()
        for stretch in stretches:
            keys = (*keys, stretch.key)[-3:]
            error += self.model.judge(keys, stretch.end, stretch.action).error
        return replace(self, proposal=Proposal(stretches, error, self.proposal.ticks))
