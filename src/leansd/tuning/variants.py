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

from leansd.evaluation.cost import CostModel
from leansd.plans.anatomy import Anatomy
from leansd.plans.compile import compile_plan
from leansd.plans.liveness import Net
from leansd.plans.plan import Plan
from leansd.plans.row import OWN, Attend, Gates, Guidance
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

    @property
    def forecasts(self) -> bool:
        """Whether it forecasts something by its last two values."""
        return self.guidance == "forecast"

    def leave_out(self) -> Variant:
        """The same without what it forecasts: how wrong that is depends on no other key step."""
        return replace(self, guidance="drop") if self.forecasts else self


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

    The run goes on with the full run's outputs, so all calls are on its latents. What the variant
    forecasts is left out; the first call of a run cannot do without it, and is taken to be as
    wrong as the second.
    """
    plan, start = Plan.full(calibration.steps), calibration.steps - calibration.count
    for step in range(start + variant.forecasts, calibration.steps):
        plan = variant.leave_out().dress(plan, step)
    wrong = [[torch.zeros_like(seen.output) for seen in run] for run in calibration.runs]

    def steer(run: int, index: int, seen: Seen, step: Step) -> torch.Tensor:
        full = calibration.runs[run][index].output
        wrong[run][index] = seen.output - full
        return full

    with tap(bench.pipe.scheduler, steer):
        bench.run(calibration.steps, plan)
    for run in wrong if variant.forecasts else ():
        run[0] = run[min(1, len(run) - 1)]
    joined = torch.cat([torch.stack(each).flatten(1) for each in wrong], dim=1)
    return joined.double().cpu().numpy()
