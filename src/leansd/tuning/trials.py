"""Trials: plans run on the calls that they are tuned on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffusers import UNet2DConditionModel

from leansd.evaluation.fidelity import psnr
from leansd.evaluation.runs import PipelineCall, RunOutputs, run_calls
from leansd.plans.plan import Plan
from leansd.tuning.calibration import Calibration
from leansd.tuning.dynamic import Proposal


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
    goals: RunOutputs | None = None
    """What the full run ends with."""
    nets: Mapping[str, UNet2DConditionModel] = field(default_factory=dict)
    """UNets that plans may switch to."""

    def run(self, steps: int, plan: Plan | None = None) -> RunOutputs:
        return run_calls(
            self.pipe, self.calls, steps, plan,
            seed=self.seed, batch=self.batch, settings=self.settings, nets=self.nets,
        )  # fmt: skip

    def score(self, finals: RunOutputs) -> float:
        """Mean over the calls, in dB."""
        assert self.goals is not None
        return float(psnr(finals.pictures, self.goals.pictures).mean())


def build_plan(proposal: Proposal, calibration: Calibration, name: str = "tuned") -> Plan:
    """A proposal as a plan for the sampler's whole step count, without corrections."""
    plan = Plan.full(calibration.steps, name=name)
    start = calibration.steps - calibration.count
    for stretch in proposal.stretches:
        between = [start + step for step in range(stretch.key.step + 1, stretch.end)]
        if between:
            plan = plan.inherit(stretch.action.cut, at=between, how=stretch.action.how)
    return plan
