"""Named plans: the house's own, and the schedules of others written as plans.

A preset is a function from a step count (and the UNet's number of up blocks) to a plan, so it fits
itself to any run. The last up block of SD 1.x and 2.x is `up3`, that of SDXL `up2`.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from leansd.errors import LeansdError
from leansd.plans import (  # noqa: F401
    house,  # pyright: ignore[reportUnusedImport]
    rivals,  # pyright: ignore[reportUnusedImport]
    switching,  # pyright: ignore[reportUnusedImport]
)
from leansd.plans.house import HOUSE
from leansd.plans.plan import Plan
from leansd.plans.registry import PRESETS, Preset

__all__ = [
    "FEW_STEPS",
    "HOUSE",
    "PRESETS",
    "Preset",
    "build_for",
    "look_up",
    "preset",
    "resolve",
    "suits",
]

FEW_STEPS = 8
"""Runs of few-step models (LCM, Turbo, Lightning) have no more than these."""


def preset(
    name: str, steps: int = 30, *, blocks: int = 4, sampler: str = "", **options: Any
) -> Plan:
    """The plan of a preset for a run of `steps` steps on a UNet with `blocks` up blocks.

    Args:
        sampler: short name of the pipeline's sampler, such as `dpm++2m`; house presets are tuned
            for some. Given by name to `inherit`, a preset finds it out itself.

    Raises:
        LeansdError: there is no such preset, or it has no such option.
    """
    if name not in PRESETS:
        raise LeansdError(_describe_unknown(name))
    try:
        return PRESETS[name].build_for(steps, blocks, sampler, **options)
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


def build_for(source: Plan | Preset, steps: int, blocks: int, sampler: str = "") -> Plan:
    """The plan for a run of `steps` steps: a preset fits itself, a plan must have as many rows.

    Raises:
        LeansdError: the plan is for another number of steps.
    """
    if isinstance(source, Preset):
        return source.build_for(steps, blocks, sampler)
    if source.steps != steps:
        raise LeansdError(
            f"plan {source.name} is for {source.steps} steps, this run has {steps}; "
            f"use plan.fit({steps}), or run {source.steps} steps"
        )
    return source


def suits(source: Plan | Preset, steps: int) -> bool:
    """Whether a run is long enough for a preset: few steps change too much each to inherit.

    A plan itself is followed always, and the preset `full` inherits nothing.
    """
    return isinstance(source, Plan) or source.name == "full" or steps > FEW_STEPS


def resolve(source: Plan | str | Path, steps: int, *, blocks: int = 4, sampler: str = "") -> Plan:
    """`look_up` and `build_for` in one."""
    return build_for(look_up(source), steps, blocks, sampler)


def _describe_unknown(name: str) -> str:
    near = get_close_matches(name, PRESETS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"no preset {name!r}{hint} (there are {', '.join(PRESETS)})"
