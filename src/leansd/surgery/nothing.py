"""`nothing`: a transformer block without its self-attention, cross-attention or feed-forward.

Each adds to what it is given, so without it the hidden state goes by. At the shallowest level
self-attention is the dearest of the three, cross-attention brings the prompt for next to nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from leansd.anatomy import read_anatomy
from leansd.errors import LeansdError
from leansd.plans.anatomy import Unit
from leansd.surgery.replacements import Options, Replacement

NORMS = {"attn1": "norm1", "attn2": "norm2", "ff": "norm3"}
"""What a transformer block normalises the input of its parts with, by their names in diffusers."""


class Nothing(nn.Module):
    """Adds nothing."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Zeros like `hidden_states`, [B, T, D]."""
        return torch.zeros_like(hidden_states)


def accept(unit: Unit, options: Options) -> None:
    """Refuse what is not one of a transformer block's parts."""
    if unit.kind not in ("self-attention", "cross-attention", "feed-forward"):
        raise LeansdError(
            f"{unit.at} is no part of a transformer block; nothing can stand for the likes of "
            "*.sa, *.ca and *.ff, drop takes out what is larger"
        )
    if options:
        raise LeansdError(f"{unit.at}: nothing has no option {next(iter(options))!r}; leave it out")


def build(unet: UNet2DConditionModel, at: str, options: Options) -> None:
    """Take the part out, and what only normalises its input."""
    part, norm = reach(read_anatomy(unet)[at].path)
    unet.set_submodule(part, Nothing())
    unet.set_submodule(norm, nn.Identity())


def reach(path: str) -> tuple[str, ...]:
    """A part's path, and that of its norm."""
    block, _, name = path.rpartition(".")
    return path, f"{block}.{NORMS[name]}"


REPLACEMENT = Replacement(accept, build, reaches=reach)
