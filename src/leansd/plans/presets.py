"""Named plans: the house's own, and the schedules of others written as plans.

A preset is a function from a step count (and the UNet's number of up blocks) to a plan, so it fits
itself to any run. The last up block of SD 1.x and 2.x is `up3`, that of SDXL `up2`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from leansd.errors import LeansdError
from leansd.plans import keysteps
from leansd.plans.plan import Plan


@dataclass(frozen=True)
class Preset:
    """A named way to make a plan: `build(steps=..., blocks=..., **options)`."""

    name: str
    summary: str
    build: Callable[..., Plan]


PRESETS: dict[str, Preset] = {}
HOUSE = ("quality", "balanced", "fast", "turbo")
"""The presets that a user picks from, slowest first."""


def register(name: str, summary: str) -> Callable[[Callable[..., Plan]], Callable[..., Plan]]:
    """Make a function that builds plans available under a name."""

    def add(build: Callable[..., Plan]) -> Callable[..., Plan]:
        PRESETS[name] = Preset(name, summary, build)
        return build

    return add


def preset(name: str, steps: int = 30, *, blocks: int = 4, **options: Any) -> Plan:
    """The plan of a preset for a run of `steps` steps on a UNet with `blocks` up blocks.

    Raises:
        LeansdError: there is no such preset, or it has no such option.
    """
    if name not in PRESETS:
        raise LeansdError(_describe_unknown(name))
    try:
        return PRESETS[name].build(steps=steps, blocks=blocks, **options).rename(name)
    except TypeError as error:
        if "keyword argument" not in str(error):
            raise
        raise LeansdError(f"preset {name}: {str(error).split('() ', 1)[-1]}") from None


def look_up(source: Plan | str | Path) -> Plan | Preset:
    """What a user means by a plan: a plan itself, the name of a preset, or the path of a plan file.

    Raises:
        LeansdError: there is no such preset or file, or the file is not a plan.
    """
    if isinstance(source, Plan):
        return source
    name = str(source)
    if name in PRESETS:
        return PRESETS[name]
    if Path(name).is_file():
        return Plan.load(name)
    if Path(name).suffix or "/" in name:
        raise LeansdError(f"no plan file at {name}")
    raise LeansdError(_describe_unknown(name))


def build_for(source: Plan | Preset, steps: int, blocks: int) -> Plan:
    """The plan for a run of `steps` steps: a preset fits itself, a plan must have as many rows.

    Raises:
        LeansdError: the plan is for another number of steps.
    """
    if isinstance(source, Preset):
        return source.build(steps=steps, blocks=blocks).rename(source.name)
    if source.steps != steps:
        raise LeansdError(
            f"plan {source.name} is for {source.steps} steps, this run has {steps}; "
            f"use plan.fit({steps}), or run {source.steps} steps"
        )
    return source


def resolve(source: Plan | str | Path, steps: int, *, blocks: int = 4) -> Plan:
    """`look_up` and `build_for` in one."""
    return build_for(look_up(source), steps, blocks)


def _describe_unknown(name: str) -> str:
    near = get_close_matches(name, PRESETS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"no preset {name!r}{hint} (there are {', '.join(PRESETS)})"


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


@register("deepcache", "DeepCache's uniform 1:N schedule (options interval, branch)")
def build_deepcache(*, steps: int, blocks: int, interval: int = 3, branch: int = 0) -> Plan:
    """DeepCache (arXiv 2312.00858), as its published helper does it.

    Branch `b` reaches `b // 3` blocks down and `b % 3` layers into that block; what comes back up
    through the mirrored place is reused.
    """
    depth, layer = divmod(branch, 3)
    if not 0 <= branch < 3 * blocks:
        raise LeansdError(
            f"branch {branch} does not exist: {blocks} blocks have branches 0 to {3 * blocks - 1}"
        )
    if layer < 2:
        cut = f"up{blocks - 1 - depth}.l{1 - layer}"
    else:
        cut = f"up{blocks - 2 - depth}" if depth < blocks - 1 else "mid"
    return Plan.every(interval, cut=cut, steps=steps)
