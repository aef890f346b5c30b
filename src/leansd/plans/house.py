"""The house presets: what a user picks from who wants it faster and asks no more."""

from __future__ import annotations

from functools import partial

from leansd.plans import keysteps
from leansd.plans.plan import Plan
from leansd.plans.registry import register

INTERVALS = {"quality": 2, "balanced": 3, "fast": 4, "turbo": 6}
HOUSE = tuple(INTERVALS)
"""Slowest first."""


@register("full", "every unit at every step; bit-equal to no plan")
def build_full(*, steps: int, blocks: int) -> Plan:
    return Plan.full(steps)


def build_staged(*, steps: int, blocks: int, interval: int) -> Plan:
    """Everything up to the last layer is forecast; a line needs the two steps at the start."""
    keys = keysteps.staged(steps, {0: 1, 2: interval})
    return Plan.between(keys, cut=f"up{blocks - 1}.l1", steps=steps, how="forecast")


for _name, _interval in INTERVALS.items():
    _summary = f"two steps in full, then one in {_interval}; forecast between"
    register(_name, _summary)(partial(build_staged, interval=_interval))
