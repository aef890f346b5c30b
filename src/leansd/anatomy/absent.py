"""An attention that is not there."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn


class Absent(nn.Module):
    """Stands where a block's forward calls an attention that was dropped: no unit, no weight."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        return_dict: bool = True,
        **unused: Any,
    ) -> tuple[torch.Tensor] | Transformer2DModelOutput:
        """`hidden_states` [B, C, H, W] as they are, in the form that `Transformer2DModel` has."""
        if return_dict:
            return Transformer2DModelOutput(sample=hidden_states)
        return (hidden_states,)
