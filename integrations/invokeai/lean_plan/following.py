"""Plans in InvokeAI's two ways to denoise; nothing of InvokeAI is imported here.

The usual one is a pipeline of diffusers with a loop of its own. The modular one is a loop around a
bare UNet, whose context says what is called: at which step, and for which of the conditionings, in
one batch or (sequential guidance) one after the other. There plans of whole steps are followed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from leansd.core import Player
from leansd.errors import LeansdError
from leansd.hosting import HostedRun
from leansd.plans.anatomy import WHOLE
from leansd.plans.plan import Plan
from leansd.plans.resolve import PlanContext, resolve_plan
from leansd.runtime.arguments import UNetArguments
from leansd.runtime.clock import CallPosition, SchedulerClock
from leansd.runtime.guidance import wrap_output
from leansd.runtime.hooks import PLAIN, patch_method
from leansd.runtime.samplers import name_sampler

LOG = logging.getLogger("InvokeAI")
LANES = {"negative": ("rest",), "positive": ("cond",), "both": ("rest", "cond")}
"""Conditionings of a call, in the order of its batch, by the mode that the context says."""
RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)
"""What ControlNets and T2I-Adapters add, at some steps."""


def follow_pipeline(pipe: Any, source: str, steps: int) -> None:
    """Let the denoising of InvokeAI's pipeline follow a plan; it is made for that one."""
    pipe.latents_from_embeddings = partial(
        _denoise, pipe, pipe.latents_from_embeddings, source, steps
    )


def _denoise(pipe: Any, own: Any, source: str, steps: int, *args: Any, **named: Any) -> Any:
    del pipe.latents_from_embeddings
    run = HostedRun(pipe, source, steps)
    try:
        return own(*args, **named)
    finally:
        LOG.info("Lean Plan: %s", run.close())


def find_start(context: Any) -> CallPosition:
    """Where a denoising begins in its sampler's run.

    Raises:
        LeansdError: it has no step, or none of its scheduler's.
    """
    timesteps = context.inputs.timesteps
    # A clock asks for a scheduler, and the context has one as a pipeline has.
    position = SchedulerClock(context).peek(timesteps[0]) if len(timesteps) else None
    if position is None:
        raise LeansdError("no step of the run is one of its scheduler's")
    return position


def describe_run(context: Any, start: CallPosition) -> PlanContext:
    """What a plan is to be for."""
    schedule, guidance = start.schedule, context.inputs.conditioning_data.guidance_scale
    return PlanContext(
        schedule.steps,
        name_sampler(context),
        type(context.scheduler).__name__,
        anatomy=WHOLE,
        guidance=None if isinstance(guidance, list) else guidance,
        strength=1 - schedule.rows[start.index] / schedule.steps,
        log_snr=schedule.log_snr if len(schedule.log_snr) == schedule.steps else (),
    )


class DenoisingRun:
    """One modular denoising under a plan."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.reason = "the run has not said what its steps are"
        """Why everything is computed, in words; empty where a plan is followed."""
        self.plan: Plan | None = None
        self._player: Player | None = None
        self._first = 0
        """The call of the sampler's run that this one begins with: one from a picture is later."""
        self._context: Any = None

    def begin(self, context: Any) -> None:
        """Make the plan for the steps that InvokeAI's `DenoiseContext` has laid out."""
        self._context = context
        try:
            position = find_start(context)
            resolved = resolve_plan(self.source, describe_run(context, position))
        except LeansdError as error:
            self.reason = str(error)
            return
        for note in resolved.notes:
            LOG.warning("Lean Plan: %s", note)
        self.plan, self.reason = resolved.plan, ""
        self._player, self._first = Player(resolved.plan, position.schedule), position.index

    @contextmanager
    def follow(self, unet: Any) -> Iterator[None]:
        """Around the UNet, as long as it denoises."""
        hook = patch_method(unet, PLAIN, self._run_unet)
        try:
            yield
        finally:
            hook.release()
            name = self.source if self.plan is None else self.plan.name
            LOG.info("Lean Plan: %s: %s", name, self._close())

    def _run_unet(self, _: str, forward: Any, *args: Any, **named: Any) -> Any:
        context, player, arguments = self._context, self._player, UNetArguments.bind(args, named)
        mode = getattr(context, "conditioning_mode", "")
        lanes = LANES.get(getattr(mode, "value", str(mode)))
        if player is None or lanes is None:
            return forward(*args, **named)
        computed: list[Any] = []

        def compute() -> torch.Tensor:
            computed.append(forward(*args, **named))
            return computed[0][0]

        # Where a ControlNet comes or goes, what was before says nothing of what is to come.
        added = tuple(each for each in RESIDUALS if arguments.named.get(each) is not None)
        keys = [(lane, added) for lane in lanes]
        noise = player.play(self._first + context.step_index, arguments.sample, compute, keys)
        if computed and computed[0][0] is noise:
            return computed[0]
        return wrap_output(noise, arguments)

    def _close(self) -> str:
        player, self._player, self._context = self._player, None, None
        if player is None:
            return f"computed in full, because {self.reason}"
        player.clear()
        return player.describe()
