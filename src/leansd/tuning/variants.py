"""Variants: what a key step may run in the place of the whole UNet, and how wrong that is.

Another net, self-attentions by GRI, guidance forecast: all of them are a cheaper output at a key
step that differs from the full one. By how much is measured at every call of the full run, on its
own latents; from then on the error model treats them alike, and one search decides between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from leansd.measuring.cost import CostModel
from leansd.plans.anatomy import Anatomy
from leansd.plans.gate import Attend, Gates
from leansd.plans.liveness import Net
from leansd.plans.plan import Plan
from leansd.plans.row import OWN, Guidance
from leansd.plans.tracing import compile_plan
from leansd.tuning.calibration import Calibration
from leansd.tuning.errors import Key
from leansd.tuning.taps import Seen, Step, tap
from leansd.tuning.trials import Bench

TICKS = 16
"""Ticks of a key step that runs the whole UNet, in the dynamic programme's budgets."""
WORTH = 0.9
"""A step that costs more than this share of a full one is not worth being wrong for."""
HISTORY = 2
"""Key steps that compute guidance before one that forecasts it: a line needs two."""


@dataclass(frozen=True)
class Variant:
    """What a key step runs."""

    name: str = "full"
    ticks: int = TICKS
    net: str = OWN
    guidance: Guidance = "compute"
    attend: Gates = field(default_factory=dict[str, Attend])

    def dress(self, plan: Plan, step: int) -> Plan:
        """The plan with this at one of its steps."""
        if self.net != OWN:
            plan = plan.switch(self.net, at=step)
        if self.guidance != "compute":
            plan = plan.guide(self.guidance, at=step)
        for at, by in self.attend.items():
            plan = plan.attend(at, by=by, at=step)
        return plan

    def list_passes(self, count: int) -> list[list[int]]:
        """The calls of a full run at which it is measured together.

        Forecast guidance needs computed guidance before it, so it comes at every second call.
        """
        if self.guidance == "compute":
            return [list(range(count))]
        return [list(range(HISTORY + odd, count, 2)) for odd in range(2)]


FULL = Variant()


def allows(variants: Sequence[Variant], keys: Sequence[Key]) -> bool:
    """Whether the last of some key steps may run what it runs, after those before."""
    last = variants[keys[-1].variant]
    if last.guidance == "compute":
        return True
    before = [variants[key.variant] for key in keys[:-1]][-HISTORY:]
    return len(before) == HISTORY and all(each.guidance == "compute" for each in before)


def list_variants(
    cost: CostModel, anatomy: Anatomy, nets: Mapping[str, Net], attend: Sequence[str] = ()
) -> tuple[Variant, ...]:
    """The whole UNet first; then what costs noticeably less, where its cost is known.

    Args:
        cost: which knows the nets' own costs.
        nets: those that a plan may switch to.
        attend: self-attentions that may go by GRI; their cost must have been measured so.
    """
    nothing = cost.fixed.get("none", 0.0)
    whole = cost.full_call - nothing

    def price(variant: Variant) -> Variant:
        plan = variant.dress(Plan.full(HISTORY + 2), HISTORY + 1)
        call = compile_plan(plan, anatomy, nets=nets).calls[HISTORY + 1]
        share = (cost.predict_call(replace(call, keeps={})) - nothing) / whole
        return replace(variant, ticks=max(1, round(TICKS * share)))

    found = [Variant(f"net {name}", net=name) for name in nets]
    if attend:
        gates: dict[str, Attend] = dict.fromkeys(attend, "gri")
        found.append(Variant("GRI", attend=gates))
    if cost.is_guided:
        found.append(Variant("guidance forecast", guidance="forecast"))
    return (FULL, *(each for each in map(price, found) if each.ticks < WORTH * TICKS))


def measure_deviation(variant: Variant, bench: Bench, calibration: Calibration) -> np.ndarray:
    """What a variant gives at every call of the full run minus what that gives, [n, numbers].

    The runs go on with the full run's outputs, so all calls are on its latents. Zero where the
    variant cannot run.
    """
    count, start = calibration.count, calibration.steps - calibration.count
    wrong = [torch.zeros_like(each) for each in _stack(calibration)]
    for calls in variant.list_passes(count):
        plan = Plan.full(calibration.steps)
        for call in calls:
            plan = variant.dress(plan, start + call)

        def steer(
            run: int, index: int, seen: Seen, step: Step, calls: Sequence[int] = calls
        ) -> torch.Tensor:
            full = calibration.runs[run][index].output
            if index in calls:
                wrong[run][index] = seen.output - full
            return full

        with tap(bench.pipe.scheduler, steer):
            bench.run(calibration.steps, plan)
    joined = torch.cat([each.flatten(1) for each in wrong], dim=1)
    return joined.double().cpu().numpy()


def _stack(calibration: Calibration) -> list[torch.Tensor]:
    """The outputs of every run of the pipeline, [n, B, C, H, W] each."""
    return [torch.stack([seen.output for seen in run]) for run in calibration.runs]
