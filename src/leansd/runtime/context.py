"""What a pipeline says of the runs that a plan is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from leansd.anatomy.fingerprint import fingerprint_module
from leansd.anatomy.reading import read_anatomy
from leansd.plans.anatomy import Anatomy
from leansd.plans.plan import NO_NETS
from leansd.plans.resolve import PlanContext
from leansd.runtime.samplers import name_sampler


def describe_runs(
    pipe: Any,
    steps: int | None = None,
    *,
    anatomy: Anatomy | None = None,
    nets: Mapping[str, Anatomy] = NO_NETS,
    guidance: float | None = None,
    strength: float | None = None,
    log_snr: Sequence[float] = (),
) -> PlanContext:
    """The context of a pipeline's runs, for `leansd.plans.resolve.resolve_plan`.

    Args:
        steps: of the sampler; None for those of a plan file.
        anatomy: of its UNet, where it was read already.
        nets: anatomies of the other UNets that a plan may run, by name.
        guidance: the guidance scale, where it is known.
        strength: how much of its steps a run has, where it is known.
        log_snr: at every step, where the scheduler has laid them out.
    """

    @cache
    def find_unet() -> str | None:
        # Weights that wait elsewhere (sequential offloading) cannot be told from others.
        absent = any(value.is_meta for value in pipe.unet.parameters())
        return None if absent else fingerprint_module(pipe.unet)

    return PlanContext(
        steps=steps,
        sampler=name_sampler(pipe),
        scheduler=type(pipe.scheduler).__name__,
        anatomy=read_anatomy(pipe.unet) if anatomy is None else anatomy,
        nets=nets,
        guidance=guidance,
        strength=strength,
        log_snr=log_snr,
        find_unet=find_unet,
    )
