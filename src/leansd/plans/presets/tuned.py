"""The speed presets: what a user picks from who wants it faster and asks no more.

They are tuned plans where the pipeline's sampler is one that was tuned for (`tuned.json`, written
by `benchmarks/fronts.py` from the embedded model), stretched to the run's step count, and a plain
schedule elsewhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from leansd.plans import keysteps
from leansd.plans.plan import Plan, Tuned


class Speed(NamedTuple):
    """How fast a preset is meant to be."""

    speedup: float
    """How many times faster than the full run it was tuned to be, on the model it was tuned on."""
    interval: int
    """Every how many steps its plain schedule computes in full."""


SPEED_PRESETS = {
    "quality": Speed(1.5, 2),
    "balanced": Speed(2.0, 3),
    "fast": Speed(2.5, 4),
    "turbo": Speed(3.0, 6),
}
"""Slowest first."""
DEFAULT_SAMPLER = "dpm++2m"
"""Of the embedded model; where nobody says what the sampler is, presets are as tuned for it."""
_NO_SHORT_NAME = ("KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler")
NOISY = frozenset(("ddpm", "euler-a", "dpm++sde", "dpm++3m-sde", *_NO_SHORT_NAME))
"""Samplers that draw noise at every step, so that more steps lead to another picture; by the class
of diffusers where there is no short name."""
NEAREST_NOISY = "euler-a"
"""The sampler whose plans serve others of them: what those keep does not go stale."""
TUNED = Path(__file__).parent / "tuned.json"


def build_full(*, steps: int, blocks: int) -> Plan:
    return Plan.full(steps)


def build_tuned(name: str) -> Callable[..., Plan]:
    """What builds a speed preset: the tuned plan of the nearest step count, or a plain schedule."""

    def build(*, steps: int, blocks: int, sampler: str = DEFAULT_SAMPLER) -> Plan:
        own = sampler in list_tuned_samplers(name) or sampler not in NOISY
        wanted = sampler if own else NEAREST_NOISY
        tuned = [
            (abs(math.log(count / steps)), plans[name])
            for (kind, count), plans in load_tuned().items()
            if kind == wanted and name in plans
        ]
        if not tuned:
            interval = SPEED_PRESETS[name].interval
            return build_staged(steps=steps, blocks=blocks, interval=interval)
        return min(tuned, key=lambda each: each[0])[1].fit(steps)

    return build


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
    if not path.exists():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))
    return {
        (row["sampler"], row["steps"]): {
            # For any weights: what they were tuned on says nothing of where they are used.
            name: replace(Plan.from_dict(plan), tuned=Tuned(row["sampler"], unet=""))
            for name, plan in row["plans"].items()
        }
        for row in rows
    }
