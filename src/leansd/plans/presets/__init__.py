"""Presets: plans by name, which fit themselves to the steps, the UNet and the sampler of a run.

A preset is a function that builds a plan from `steps`, `blocks` (the UNet's number of up blocks: 4
in SD 1.x and 2.x, 3 in SDXL) and options of its own; where the plan depends on the sampler, it
takes `sampler`, too. `PRESETS` is the whole table: a new one is a function and one entry.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from leansd.errors import LeansdError
from leansd.plans.plan import Plan
from leansd.plans.presets import published, tuned
from leansd.plans.presets.tuned import DEFAULT_SAMPLER, SPEED_PRESETS
from leansd.text import explain_validation, refuse_unknown, suggest_name

__all__ = ["DEFAULT_SAMPLER", "PRESETS", "SPEED_PRESETS", "Preset", "preset"]


@dataclass(frozen=True)
class Preset:
    """A named way to make a plan."""

    name: str
    summary: str
    build: Callable[..., Plan]

    @cached_property
    def _takes(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.build).parameters)

    @property
    def by_sampler(self) -> bool:
        """Whether the plan depends on the pipeline's sampler."""
        return "sampler" in self._takes

    @property
    def options(self) -> tuple[str, ...]:
        """What can be chosen besides."""
        return tuple(sorted(self._takes - {"steps", "blocks", "sampler"}))

    def build_for(self, steps: int, blocks: int, sampler: str, **options: Any) -> Plan:
        """The plan for a run, by the preset's name.

        Raises:
            LeansdError: there is no such option, or its value means nothing.
        """
        refuse_unknown(f"preset {self.name}", options, self.options)
        given = {"sampler": sampler, **options} if self.by_sampler else options
        if not options:
            return self.build(steps=steps, blocks=blocks, **given).rename(self.name)
        # Few give options, and it takes as long to import as all plans.
        from pydantic import ValidationError, validate_call

        try:
            return validate_call(self.build)(steps=steps, blocks=blocks, **given).rename(self.name)
        except ValidationError as error:
            raise LeansdError(f"preset {self.name}: {explain_validation(error)}") from None


_PUBLISHED: dict[Callable[..., Plan], str] = {
    published.build_deepcache: "DeepCache's uniform 1:N schedule (in Python: interval, branch)",
    published.build_deepcache_power: (
        "DeepCache's non-uniform schedule, with its sign kept (in Python: centre, power)"
    ),
    published.build_deepcache_exact: (
        "DeepCache's paper-era non-uniform schedule as its code computes it"
    ),
    published.build_encoder: "Faster-Diffusion's encoder propagation (in Python: keys)",
    published.build_tgate: (
        "T-GATE: cross-attention inherits from a gate on, guidance may drop there"
    ),
    published.build_pab: "Pyramid Attention Broadcast (in Python: spatial, cross, start, stop)",
    published.build_guidance_cutoff: "no guidance in the last part of the run (in Python: share)",
    published.build_spectrum: (
        "Spectrum's forecast by Chebyshev polynomials (in Python: window, growth, warm_up, how)"
    ),
    published.build_easycache: (
        "EasyCache's whole-step reuse by predicted change (in Python: threshold, warm_up)"
    ),
    published.build_light_early: (
        "a light net at first, the pipeline's own late (in Python: share, net)"
    ),
    published.build_light_late: (
        "the pipeline's own at first, a light net late (in Python: share, net)"
    ),
    published.build_stitch: "T-Stitch's shares, the smallest net first (in Python: nets, shares)",
    published.build_tstitch_exact: (
        "T-Stitch's share as its code counts it, a step more (in Python: share, net)"
    ),
    published.build_turns: "a net for every step, as OMS-DPM lists them (in Python: names)",
}
"""By what builds them, `build_NAME`: their summaries."""
_SPEED = "about {:g}x where it is tuned for the sampler"

PRESETS: dict[str, Preset] = {
    each.name: each
    for each in (
        Preset("full", "every unit at every step; bit-equal to no plan", tuned.build_full),
        *(
            Preset(name, _SPEED.format(speed.speedup), tuned.build_tuned(name))
            for name, speed in SPEED_PRESETS.items()
        ),
        *(
            Preset(build.__name__.removeprefix("build_").replace("_", "-"), summary, build)
            for build, summary in _PUBLISHED.items()
        ),
    )
}


def preset(
    name: str, steps: int = 30, *, blocks: int = 4, sampler: str = DEFAULT_SAMPLER, **options: Any
) -> Plan:
    """The plan of a preset for a run of `steps` steps on a UNet with `blocks` up blocks.

    Args:
        sampler: short name of the pipeline's sampler, that of the embedded model by default.
            `quality`, `balanced`, `fast` and `turbo` are tuned for `dpm++2m`, `dpm++2m-karras`,
            `ddim`, `euler`, `unipc`, `euler-a` and `dpm++sde`, as for `euler-a` with others that
            add noise, and else a plain schedule. Given by name to `inherit`, a preset finds out
            itself what the sampler is.

    Raises:
        LeansdError: there is no such preset, or it has no such option.
    """
    if name not in PRESETS:
        raise LeansdError(f"no preset {name!r}{suggest_name(name, PRESETS)}")
    return PRESETS[name].build_for(steps, blocks, sampler, **options)
