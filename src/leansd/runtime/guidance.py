"""Guidance at run time: a guided call without its unconditional half.

Ordinary pipelines put the unconditional and the conditional input of classifier-free guidance into
one batch, in this order. A call that leaves out the first half takes the second half of everything
that goes in, and makes up the missing half of what comes out, so that the pipeline does not notice.
Modular pipelines call the two apart, the conditional one first; the second of them is left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from leansd.plans.anatomy import HEAD
from leansd.plans.liveness import GUIDANCE, Lane
from leansd.runtime.passes import Pass, Step, keep_for_rest
from leansd.runtime.rows import map_rows

UNET_ARGUMENTS = tuple(inspect.signature(UNet2DConditionModel.forward).parameters)[1:]


def is_guided(pipe: Any, batch: int) -> bool:
    """Whether a pipeline's batch is an unconditional and a conditional half, and nothing else.

    Perturbed-attention guidance adds a third part that its attention processors rely on; such
    batches run in full.
    """
    return guides(pipe) and batch % 2 == 0


def guides(pipe: Any) -> bool:
    """Whether a pipeline joins an unconditional and a conditional half to a batch."""
    guided = getattr(pipe, "do_classifier_free_guidance", False)
    perturbed = getattr(pipe, "do_perturbed_attention_guidance", False)
    return bool(guided) and not perturbed


def find_lane(pipe: Any) -> Lane | None:
    """The lane of the call that a pipeline is about to make, where it calls the two apart.

    The guiders of modular pipelines say so. Of those that make more than these two predictions
    (perturbed attention, skipped layers) nothing is known, and their calls run in full.
    """
    guider = getattr(pipe, "guider", None)
    if getattr(guider, "_input_predictions", None) != ["pred_cond", "pred_uncond"]:
        return None
    if guider.num_conditions != 2:
        return None
    return "cond" if guider.is_conditional else "rest"


def run_apart(step: Pass, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """One of the two calls of a step: the conditional one comes first and always runs.

    The other one is left out where guidance is not computed; its output is made from the first's.
    """
    store, kept = step.branch.store, keep_for_rest(step.call.index)
    if step.apart == "cond":
        output = forward(*args, **kwargs)
        store.keep(kept, output[0])
        return output
    if step.call.is_half:
        made = store.read(kept) - _find_difference(step)
        _keep_rest(step, made)
        store.release([kept])
        return wrap_output(made, args, kwargs)
    output = forward(*args, **kwargs)
    for difference in step.call.keeps.get(GUIDANCE, ()):
        store.keep(difference, store.read(kept), output[0])
    store.release([kept])
    return output


def count_pictures(pipe: Any, batch: int) -> int:
    """How many pictures a pipeline's batch holds; a batch that only goes together counts as one."""
    if getattr(pipe, "do_perturbed_attention_guidance", False):
        return 1
    return batch // 2 if is_guided(pipe, batch) else batch


def take_conditional(inputs: Any, batch: int) -> Any:
    """The second half of every tensor with `batch` rows in (nested) arguments of a UNet."""
    return map_rows(inputs, batch, lambda tensor: tensor[batch // 2 :])


def keep_difference(step: Step, noise: torch.Tensor) -> None:
    """Keep conditional minus unconditional output [B, C, H, W] if a later call reads it."""
    for each, rows in step.split(noise):
        for kept in each.call.keeps.get(GUIDANCE, ()):
            rest, cond = rows.detach().chunk(2)
            each.branch.store.keep(kept, cond, rest)


def complete(step: Step, output: Any) -> Any:
    """The UNet's output for the whole batch, given that of the conditional half."""
    wholes: list[torch.Tensor] = []
    for each, rows in step.split(output[0]):
        rest = rows - _find_difference(each)
        _keep_rest(each, rest)
        wholes.append(torch.cat([rest, rows]))
    return exchange(output, step.join(wholes))


def _keep_rest(step: Pass, rest: torch.Tensor) -> None:
    """Keep the half of the UNet's output [B, C, H, W] that was made up, if a later call reads it.

    Were it forecast from when it was last computed, the two halves would be of different age, and
    guidance makes much of their difference.
    """
    for kept in step.call.keeps.get(HEAD, ()):
        if kept.lane == "rest":
            given = step.latents if kept.what == "change" else None
            step.branch.store.keep(kept, rest, given)


def exchange(output: Any, noise: torch.Tensor) -> Any:
    """A UNet's output, a tuple or a dataclass, with another tensor in it."""
    return (noise,) if isinstance(output, tuple) else type(output)(sample=noise)


def wrap_output(noise: torch.Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What the UNet's forward would return with these arguments and this output [B, C, H, W]."""
    position = UNET_ARGUMENTS.index("return_dict")
    as_dict = args[position] if len(args) > position else kwargs.get("return_dict", True)
    return UNet2DConditionOutput(sample=noise) if as_dict else (noise,)


def _find_difference(step: Pass) -> torch.Tensor | float:
    call = step.call
    if call.guidance == "drop":
        return 0.0
    how = "forecast" if call.guidance == "forecast" else "reuse"
    return step.recall(how, call.sources[GUIDANCE][0])
