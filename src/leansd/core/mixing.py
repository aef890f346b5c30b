"""Mixed outputs: what a sampler gets where it is given more than the output just computed.

Everything is weighed in single precision at least, and rounded once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from leansd.plans.methods import Mix


class Guided(NamedTuple):
    """One output as mixes know it, both [B, C, H, W]."""

    output: torch.Tensor
    """What guidance makes of the two halves."""
    difference: torch.Tensor | None
    """Conditional minus unconditional; None without guidance."""


def guide(rest: torch.Tensor, cond: torch.Tensor, scale: float) -> Guided:
    """Classifier-free guidance of two halves [B, C, H, W], as pipelines do it."""
    difference = cond - rest
    return Guided(rest + scale * difference, difference)


def solve_rest(mixed: torch.Tensor, cond: torch.Tensor, scale: float) -> torch.Tensor:
    """The unconditional output of which guidance by a scale above 1 makes `mixed`."""
    return (scale * make_precise(cond) - mixed) / (scale - 1)


class OutputHistory:
    """What mixes are made of: what a run began with, and every output computed since.

    Args:
        start: what the UNet was given at the run's first step, [B, C, H, W].
    """

    def __init__(self, start: torch.Tensor) -> None:
        self._start = make_precise(start)
        self._outputs: list[Guided] = []
        self.held: torch.Tensor | None = None
        """The conditional output, while the unconditional one of the same step is computed."""

    def __len__(self) -> int:
        return len(self._outputs)

    @property
    def bytes(self) -> int:
        kept = [self._start, *(each for pair in self._outputs for each in pair)]
        return sum(each.nbytes for each in kept if each is not None)

    def note(self, output: Guided) -> None:
        """Take a computed output, which is the history's from now on."""
        self._outputs.append(output)

    def mix(self, row: Mix) -> torch.Tensor:
        """The weighted sum [B, C, H, W]; the output itself where only that has a weight, of one."""
        terms = [(self._start, row.start)]
        terms += [(each.output, own) for each, own in zip(self._outputs, row.guided, strict=True)]
        apart = row.difference or (0.0,) * len(self)
        for each, weight in zip(self._outputs, apart, strict=True):
            if each.difference is not None:
                terms.append((each.difference, weight))
        (first, lead), *others = [term for term in terms if term[1]] or terms[:1]
        total = first * lead
        for tensor, weight in others:
            total = total + tensor * weight
        return total


def make_precise(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in single precision at least."""
    tensor = tensor.detach()
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
