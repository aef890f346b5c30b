"""The registry of presets: a new one is a function and one line above it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from leansd.plans.plan import Plan


@dataclass(frozen=True)
class Preset:
    """A named way to make a plan: `build(steps=..., blocks=..., **options)`."""

    name: str
    summary: str
    build: Callable[..., Plan]


PRESETS: dict[str, Preset] = {}


def register(name: str, summary: str) -> Callable[[Callable[..., Plan]], Callable[..., Plan]]:
    """Make a function that builds plans available under a name."""

    def add(build: Callable[..., Plan]) -> Callable[..., Plan]:
        PRESETS[name] = Preset(name, summary, build)
        return build

    return add
