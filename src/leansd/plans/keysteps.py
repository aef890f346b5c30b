"""Key steps: at which steps of a run the whole UNet is computed.

Every function returns the key steps of a run of `steps` steps in rising order; step 0 is always one
of them. The modes at the time-step level are those of A-SDM (arXiv 2406.00210, feature inheritance)
and DeepCache (arXiv 2312.00858, non-uniform 1:N).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Literal

from leansd.errors import LeansdError

KeySteps = tuple[int, ...]
MOST_POWER = 10


def uniform(steps: int, interval: int) -> KeySteps:
    """Every `interval`-th step."""
    check_interval(interval)
    return tuple(range(0, steps, interval))


def even(steps: int, keys: int, last: int) -> KeySteps:
    """`keys` steps at even distances, up to step `last`."""
    _check_keys(steps, keys)
    return tuple(round(index * last / max(1, keys - 1)) for index in range(keys))


def short_first(steps: int, keys: int) -> KeySteps:
    """`keys` steps at distances that differ by one at most, the shorter first; the last two at the
    end of the run."""
    _check_keys(steps, keys)
    if keys < 3:
        return even(steps, keys, steps - 1)
    gap, longer = divmod(steps - 2, keys - 2)
    if not gap:
        return tuple(range(keys))
    gaps = [gap] * (keys - 2 - longer) + [gap + 1] * longer
    return (*accumulate(gaps, initial=0), steps - 1)


def quadratic(steps: int, keys: int, dense: Literal["early", "late"] = "early") -> KeySteps:
    """`keys` steps whose gaps grow linearly: close together early (or late) in the run."""
    _check_keys(steps, keys)
    parts = [index / keys for index in range(keys)]
    if dense == "early":
        return place(steps, [part**2 * steps for part in parts])
    if dense == "late":
        return place(steps, [(1 - (1 - part) ** 2) * steps for part in parts])
    raise LeansdError(f"key steps can be dense 'early' or 'late', not {dense!r}")


def centred_power(steps: int, keys: int, centre: float, power: float = 1.4) -> KeySteps:
    """`keys` steps that lie closest around step `centre`, the more so the larger `power` is.

    DeepCache's non-uniform schedule with the sign taken care of: evenly spaced values `x` become
    `centre + sign(x) |x|^power`. `power = 1` is uniform.
    """
    _check_keys(steps, keys)
    check_power(power)
    if not 0 <= centre <= steps:
        raise LeansdError(f"centre must lie in the run of {steps} steps, not at {centre}")
    first, last = -(centre ** (1 / power)), (steps - centre) ** (1 / power)
    values = [first + (last - first) * index / keys for index in range(keys)]
    return place(steps, [centre + math.copysign(abs(value) ** power, value) for value in values])


def staged(steps: int, intervals: Mapping[int, int]) -> KeySteps:
    """Another interval from each given step on: `{0: 1, 5: 3, 20: 5}`."""
    if 0 not in intervals:
        raise LeansdError("staged intervals need one that starts at step 0, as in {0: 2, 10: 4}")
    for interval in intervals.values():
        check_interval(interval)
    keys: list[int] = []
    starts = sorted(start for start in intervals if start < steps)
    for start, stop in zip(starts, [*starts[1:], steps], strict=True):
        keys.extend(range(start, stop, intervals[start]))
    return tuple(keys)


def window(steps: int, keys: Iterable[int], start: int = 0, stop: int | None = None) -> KeySteps:
    """The given key steps inside `start <= step < stop`; outside, every step is a key step."""
    stop = steps if stop is None else stop
    if not 0 <= start <= stop <= steps:
        raise LeansdError(f"window {start}..{stop} does not lie in a run of {steps} steps")
    inside = {key for key in keys if start <= key < stop}
    return tuple(sorted({0} | inside | set(range(start)) | set(range(stop, steps))))


def explicit(steps: int, keys: Iterable[int]) -> KeySteps:
    """Key steps as listed, checked."""
    chosen = sorted(set(keys))
    if not chosen or chosen[0] != 0:
        raise LeansdError(
            "the first step, 0, must be a key step: there is nothing to inherit before it"
        )
    if chosen[-1] >= steps:
        raise LeansdError(
            f"key step {chosen[-1]} lies outside a run of {steps} steps (0..{steps - 1})"
        )
    return tuple(chosen)


def place(steps: int, positions: Sequence[float]) -> KeySteps:
    """Rising positions as distinct steps, the first of them 0, each moved as little as needed."""
    placed: list[int] = []
    for index, position in enumerate(positions):
        lowest = placed[-1] + 1 if placed else 0
        highest = steps - (len(positions) - index)
        placed.append(min(max(round(position), lowest), highest))
    return (0, *placed[1:])


def interpolate(values: Sequence[float], position: float) -> float:
    """`values` at a fractional index, held constant beyond the ends."""
    position = min(max(position, 0.0), len(values) - 1.0)
    low = min(int(position), len(values) - 2)
    return values[low] + (values[low + 1] - values[low]) * (position - low)


def check_interval(interval: int) -> None:
    """Refuse an interval between key steps that is none."""
    if interval < 1:
        raise LeansdError(f"interval must be at least 1, not {interval}")


def check_power(power: float) -> None:
    """Refuse a power that spreads key steps the wrong way, or beyond any run."""
    if not 1 <= power <= MOST_POWER:
        raise LeansdError(f"power must lie between 1 and {MOST_POWER}, not {power:g}")


def _check_keys(steps: int, keys: int) -> None:
    if not 1 <= keys <= steps:
        raise LeansdError(f"a run of {steps} steps has 1 to {steps} key steps, not {keys}")
