"""What a run keeps, and where it is in its plan."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch

from leansd.core.mixing import OutputHistory
from leansd.plans.liveness import Kept, Program


class FeatureCache:
    """Kept tensors of one run by (unit, call). Nobody outside ever holds one of them.

    Tensors are copied on the way in and on the way out, since the code between units may write in
    place; that is two copies of what a plan keeps, not of the UNet's activations.
    """

    def __init__(self) -> None:
        self._tensors: dict[Kept, torch.Tensor] = {}

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def keep(self, kept: Kept, output: torch.Tensor, given: torch.Tensor | None = None) -> None:
        """Keep `output`, or what was added to what was `given`: one lane of both [B, C, H, W]."""
        source = output.detach()
        self.put(kept, source.clone() if given is None else source - given)

    def put(self, kept: Kept, tensor: torch.Tensor) -> None:
        """Keep `tensor` itself, which nobody else holds."""
        self._tensors[kept] = tensor

    def has(self, items: Iterable[Kept]) -> bool:
        return all(kept in self._tensors for kept in items)

    def read(self, kept: Kept) -> torch.Tensor:
        """The kept tensor itself, for reading only."""
        return self._tensors[kept]

    def release(self, items: Iterable[Kept]) -> None:
        for kept in items:
            self._tensors.pop(kept, None)

    def retain(self, items: Collection[Kept]) -> None:
        """Release all others."""
        self.release([kept for kept in self._tensors if kept not in items])

    def clear(self) -> None:
        self._tensors.clear()


class History:
    """One sequence of calls, each of which goes on from the one before, and what they keep."""

    def __init__(self) -> None:
        self.cache = FeatureCache()
        self.outputs: OutputHistory | None = None
        """Where outputs are mixed, those so far."""
        self.program: Program | None = None
        self.last = -1
        """Number of the call that was made last."""

    @property
    def bytes(self) -> int:
        return self.cache.bytes + (self.outputs.bytes if self.outputs is not None else 0)

    def follows(self, index: int) -> bool:
        """Whether this is the next call."""
        return self.program is not None and index == self.last + 1

    def begin(self, program: Program) -> None:
        """Forget everything and follow `program`, whose first call computes in full."""
        self.clear()
        self.program = program

    def clear(self) -> None:
        """Keep nothing any more."""
        self.cache.clear()
        self.outputs = None
