"""`skip`: a transformer block without its self-attention, cross-attention or feed-forward.

Each adds to what it is given, so without it the hidden state goes by. At the shallowest level
self-attention is the dearest of the three, cross-attention brings the prompt for next to nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from leansd.errors import LeansdError
from leansd.plans.anatomy import Unit
from leansd.surgery.parts import AddressedUNet, Options, Replacement
from leansd.text import refuse_unknown

NORMS = {"attn1": "norm1", "attn2": "norm2", "ff": "norm3"}
"""What a transformer block normalises the input of its parts with, by their names in diffusers."""


class SkippedPart(nn.Module):
    """Stands where a part was: adds zeros."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Zeros like `hidden_states`, [B, T, D]."""
        return torch.zeros_like(hidden_states)


def validate(unit: Unit, options: Options) -> None:
    """Refuse what is not one of a transformer block's parts."""
    if unit.kind not in ("self-attention", "cross-attention", "feed-forward"):
        raise LeansdError(
            f"{unit.at} is no part of a transformer block; skip is for the likes of *.sa, *.ca and "
            "*.ff, drop takes out what is larger"
        )
    refuse_unknown("skip", options, ())


def build(net: AddressedUNet, at: str, options: Options) -> None:
    """Take the part out, and what only normalises its input."""
    part, norm = find_reach(net.anatomy[at].path)
    net.unet.set_submodule(part, SkippedPart())
    net.unet.set_submodule(norm, nn.Identity())


def find_reach(path: str) -> tuple[str, ...]:
    """A part's path, and that of its norm."""
    block, _, name = path.rpartition(".")
    return path, f"{block}.{NORMS[name]}"


REPLACEMENT = Replacement(validate, build, reaches=find_reach)
