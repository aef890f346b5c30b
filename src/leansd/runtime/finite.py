"""Whether what a run gives are numbers, found out without a wait on the way."""

from __future__ import annotations

import torch
from torch import nn

NOT_FINITE = "are not finite numbers"


class FiniteWatch:
    """Remembers which rows of some tensors are finite.

    The answers stay on the device until the run is over: reading them would wait for every step.
    """

    def __init__(self) -> None:
        self._sums: list[torch.Tensor] = []

    def note(self, tensor: torch.Tensor) -> None:
        """Look at a tensor [B, ...]."""
        # One kernel that sees every number: a sum is finite only where all of them are.
        precise = torch.promote_types(tensor.dtype, torch.float32)
        dims = tuple(range(1, tensor.ndim))
        self._sums.append(tensor.detach().sum(dims, dtype=precise))

    def read(self) -> list[list[bool]]:
        """Which rows of every tensor are finite; waits for the device, once."""
        if not self._sums:
            return []
        home = self._sums[0].device
        flags = torch.isfinite(torch.cat([each.to(home) for each in self._sums])).tolist()
        left = iter(flags)
        return [[next(left) for _ in each] for each in self._sums]


REAL: set[type] = {torch.Tensor, nn.Parameter}
"""Kinds of tensors that hold numbers; those of a simulation do not."""


def is_real(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds numbers."""
    return type(tensor) in REAL and not tensor.is_meta
