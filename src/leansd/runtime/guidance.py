"""Guidance at run time: a guided call without its unconditional half.

Ordinary pipelines put the unconditional and the conditional input of classifier-free guidance into
one batch, in this order. A call that leaves out the first half takes the second half of everything
that goes in, and makes up the missing half of what comes out, so that the pipeline does not notice.
"""

from __future__ import annotations

from typing import Any

import torch

from leansd.plans.liveness import GUIDANCE
from leansd.runtime.passes import Pass, Step
from leansd.runtime.rows import map_rows
from leansd.runtime.store import unwrap


def is_guided(pipe: Any, batch: int) -> bool:
    """Whether a pipeline's batch is an unconditional and a conditional half, and nothing else.

    Perturbed-attention guidance adds a third part that its attention processors rely on; such
    batches run in full.
    """
    guided = getattr(pipe, "do_classifier_free_guidance", False)
    perturbed = getattr(pipe, "do_perturbed_attention_guidance", False)
    return bool(guided) and not perturbed and batch % 2 == 0


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
    cond = unwrap(output) if isinstance(output, tuple) else output.sample
    wholes = [torch.cat([rows - _find_difference(each), rows]) for each, rows in step.split(cond)]
    whole = step.join(wholes)
    return (whole,) if isinstance(output, tuple) else type(output)(sample=whole)


def _find_difference(step: Pass) -> torch.Tensor | float:
    call = step.call
    if call.guidance == "drop":
        return 0.0
    how = "forecast" if call.guidance == "forecast" else "reuse"
    return step.recall(how, call.sources[GUIDANCE][0])
