"""The house presets: what a user picks from who wants it faster and asks no more.

They are tuned plans where the pipeline's sampler is one that was tuned for (`tuned.json`, written
by `benchmarks/fronts.py` from the embedded model), stretched to the run's step count, and a staged
schedule elsewhere.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from leansd.plans import keysteps
from leansd.plans.plan import Plan, Tuned
from leansd.plans.registry import register

SPEEDS = {"quality": 1.5, "balanced": 2.0, "fast": 2.5, "turbo": 3.0}
"""How many times faster than the full run a tuned preset is, on the model it was tuned on."""
INTERVALS = {"quality": 2, "balanced": 3, "fast": 4, "turbo": 6}
"""Every how many steps a staged one computes in full."""
HOUSE = tuple(SPEEDS)
"""Slowest first."""
DEFAULT_SAMPLER = "dpm++2m"
"""Of the embedded model; where nobody says what the sampler is, presets are as tuned for it."""
TUNED = Path(__file__).parent / "tuned.json"


@register("full", "every unit at every step; bit-equal to no plan")
def build_full(*, steps: int, blocks: int) -> Plan:
    return Plan.full(steps)


def build_house(*, steps: int, blocks: int, sampler: str = DEFAULT_SAMPLER, name: str) -> Plan:
    """The tuned plan for the sampler, from the nearest step count, or the staged one."""
    tuned = [
        (abs(math.log(count / steps)), plans[name])
        for (kind, count), plans in load_tuned().items()
        if kind == sampler and name in plans
    ]
    if not tuned:
        return build_staged(steps=steps, blocks=blocks, interval=INTERVALS[name])
    return min(tuned, key=lambda each: each[0])[1].fit(steps)


def build_staged(*, steps: int, blocks: int, interval: int) -> Plan:
    """Everything up to the last layer is forecast; a line needs the two steps at the start."""
    keys = keysteps.staged(steps, {0: 1, 2: interval})
    return Plan.between(keys, cut=f"up{blocks - 1}.l1", steps=steps, how="forecast")


def list_tuned_samplers(name: str) -> list[str]:
    """The samplers that a preset is tuned for."""
    return list(dict.fromkeys(kind for (kind, _), plans in load_tuned().items() if name in plans))


@cache
def load_tuned(path: Path = TUNED) -> dict[tuple[str, int], dict[str, Plan]]:
    """The tuned plans by sampler and step count, and by the preset's name."""
    # Here, since documents need pydantic, which takes longer to import than all else of plans.
    from leansd.plans.document import PlanDocument, make_plan

    if not path.exists():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))
    return {
        (row["sampler"], row["steps"]): {
            # For any weights: what they were tuned on says nothing of where they are used.
            name: replace(
                make_plan(PlanDocument.model_validate(plan)), tuned=Tuned(row["sampler"], unet="")
            )
            for name, plan in row["plans"].items()
        }
        for row in rows
    }


for _name, _speed in SPEEDS.items():
    _summary = f"about {_speed:g}x with DDIM, Euler or DPM-Solver++ 2M, where it is tuned"
    register(_name, _summary, by_sampler=True)(partial(build_house, name=_name))
