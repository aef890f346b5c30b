"""What a pipeline says of the runs that a plan is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from torch import nn

from leansd.anatomy.counting import dissect
from leansd.anatomy.reading import fingerprint_module, read_anatomy
from leansd.plans.anatomy import WHOLE, Anatomy
from leansd.plans.plan import NO_NETS
from leansd.plans.resolve import PlanContext
from leansd.runtime.samplers import name_sampler


def find_transformer(target: Any) -> nn.Module | None:
    """The transformer that denoises for a pipeline; None where it has none, or a UNet."""
    if isinstance(target, nn.Module) or getattr(target, "unet", None) is not None:
        return None
    found = getattr(target, "transformer", None)
    return found if isinstance(found, nn.Module) and hasattr(target, "scheduler") else None


def dissect_denoiser(pipe: Any, name: str = "UNet") -> Anatomy:
    """What denoises for a pipeline, with its cost; of a transformer only that it is one."""
    return dissect(pipe.unet, name=name) if find_transformer(pipe) is None else WHOLE


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
        anatomy: of what denoises, where it was read already.
        nets: anatomies of the other UNets that a plan may run, by name.
        guidance: the guidance scale, where it is known.
        strength: how much of its steps a run has, where it is known.
        log_snr: at every step, where the scheduler has laid them out.
    """

    transformer = find_transformer(pipe)
    denoiser: Any = pipe.unet if transformer is None else transformer
    if anatomy is None:
        anatomy = WHOLE if transformer is not None else read_anatomy(denoiser)

    @cache
    def find_unet() -> str | None:
        # Weights that wait elsewhere (sequential offloading) cannot be told from others.
        absent = any(value.is_meta for value in denoiser.parameters())
        return None if absent else fingerprint_module(denoiser)

    return PlanContext(
        steps=steps,
        sampler=name_sampler(pipe),
        scheduler=type(pipe.scheduler).__name__,
        anatomy=anatomy,
        nets=nets,
        guidance=guidance,
        strength=strength,
        log_snr=log_snr,
        find_unet=find_unet,
    )
