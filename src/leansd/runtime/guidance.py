"""Guidance at run time: whose rows of a batch are whose, and a guided call without one half.

Ordinary pipelines put the unconditional and the conditional input of classifier-free guidance into
one batch, in this order. A call that leaves out the first half takes the second half of everything
that goes in, and makes up the missing half of what comes out, so that the pipeline does not notice.
Modular pipelines call the two apart, the conditional one first; the second of them is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from leansd.core.outputs import Guided, OutputHistory, find_method, guide, make_precise, solve_rest
from leansd.errors import LeansdError
from leansd.plans.anatomy import HEAD, STEM, Anatomy
from leansd.plans.liveness import GUIDANCE, Lane, Program
from leansd.plans.plan import Plan
from leansd.runtime.arguments import UNetArguments, map_rows
from leansd.runtime.call import UNetCall, UNetStep, keep_for_rest
from leansd.runtime.context import count_depth, find_calling_pipeline
from leansd.runtime.hooks import patch_method
from leansd.runtime.watch import read_version

LATENTS_FIRST = ("InstructPix2Pix", "SuperResolution")
"""In the names of pipelines that put a picture of as many channels behind the latents."""


def is_guided(pipe: Any, batch: int) -> bool:
    """Whether a pipeline's batch can be an unconditional and a conditional half, and nothing else.

    Perturbed-attention guidance adds a third part that its attention processors rely on; such
    batches run in full.
    """
    return guides(pipe) and batch % 2 == 0


def guides(pipe: Any) -> bool:
    """Whether a pipeline joins an unconditional and a conditional half to a batch."""
    guided = getattr(pipe, "do_classifier_free_guidance", False)
    perturbed = getattr(pipe, "do_perturbed_attention_guidance", False)
    return bool(guided) and not perturbed


def has_two_halves(pipe: Any, sample: torch.Tensor) -> bool:
    """Whether a pipeline's batch is an unconditional and a conditional half.

    Both begin as the same latents, masks and pictures. Three-way batches, as InstructPix2Pix makes,
    do not: the values are read, so this is asked only where a run starts or starts over.
    """
    if not is_guided(pipe, sample.shape[0]):
        return False
    rest, cond = sample.detach().chunk(2)
    return sample.is_meta or torch.equal(rest, cond)


def count_pictures(pipe: Any, batch: int, *, two_halves: bool) -> int:
    """How many pictures a batch holds; one of which that is not known counts as one."""
    if two_halves:
        return batch // 2
    if getattr(pipe, "do_perturbed_attention_guidance", False) or guides(pipe):
        return 1
    return batch


def find_latents(pipe: Any, anatomy: Anatomy) -> int | None:
    """How many channels of the UNet's input, from the first on, are the latents.

    A mask, a depth map or a masked picture follows them. None where there are as many channels
    again: Marigold puts a picture before its latents, InstructPix2Pix behind them.
    """
    given, made = anatomy[STEM].channels[0], anatomy[HEAD].channels[1]
    config = getattr(getattr(pipe, "scheduler", None), "config", {})
    if str(config.get("variance_type", "")).startswith("learned"):
        made //= 2  # a variance for each channel follows (DeepFloyd)
    kinds = [kind.__name__ for kind in type(pipe).__mro__]
    known = given != 2 * made or any(mark in kind for kind in kinds for mark in LATENTS_FIRST)
    return min(given, made) if known else None


def find_lane(pipe: Any) -> Lane | None:
    """The lane of the call that a pipeline is about to make, where it calls the two apart.

    The guiders of modular pipelines say so. Of those that make more than these two predictions
    (perturbed attention, skipped layers) nothing is known, and their calls run in full.
    """
    guider: Any = getattr(pipe, "guider", None)
    if getattr(guider, "_input_predictions", None) != ["pred_cond", "pred_uncond"]:
        return None
    if guider.num_conditions != 2:
        return None
    return "cond" if guider.is_conditional else "rest"


def find_scale(pipe: Any) -> float:
    """The guidance scale of the run that a pipeline is in."""
    guider: Any = getattr(pipe, "guider", None)
    if guider is None:
        return float(pipe.guidance_scale)
    # As first written, guidance goes on from the conditional output.
    return float(guider.guidance_scale) + bool(getattr(guider, "use_original_formulation", False))


def run_step(step: UNetStep, arguments: UNetArguments, forward: Callable[..., Any]) -> Any:
    """What the UNet gives, or would give, for the whole batch, with `forward` for what runs."""
    output = _run_lanes(step, arguments, forward)
    corrects = any(call.corrects for call in step.calls)
    return exchange(output, step.correct(output[0])) if corrects else output


def _run_lanes(step: UNetStep, arguments: UNetArguments, forward: Callable[..., Any]) -> Any:
    """The output of the lanes, not yet corrected."""

    def run(given: UNetArguments) -> Any:
        if step.skips_unet:
            return wrap_output(step.give(HEAD), given)
        return given.call(forward)

    if step.apart is not None:
        return _run_apart(step, arguments, run)
    if step.call.is_half:
        batch = arguments.sample.shape[0]
        half = map_rows(arguments.named, batch, lambda tensor: tensor[batch // 2 :])
        return complete(step, run(UNetArguments(half)))
    output = run(arguments)
    keep_difference(step, output[0])
    return output


def _run_apart(
    step: UNetStep, arguments: UNetArguments, run: Callable[[UNetArguments], Any]
) -> Any:
    """One of the two calls of a step: the conditional one comes first and always runs.

    The other one is left out where guidance is not computed; its output is made from the first's.
    """
    ((own, _),) = step.split(arguments.sample)
    cache, kept = own.branch.cache, keep_for_rest(own.call.index)
    if own.apart == "cond":
        output = run(arguments)
        own.keep_output(kept, output[0])
        return output
    if own.call.is_half:
        made = cache.read(kept) - _find_difference(own)
        _keep_rest(own, made)
        cache.release([kept])
        return wrap_output(made, arguments)
    output = run(arguments)
    for difference in own.call.keeps.get(GUIDANCE, ()):
        own.keep_output(difference, cache.read(kept), output[0])
    cache.release([kept])
    return output


def keep_difference(step: UNetStep, noise: torch.Tensor) -> None:
    """Keep conditional minus unconditional output [B, C, H, W] if a later call reads it."""
    for each, rows in step.split(noise):
        for kept in each.call.keeps.get(GUIDANCE, ()):
            rest, cond = rows.detach().chunk(2)
            each.keep_output(kept, cond, rest)


def complete(step: UNetStep, output: Any) -> Any:
    """The UNet's output for the whole batch, given that of the conditional half."""
    wholes: list[torch.Tensor] = []
    for each, rows in step.split(output[0]):
        rest = rows - _find_difference(each)
        _keep_rest(each, rest)
        wholes.append(torch.cat([rest, rows]))
    return exchange(output, step.join(wholes))


def _keep_rest(step: UNetCall, rest: torch.Tensor) -> None:
    """Keep the half of the UNet's output [B, C, H, W] that was made up, if a later call reads it.

    Were it forecast from when it was last computed, the two halves would be of different age, and
    guidance makes much of their difference.
    """
    for kept in step.call.keeps.get(HEAD, ()):
        if kept.lane == "rest":
            step.keep_output(kept, rest, step.latents)


def _find_difference(step: UNetCall) -> torch.Tensor | float:
    if step.call.guidance == "drop":
        return 0.0
    return step.fill(find_method(step.call, GUIDANCE), step.call.sources[GUIDANCE][0])


def exchange(output: Any, noise: torch.Tensor) -> Any:
    """A UNet's output, a tuple or a dataclass, with another tensor in it."""
    return (noise,) if isinstance(output, tuple) else type(output)(sample=noise)


def wrap_output(noise: torch.Tensor, arguments: UNetArguments) -> Any:
    """What the UNet's forward would return with these arguments and this output [B, C, H, W]."""
    return UNet2DConditionOutput(sample=noise) if arguments.in_dataclass else (noise,)


# -- mixed outputs: where they can be, and how guidance itself comes to give them -----------------


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
