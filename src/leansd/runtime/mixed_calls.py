"""Mixed outputs in a pipeline: where they can be, and how its own guidance comes to give them."""

from __future__ import annotations

from typing import Any

import torch

from leansd.core.outputs import Guided, OutputHistory, guide, make_precise, solve_rest
from leansd.errors import LeansdError
from leansd.plans.anatomy import HEAD, STEM, Anatomy
from leansd.plans.liveness import Program
from leansd.plans.plan import Plan
from leansd.runtime.call import UNetCall
from leansd.runtime.context import count_depth, find_calling_pipeline
from leansd.runtime.guidance import find_scale, guides
from leansd.runtime.hooks import patch_method
from leansd.runtime.watch import read_version


def begin_mixing(
    plan: Plan, program: Program, pipe: Any, latents: torch.Tensor, *, apart: bool
) -> OutputHistory:
    """The history of a run that begins with these `latents` [B, C, H, W] of a whole batch.

    Args:
        apart: whether the lanes are called apart, so that these are of one.
    """
    halves = program.calls[0].lanes == ("rest", "cond")
    if not halves and guides(pipe):
        raise refuse(plan, "which rows of the batch are whose is not known")
    if not halves and any(call.mix and any(call.mix.difference) for call in program.calls):
        raise refuse(plan, "it tells the guidance lanes apart, and this run has no guidance")
    return OutputHistory(latents.chunk(2)[1] if halves and not apart else latents)


def require_mixable(plan: Plan, pipe: Any, anatomy: Anatomy, index: int) -> None:
    """Refuse a run in which what the scheduler sees is not linear in the outputs since its start.

    Raises:
        LeansdError: it is not; the message says why.
    """
    if index:
        raise refuse(plan, f"the run begins at step {index}")
    if any(getattr(each, "guidance_rescale", 0) for each in (pipe, getattr(pipe, "guider", None))):
        raise refuse(plan, "guidance_rescale changes what guidance gives by its own spread")
    given, made = anatomy[STEM].channels[0], anatomy[HEAD].channels[1]
    if given == made and any("Inpaint" in kind.__name__ for kind in type(pipe).__mro__):
        raise refuse(plan, "inpainting without channels of a mask changes latents between steps")
    config = pipe.scheduler.config
    if str(config.get("variance_type", "")).startswith("learned"):
        raise refuse(plan, "the UNet gives a variance beside its output")
    if config.get("thresholding") or config.get("clip_sample"):
        raise refuse(plan, "the scheduler clips what it predicts")


def refuse(plan: Plan, why: str) -> LeansdError:
    return LeansdError(
        f"plan {plan.name} mixes the outputs of all steps, which cannot be followed here: {why}; "
        "use a plan without mixes"
    )


def mix_output(pipe: Any, step: UNetCall, noise: torch.Tensor) -> torch.Tensor:
    """The UNet's output [B, C, H, W] for the whole batch, mixed where the plan says so.

    Both halves are the mixed output, so that guidance of any scale gives just that. Of two calls
    apart the conditional one comes first, when the other half is not known; so the unconditional
    one is what leads to it.
    """
    history = step.branch.outputs
    if history is None or step.skips_unet:
        return noise
    if step.apart == "cond":
        history.held = noise.detach().clone()
        return noise
    scale, cond = find_scale(pipe), history.held
    if step.apart is not None:
        assert cond is not None
        history.note(guide(make_precise(noise), make_precise(cond), scale))
    elif len(step.call.lanes) == 2 or step.call.is_half:
        rest, own = make_precise(noise).chunk(2)
        history.note(guide(rest, own, scale))
    else:
        history.note(Guided(make_precise(noise), None))
    if step.call.mix is None:
        return noise
    mixed = history.mix(step.call.mix)
    if step.apart is not None:
        assert cond is not None
        return solve_rest(mixed, cond, scale).to(noise.dtype)
    return torch.cat([mixed] * (len(noise) // len(mixed))).to(noise.dtype)


class LatentsWatch:
    """Sees to it that the latents of one step are what the scheduler made at the step before.

    Callbacks may change them, and some pipelines do; then nothing that is a sum since the start of
    a run holds. It is put on the scheduler for the length of
    a run; what others do with the scheduler meanwhile, a preview in a callback, is no step of it.
    """

    def __init__(self, plan: Plan, pipe: Any) -> None:
        self._plan, self._pipe = plan, pipe
        self._caller = self._find_caller()
        self._last: torch.Tensor | None = None
        self._version = 0
        self._hook = patch_method(pipe.scheduler, "step", self._around)

    def release(self) -> None:
        """Take it off. A second release does nothing."""
        self._last = None
        self._hook.release()

    def _around(self, _: str, own: Any, *args: Any, **kwargs: Any) -> Any:
        if self._find_caller() != self._caller:
            return own(*args, **kwargs)
        sample = args[2] if len(args) > 2 else kwargs.get("sample")
        if self._last is not None and not self._is_last(sample):
            self.release()
            raise refuse(
                self._plan,
                "the latents were changed between steps, as by a callback or a mask",
            )
        result = own(*args, **kwargs)
        last = result[0]
        self._last, self._version = last, read_version(last)
        return result

    def _find_caller(self) -> tuple[int, int]:
        return id(find_calling_pipeline()), count_depth(self._pipe)

    def _is_last(self, sample: Any) -> bool:
        last = self._last
        if sample is last and read_version(last) == self._version:
            return True
        # Another tensor with the same values will do; the device is waited for only here.
        if sample is last or not isinstance(sample, torch.Tensor) or last is None:
            return False
        return sample.shape == last.shape and torch.equal(sample.to(last.dtype), last)
