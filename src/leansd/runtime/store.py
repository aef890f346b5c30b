"""What a run keeps between UNet calls, and the ways of making an output from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from leansd.plans.liveness import Kept
from leansd.plans.row import Correction, How
from leansd.runtime.clock import Course
from leansd.runtime.spectrum import weigh_chebyshev


@dataclass(frozen=True, slots=True)
class Shape:
    """What a unit's output looks like, so that a placeholder can stand in for it."""

    size: Sequence[int]
    dtype: torch.dtype
    device: torch.device
    in_tuple: bool
    """Transformers return a tuple of one tensor."""

    @classmethod
    def of(cls, output: Any) -> Shape:
        tensor = unwrap(output)
        return cls(tensor.shape, tensor.dtype, tensor.device, isinstance(output, tuple))

    def wrap(self, tensor: torch.Tensor) -> Any:
        return (tensor,) if self.in_tuple else tensor

    def make_placeholder(self, batch: int, *, writable: bool) -> torch.Tensor:
        """NaN in this shape: nobody reads it, and if somebody did it would show.

        It takes no memory unless it has to be `writable`, for code that works in place (FreeU,
        T2I-Adapter).
        """
        size = (batch, *self.size[1:])
        if writable:
            return torch.full(size, torch.nan, dtype=self.dtype, device=self.device)
        return torch.full((), torch.nan, dtype=self.dtype, device=self.device).expand(size)


class Store:
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


def unwrap(output: Any) -> torch.Tensor:
    """The tensor of a unit's output."""
    return output[0] if isinstance(output, tuple) else output


Recall = Callable[[Store, Sequence[Kept], int, Any, Any], torch.Tensor]
"""`(store, sources, call, the run's course, the unit's input or None)` -> a fresh tensor."""


def recall_output(
    store: Store, sources: Sequence[Kept], call: int, course: Course, given: Any
) -> torch.Tensor:
    """What the unit gave when it was last computed."""
    return store.read(sources[0]).clone()


def recall_change(
    store: Store, sources: Sequence[Kept], call: int, course: Course, given: Any
) -> torch.Tensor:
    """The present input plus what the unit last added to its input."""
    return given + store.read(sources[0])


def forecast_output(
    store: Store, sources: Sequence[Kept], call: int, course: Course, given: Any
) -> torch.Tensor:
    """The polynomial over log-SNR through the last computed outputs, a line through two of them.

    With one of them that one; outputs of one and the same log-SNR count once.
    """
    weights = weigh_sources(sources, call, course.log_snr)
    tensors = [store.read(kept) for kept in weights]
    if len(tensors) == 2:
        # lerp(before, latest, w) is before + w (latest - before); w > 1 lies beyond the latest.
        before, latest = tensors
        return torch.lerp(before, latest, weights[sources[0]])
    return combine(tensors, list(weights.values()))


def forecast_by_chebyshev(
    store: Store, sources: Sequence[Kept], call: int, course: Course, given: Any
) -> torch.Tensor:
    """Spectrum's forecast through all computed outputs, see `weigh_chebyshev`."""
    places = tuple(kept.call for kept in sources)
    weights = weigh_chebyshev(call, places, len(course.rows))
    return combine([store.read(kept) for kept in sources], weights)


def forecast_by_both(
    store: Store, sources: Sequence[Kept], call: int, course: Course, given: Any
) -> torch.Tensor:
    """The mean of Spectrum's forecast and of the line through the last two outputs."""
    places = tuple(kept.call for kept in sources)
    weights = weigh_chebyshev(call, places, len(course.rows))
    last = places[:2]
    line = [*(weigh(call, here, last) for here in last), *(0.0 for _ in places[2:])]
    means = [(one + other) / 2 for one, other in zip(weights, line, strict=True)]
    return combine([store.read(kept) for kept in sources], means)


def weigh_sources(
    sources: Sequence[Kept], call: int, log_snr: Sequence[float]
) -> dict[Kept, float]:
    """Lagrange's weights at `call` of the polynomial through `sources`, earliest first.

    Of sources of one and the same log-SNR only the latest has one.
    """
    places = {log_snr[kept.call]: kept for kept in reversed(sources)}
    at = log_snr[call]
    return {kept: weigh(at, here, list(places)) for here, kept in places.items()}


def weigh_correction(
    correct: Correction, sources: Sequence[Kept], call: int, log_snr: Sequence[float]
) -> tuple[float, dict[Kept, float]]:
    """The weight of the output of `call` itself, and of `sources`, in the corrected output."""
    line = weigh_sources(sources, call, log_snr)
    # In their own order, which decides how the sum is rounded.
    weights = {kept: -correct.line * line[kept] for kept in sources if kept in line}
    weights[sources[0]] -= correct.last
    return 1 + correct.line + correct.last, weights


def weigh(at: float, here: float, points: Sequence[float]) -> float:
    """Lagrange's weight at `at` of what was computed `here`, one of all `points`."""
    return math.prod((at - point) / (here - point) for point in points if point != here)


def combine(
    tensors: Sequence[torch.Tensor], weights: Sequence[float | torch.Tensor]
) -> torch.Tensor:
    """The weighted sum of tensors, rounded to their precision only once."""
    dtype = tensors[0].dtype
    precise = torch.promote_types(dtype, torch.float32)
    output = tensors[0].to(precise) * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        output = output + tensor.to(precise) * weight
    return output.to(dtype)


RECALLS: dict[How, Recall] = {
    "reuse": recall_output,
    "residual": recall_change,
    "forecast": forecast_output,
    "forecast2": forecast_output,
    "chebyshev": forecast_by_chebyshev,
    "chebyshev-line": forecast_by_both,
}
