"""Which pipeline makes a call, and what it says of the runs that a plan is for."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from diffusers import ConfigMixin
from torch import nn

from leansd.anatomy.counting import dissect
from leansd.anatomy.reading import fingerprint_module, read_anatomy
from leansd.plans.anatomy import WHOLE, Anatomy
from leansd.plans.resolve import PlanContext
from leansd.runtime.samplers import name_sampler

NOTHING_KNOWN = PlanContext()
INSIDE = ("torch", "leansd.runtime")
"""Modules whose frames are no pipeline's."""


def find_transformer(target: Any) -> nn.Module | None:
    """The transformer that denoises for a pipeline; None where it has none, or a UNet."""
    if isinstance(target, nn.Module) or getattr(target, "unet", None) is not None:
        return None
    found = getattr(target, "transformer", None)
    return found if isinstance(found, nn.Module) and hasattr(target, "scheduler") else None


def find_denoiser(pipe: Any) -> Any:
    """What denoises for a pipeline: its transformer, or its UNet."""
    transformer = find_transformer(pipe)
    return pipe.unet if transformer is None else transformer


def dissect_denoiser(pipe: Any, name: str = "UNet") -> Anatomy:
    """What denoises for a pipeline, with its cost; of a transformer only that it is one."""
    return dissect(pipe.unet, name=name) if find_transformer(pipe) is None else WHOLE


def describe_runs(pipe: Any, known: PlanContext = NOTHING_KNOWN) -> PlanContext:
    """What is `known` of a pipeline's runs, and what the pipeline says of them."""
    denoiser, anatomy = find_denoiser(pipe), known.anatomy
    if anatomy is None:
        anatomy = read_anatomy(denoiser) if find_transformer(pipe) is None else WHOLE

    @cache
    def find_unet() -> str | None:
        # Weights that wait elsewhere (sequential offloading) cannot be told from others.
        absent = any(value.is_meta for value in denoiser.parameters())
        return None if absent else fingerprint_module(denoiser)

    return replace(
        known,
        sampler=name_sampler(pipe),
        scheduler=type(pipe.scheduler).__name__,
        anatomy=anatomy,
        find_unet=find_unet,
    )


# -- guidance -------------------------------------------------------------------------------------


def name_guidance(pipe: Any) -> str:
    """The argument that guides calls of a pipeline.

    It is `guidance_scale`, but for Qwen-Image and its like, where that is for distilled nets alone.
    """
    known = inspect.signature(type(pipe).__call__).parameters
    usual = known.get("guidance_scale")
    has_own = "true_cfg_scale" in known and (usual is None or usual.default is None)
    return "true_cfg_scale" if has_own else "guidance_scale"


def read_scale(pipe: Any) -> float | None:
    """The guidance scale of the call of a pipeline that this thread is in: as it was given, where
    the pipeline itself does not say."""
    told = getattr(pipe, "_guidance_scale", None)
    if name_guidance(pipe) == "guidance_scale" and told is not None:
        return float(told)
    methods = _list_methods()
    calls = (given for name, owner, given in methods if name == "__call__" and owner is pipe)
    scale = next(calls, dict[str, Any]()).get(name_guidance(pipe))
    return None if scale is None else float(scale)


# -- who calls: known from the stack of a thread --------------------------------------------------


def find_calling_pipeline() -> Any | None:
    """The innermost pipeline that is being called in this thread."""
    return next((owner for _, owner, _ in _list_methods() if _is_pipeline(owner)), None)


def count_depth(pipe: Any) -> int:
    """How many calls of a pipeline lie within one another in this thread.

    They are two where a callback draws a preview by the pipeline that it was called by.
    """
    return sum(name == "__call__" and owner is pipe for name, owner, _ in _list_methods())


def _list_methods() -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """The methods that this thread is in, the innermost first, each with its object and locals."""
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        is_method = code.co_argcount > 0 and code.co_varnames[0] == "self"
        if is_method and not frame.f_globals.get("__name__", "").startswith(INSIDE):
            known = frame.f_locals
            yield code.co_name, known.get("self"), known
        frame = frame.f_back


def _is_pipeline(owner: Any) -> bool:
    """Whether an object is a pipeline of diffusers, an ordinary or a modular one."""
    is_configured = isinstance(owner, ConfigMixin) and not isinstance(owner, nn.Module)
    return is_configured and hasattr(type(owner), "components")
