"""Named plans: the house's own, and the schedules of others written as plans.

A preset is a function from a step count (and the UNet's number of up blocks) to a plan, so it fits
itself to any run. The last up block of SD 1.x and 2.x is `up3`, that of SDXL `up2`.
"""

from __future__ import annotations

from typing import Any

from leansd.errors import LeansdError
from leansd.plans import (  # noqa: F401
    house,  # pyright: ignore[reportUnusedImport]
    rivals,  # pyright: ignore[reportUnusedImport]
    switching,  # pyright: ignore[reportUnusedImport]
)
from leansd.plans.house import DEFAULT_SAMPLER, HOUSE
from leansd.plans.plan import Plan
from leansd.plans.registry import PRESETS, Preset
from leansd.text import suggest_name

__all__ = ["HOUSE", "PRESETS", "Preset", "preset"]


def preset(
    name: str, steps: int = 30, *, blocks: int = 4, sampler: str = DEFAULT_SAMPLER, **options: Any
) -> Plan:
    """The plan of a preset for a run of `steps` steps on a UNet with `blocks` up blocks.

    Args:
        sampler: short name of the pipeline's sampler, that of the embedded model by default.
            `quality`, `balanced`, `fast` and `turbo` are tuned for `ddim`, `euler` and `dpm++2m`,
            and a plain schedule for others. Given by name to `inherit`, a preset finds out itself
            what the sampler is.

    Raises:
        LeansdError: there is no such preset, or it has no such option.
    """
    if name not in PRESETS:
        raise LeansdError(f"no preset {name!r}{suggest_name(name, PRESETS)}")
    try:
        return PRESETS[name].build_for(steps, blocks, sampler, **options)
    except TypeError as error:
        if "keyword argument" not in str(error):
            raise
        raise LeansdError(f"preset {name}: {str(error).split('() ', 1)[-1]}") from None
