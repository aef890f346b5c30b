"""Another attention for one call: what a self-attention computes when a plan gates it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)

from leansd.plans.row import Attend
from leansd.surgery.gri import GRIAttnProcessor

Processor = Callable[..., torch.Tensor]
"""An attention processor of diffusers."""

FULL = (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
"""Processors that compute full attention and nothing else."""
GRI = GRIAttnProcessor()


def find_processor(attention: Attention, by: Attend) -> Processor | None:
    """The processor that has `attention` attend `by` GRI or in full.

    None where its own does so already, and where it is neither: perturbed-attention guidance, say,
    would be lost with it.
    """
    own: Any = attention.processor
    if by == "gri":
        return GRI if type(own) in FULL else None
    return own.full if isinstance(own, GRIAttnProcessor) else None


def attend(
    attention: Attention,
    processor: Processor,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    **ignored: Any,
) -> torch.Tensor:
    """What `attention` makes of `hidden_states` [B, N, C] with `processor` in its own's place.

    Like `Attention.forward`, without setting anything: other threads may be in the same module.
    """
    return processor(
        attention,
        hidden_states,
        encoder_hidden_states=encoder_hidden_states,
        attention_mask=attention_mask,
    )
