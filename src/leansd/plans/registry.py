"""The registry of presets: a new one is a function and one line above it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from leansd.plans.plan import Plan


@dataclass(frozen=True)
class Preset:
    """A named way to make a plan: `build(steps=..., blocks=..., **options)`."""

    name: str
    summary: str
    build: Callable[..., Plan]
    by_sampler: bool = False
    """Whether the plan depends on the pipeline's sampler: `build` then takes its name, too."""

    def build_for(self, steps: int, blocks: int, sampler: str, **options: Any) -> Plan:
        """The plan for a run, by the preset's name."""
        given = {"sampler": sampler, **options} if self.by_sampler else options
        return self.build(steps=steps, blocks=blocks, **given).rename(self.name)


PRESETS: dict[str, Preset] = {}


def register(
    name: str, summary: str, *, by_sampler: bool = False
) -> Callable[[Callable[..., Plan]], Callable[..., Plan]]:
    """Make a function that builds plans available under a name."""

    def add(build: Callable[..., Plan]) -> Callable[..., Plan]:
        PRESETS[name] = Preset(name, summary, build, by_sampler)
        return build

    return add
