"""Outputs made of kept ones: the whole arithmetic of inheritance and correction.

An output that is not computed is a weighted sum of kept ones by `leansd.plans.methods.METHODS`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from leansd.core.schedule import CallSchedule
from leansd.core.store import FeatureCache
from leansd.plans.liveness import GUIDANCE, Call, Kept
from leansd.plans.methods import GUIDANCE_METHODS, METHODS, Method

Weight = float | torch.Tensor


class PlannedCall:
    """One call under a plan: makes what is not computed, and corrects what is."""

    def __init__(self, store: FeatureCache, call: Call, schedule: CallSchedule | None) -> None:
        self.store = store
        self.call = call
        self.schedule = schedule
        """The run's; None where a graph is traced, which has it from its arguments."""

    def fill(
        self, method: Method, sources: Sequence[Kept], given: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One lane of an output: the weighted sum of kept ones, or `given` plus that of changes."""
        if method.of_change and given is not None and len(sources) == 1 and method.is_exact:
            return given + self.store.read(sources[0])
        made = weigh_tensors(method, *self.weigh(method, sources))
        return given + made if method.of_change and given is not None else made

    def weigh(
        self, method: Method, sources: Sequence[Kept]
    ) -> tuple[list[torch.Tensor], list[Weight]]:
        """What an output is made from, latest first, and its weights."""
        assert self.schedule is not None
        weights = list_weights(method, sources, self.call.index, self.schedule)
        counted = [(kept, each) for kept, each in zip(sources, weights, strict=True) if each]
        return [self.store.read(kept) for kept, _ in counted], [each for _, each in counted]

    def move_on(self, noise: torch.Tensor, sources: Sequence[Kept]) -> torch.Tensor:
        """One lane of a corrected output: moved away from forecasts by the outputs before."""
        assert self.schedule is not None
        lead, weights = list_correction(self.call, sources, self.schedule)
        return combine([noise, *map(self.store.read, sources)], [lead, *weights])


def find_method(call: Call, at: str) -> Method:
    """How an inherited unit or part, or the difference of the guidance lanes, is made."""
    if at == GUIDANCE:
        return METHODS[GUIDANCE_METHODS[call.guidance]]
    pattern = call.pattern
    return METHODS[pattern.inherited.get(at) or pattern.parts[at]]


def list_weights(
    method: Method, sources: Sequence[Kept], index: int, schedule: CallSchedule
) -> tuple[float, ...]:
    """The weights, in the output of call `index`, of what it is made from, latest first."""
    log_snr = schedule.log_snr
    by_call = method.axis == "call"
    now = float(index) if by_call else log_snr[index]
    then = [float(kept.call) if by_call else log_snr[kept.call] for kept in sources]
    return method.weights(now, then, len(schedule.rows))


def list_correction(
    call: Call, sources: Sequence[Kept], schedule: CallSchedule
) -> tuple[float, tuple[float, ...]]:
    """The weight of a corrected output itself, and those of the outputs before, latest first."""
    then = [schedule.log_snr[kept.call] for kept in sources]
    return call.correct.lead, call.correct.weights(schedule.log_snr[call.index], then)


def weigh_tensors(
    method: Method, tensors: Sequence[torch.Tensor], weights: Sequence[Weight]
) -> torch.Tensor:
    """The weighted sum of tensors, latest first; always a fresh tensor."""
    if not method.is_exact:
        return combine(tensors, weights)
    if len(tensors) == 1:
        return tensors[0].clone()
    if len(tensors) == 2:
        return _lerp(tensors[1], tensors[0], weights[0])
    # Earliest first, which decides how the sum is rounded.
    return combine(tensors[::-1], weights[::-1])


def _lerp(before: torch.Tensor, latest: torch.Tensor, weight: Weight) -> torch.Tensor:
    """before + weight (latest - before); a weight beyond 1 lies beyond the latest."""
    if not isinstance(weight, torch.Tensor):
        return torch.lerp(before, latest, weight)
    # In the precision that lerp gives to a weight that is a number, so that the bits agree.
    return torch.lerp(before.to(weight.dtype), latest.to(weight.dtype), weight).to(latest.dtype)


def combine(tensors: Sequence[torch.Tensor], weights: Sequence[Weight]) -> torch.Tensor:
    """The weighted sum of tensors, rounded to their precision only once."""
    dtype = tensors[0].dtype
    precise = torch.promote_types(dtype, torch.float32)
    output = tensors[0].to(precise) * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        output = output + tensor.to(precise) * weight
    return output.to(dtype)
