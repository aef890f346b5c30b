"""Paired timing: cases take turns inside each round, so that a slow spell hits all of them.

A speed-up is then the median of the rounds' own ratios, with the range they span.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from leansd.errors import LeansdError


@dataclass(frozen=True)
class Ratio:
    """How many times faster, over paired rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Timing:
    """The seconds of one case, one a round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Slowest round over fastest round; 1 is perfectly steady."""
        return max(self.seconds) / max(min(self.seconds), 1e-12)


def time_cases(
    cases: Mapping[str, Callable[[int], Any]],
    *,
    rounds: int,
    warmup: int = 1,
    device: Any = "cpu",
) -> dict[str, Timing]:
    """Run every case once a round and time it; a case is called with the number of its round.

    The order turns by one place each round, so that no case always follows the same other.
    Warm-up rounds are called with round 0 and not counted.
    """
    if rounds < 1:
        raise LeansdError(f"{rounds} timing rounds: at least 1 is needed")
    if not cases:
        raise LeansdError("nothing to time: give at least one case")
    for _ in range(warmup):
        for case in cases.values():
            case(0)
    names = list(cases)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            _await(device)
            start = time.perf_counter()
            cases[name](turn)
            _await(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def compare_timings(base: Timing, other: Timing) -> Ratio:
    """How many times faster `other` is than `base`, both from one call of `time_cases`."""
    ratios = _paired(base.seconds, other.seconds)
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def _paired(base: Sequence[float], other: Sequence[float]) -> list[float]:
    if len(base) != len(other):
        raise LeansdError(
            f"{len(base)} and {len(other)} rounds cannot be paired: time both in one call"
        )
    return [slow / max(fast, 1e-12) for slow, fast in zip(base, other, strict=True)]


def _await(device: Any) -> None:
    if str(device).startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
