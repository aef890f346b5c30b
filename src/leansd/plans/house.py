"""The house presets: what a user picks from who wants it faster and asks no more."""

from __future__ import annotations

from leansd.plans import keysteps
from leansd.plans.plan import Plan
from leansd.plans.registry import register

HOUSE = ("quality", "balanced", "fast", "turbo")
"""Slowest first."""


@register("full", "every unit at every step; bit-equal to no plan")
def build_full(*, steps: int, blocks: int) -> Plan:
    return Plan.full(steps)


@register("quality", "two steps in full, then every 2nd; forecast between")
def build_quality(*, steps: int, blocks: int) -> Plan:
    return _build_staged(steps, blocks, interval=2)


@register("balanced", "two steps in full, then every 3rd; forecast between")
def build_balanced(*, steps: int, blocks: int) -> Plan:
    return _build_staged(steps, blocks, interval=3)


@register("fast", "two steps in full, then every 4th; forecast between")
def build_fast(*, steps: int, blocks: int) -> Plan:
    return _build_staged(steps, blocks, interval=4)


@register("turbo", "two steps in full, then every 6th; forecast between")
def build_turbo(*, steps: int, blocks: int) -> Plan:
    return _build_staged(steps, blocks, interval=6)


def _build_staged(steps: int, blocks: int, interval: int) -> Plan:
    """Everything up to the last layer is forecast; a line needs the two steps at the start."""
    keys = keysteps.staged(steps, {0: 1, 2: interval})
    return Plan.between(keys, cut=f"up{blocks - 1}.l1", steps=steps, how="forecast")
