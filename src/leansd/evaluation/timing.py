"""Paired timing: cases take turns inside each round, so that a slow spell hits all of them.

A speed-up is the median, over what was drawn, of the ratio of the fastest runs of either case:
other work on the machine only ever adds time, so the fastest of several equal runs is the truest.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from leansd.errors import LeansdError

Each = TypeVar("Each")


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
    """The seconds of one case, one a turn; the same work is repeated in each of `rounds` rounds."""

    seconds: tuple[float, ...]
    rounds: int = 1

    @property
    def fastest(self) -> tuple[float, ...]:
        """The least seconds of each piece of work over all rounds."""
        size = len(self.seconds) // self.rounds
        return tuple(min(self.seconds[place::size]) for place in range(size))

    @property
    def median(self) -> float:
        return statistics.median(self.fastest)


def take_turns(
    cases: Sequence[Each], rounds: int, *, pieces: int = 1, budget: float | None = None
) -> Iterator[tuple[int, Each]]:
    """Every case once a turn: the number of the turn, and the case.

    The order moves on by a place each turn, so no case always follows the same other. A case that
    is taken out of a list is left out from the next turn on.

    Args:
        rounds: how often the same work is done.
        pieces: turns of a round, each with a piece of the work.
        budget: seconds that all may take; another round begins only if it should end in time.
    """
    started = began = time.monotonic()
    longest = 0.0
    for turn in range(rounds * pieces):
        if turn and not turn % pieces:
            longest, began = max(longest, time.monotonic() - began), time.monotonic()
            if budget is not None and began - started + longest > budget:
                return
        shift = turn % max(1, len(cases))
        yield from ((turn, case) for case in [*cases[shift:], *cases[:shift]])


def check_count(count: int, what: str) -> int:
    """The count itself, if it is one."""
    if count < 1:
        raise LeansdError(f"{count} {what}: at least 1 is needed")
    return count


def time_cases(
    cases: Mapping[str, Callable[[int], Any]],
    *,
    rounds: int,
    warmup: int = 1,
    device: Any = "cpu",
) -> dict[str, Timing]:
    """Run every case once a round and time it; a case is called with the number of its round.

    Warm-up rounds are called with round 0 and not counted.
    """
    check_count(rounds, "timing rounds")
    if not cases:
        raise LeansdError("nothing to time: give at least one case")
    for _ in range(warmup):
        for case in cases.values():
            case(0)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn, name in take_turns(list(cases), rounds):
        wait_for(device)
        start = time.perf_counter()
        cases[name](turn)
        wait_for(device)
        seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def compare_timings(base: Timing, other: Timing) -> Ratio:
    """How many times faster `other` is than `base`, both timed in the same turns."""
    if (len(base.seconds), base.rounds) != (len(other.seconds), other.rounds):
        raise LeansdError(
            f"{len(base.seconds)} and {len(other.seconds)} rounds cannot be paired: time both in "
            "one call"
        )
    paired = _divide(base.seconds, other.seconds)
    best = _divide(base.fastest, other.fastest)
    return Ratio(statistics.median(best), min(paired), max(paired))


def wait_for(device: Any) -> None:
    """Wait until a GPU has done all that it was given."""
    if str(device).startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def _divide(base: Sequence[float], other: Sequence[float]) -> list[float]:
    return [slow / max(fast, 1e-12) for slow, fast in zip(base, other, strict=True)]
