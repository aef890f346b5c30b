"""UNet calls of real runs, kept, and how far another UNet's output of the same calls is off.

The error is that of the guided output: it is what the scheduler steps with, and guidance multiplies
what a cut does to the difference of the two halves. A call's squared error is taken over the
squared output, so that every time step counts alike, and the calls' mean is the error of a cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from leansd.core.mixing import guide
from leansd.core.transfer import make_exact
from leansd.errors import LeansdError
from leansd.evaluation.runs import PipelineCall, run_calls
from leansd.runtime.cache import map_rows
from leansd.runtime.clock import SchedulerClock
from leansd.runtime.engine import list_followers
from leansd.runtime.guidance import is_guided
from leansd.runtime.hooks import ForwardHooks


@dataclass(frozen=True)
class KeptCall:
    """One UNet call with what came out."""

    step: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    guidance: float | None
    """The scale, of a batch of unconditional and conditional halves; None of any other."""
    output: Tensor
    """The guided output [B, C, H, W]."""


def keep_calls(
    pipe: Any,
    calls: Sequence[PipelineCall],
    steps: int,
    *,
    moments: int = 6,
    seed: int = 0,
    batch: int = 8,
    settings: Mapping[str, Any] | None = None,
    on_step: Callable[[int, int, int], None] | None = None,
) -> list[KeptCall]:
    """Run a pipeline in full and keep its UNet calls at `moments` steps, evenly spread.

    Raises:
        LeansdError: the pipeline follows a plan, or gives NaN or Inf.
    """
    if list_followers(pipe.unet):
        raise LeansdError(
            "release the plan that the UNet follows first: a cut is of the whole UNet"
        )
    if moments < 1:
        raise LeansdError(f"{moments} moments: at least 1 is needed")
    clock = SchedulerClock(pipe)
    kept: list[KeptCall] = []
    start = 0

    def around(_: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal start
        tick = clock.locate(args[1] if len(args) > 1 else kwargs["timestep"])
        output = forward(*args, **kwargs)
        if tick is None:
            return output
        if tick.starts:  # image-to-image leaves the first steps out
            start = tick.index
        if tick.index - start in _spread(len(tick.schedule.rows) - start, moments):
            noise = output[0].detach()
            scale = float(pipe.guidance_scale) if is_guided(pipe, len(noise)) else None
            taken, named = map_rows((args, kwargs), len(noise), lambda each: each.detach().clone())
            kept.append(KeptCall(tick.index, taken, named, scale, guide_batch(noise, scale)))
        return output

    with ForwardHooks({"unet": pipe.unet}, around):
        run_calls(
            pipe, calls, steps, seed=seed, batch=batch, settings=settings, on_step=on_step
        ).require_finite()
    if not kept:
        raise LeansdError(
            "no UNet call belonged to a step of the scheduler: cuts are measured on pipelines that "
            "call their UNet at every time step"
        )
    return kept


@torch.no_grad()
def measure_error(unet: UNet2DConditionModel, kept: Sequence[KeptCall]) -> float:
    """The mean over calls of the squared error of a UNet's guided output, over the output's own."""
    # Read at once, when all calls are under way.
    errors: list[float] = torch.stack([_measure_one(unet, call) for call in kept]).tolist()
    return sum(errors) / len(kept)


def guide_batch(noise: Tensor, scale: float | None) -> Tensor:
    """The guided output [B/2, C, H, W] of a whole batch [B, C, H, W]; the same without guidance."""
    if scale is None:
        return noise.clone()
    rest, cond = noise.chunk(2)
    return guide(rest, cond, scale).output


def _measure_one(unet: UNet2DConditionModel, call: KeptCall) -> Tensor:
    output = make_exact(guide_batch(unet(*call.args, **call.kwargs)[0], call.guidance))
    true = make_exact(call.output)
    return (output - true).square().sum() / true.square().sum()


def _spread(count: int, moments: int) -> set[int]:
    """`moments` of `count` steps, each in the middle of its segment."""
    return {int((place + 0.5) * count / moments) for place in range(moments)}
