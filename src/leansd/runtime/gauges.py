"""Gauges: how far a picture has drifted since it was last computed in full.

A gauge sees the probe of every call, by lane, and the UNet's output of those that computed it. All
its numbers stay on the device; whoever asks for several reads them at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch

from leansd.plans.liveness import Lane
from leansd.plans.row import Measure

Rows = Mapping[Lane, torch.Tensor]
"""A picture's part of a tensor, lane by lane."""


class Gauge(Protocol):
    def measure(self, probe: Rows) -> torch.Tensor:
        """The drift at a call that may inherit, a scalar; NaN where it is not known yet."""
        ...

    def settle(self, probe: Rows, output: Rows, *, computed: bool) -> None:
        """Note a call: its probe and, if the picture was `computed` in full, the UNet's output.

        `probe` is the gauge's to keep, `output` is not.
        """
        ...

    @property
    def bytes(self) -> int: ...

    def clear(self) -> None:
        """Keep nothing any more: no later call inherits."""
        ...


class ChangeGauge:
    """The relative change of the probe since the picture was last computed in full."""

    def __init__(self) -> None:
        self._then: dict[Lane, torch.Tensor] = {}

    def measure(self, probe: Rows) -> torch.Tensor:
        return _sum_change(probe, self._then) / _sum_size(self._then, probe)

    def settle(self, probe: Rows, output: Rows, *, computed: bool) -> None:
        if computed:
            self._then.update(probe)

    @property
    def bytes(self) -> int:
        return _count_bytes(self._then.values())

    def clear(self) -> None:
        self._then.clear()


class PredictedGauge:
    """The output's relative changes predicted from the probe's, summed (EasyCache)."""

    def __init__(self) -> None:
        self._last: dict[Lane, torch.Tensor] = {}
        """Probe of the call before."""
        self._probe: dict[Lane, torch.Tensor] = {}
        self._output: dict[Lane, torch.Tensor] = {}
        """Probe and output of the last full computation."""
        self._rate: torch.Tensor | None = None
        """The output's change for the probe's, between the last two full computations."""
        self._sum: torch.Tensor | float = 0.0
        self._next: torch.Tensor | float = 0.0
        """The sum, should this call inherit."""

    def measure(self, probe: Rows) -> torch.Tensor:
        change = _sum_change(probe, self._last)
        if self._rate is None:
            return torch.full_like(change, math.nan)
        self._next = self._sum + self._rate * (change / _sum_size(self._output, probe))
        return self._next

    def settle(self, probe: Rows, output: Rows, *, computed: bool) -> None:
        self._last.update(probe)
        self._sum = 0.0 if computed else self._next
        if not computed:
            return
        if self._output:
            self._rate = _sum_change(output, self._output) / _sum_change(probe, self._probe)
        self._probe.update(probe)
        self._output.update({lane: rows.detach().clone() for lane, rows in output.items()})

    @property
    def bytes(self) -> int:
        return _count_bytes(
            [*self._last.values(), *self._probe.values(), *self._output.values()],
        )

    def clear(self) -> None:
        for kept in (self._last, self._probe, self._output):
            kept.clear()
        self._rate, self._sum, self._next = None, 0.0, 0.0


GAUGES: dict[Measure, Callable[[], Gauge]] = {
    "change": ChangeGauge,
    "predicted": PredictedGauge,
}


def _sum_change(now: Rows, then: Rows) -> torch.Tensor:
    """Sum of absolute differences over the lanes of `now`."""
    lanes = [(rows - then[lane]).abs().sum(dtype=torch.float32) for lane, rows in now.items()]
    return torch.stack(lanes).sum()


def _sum_size(then: Rows, lanes: Iterable[Lane]) -> torch.Tensor:
    """Sum of absolute values over some lanes."""
    sizes = [then[lane].abs().sum(dtype=torch.float32) for lane in lanes]
    return torch.stack(sizes).sum()


def _count_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors, of which several may be the same."""
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())
