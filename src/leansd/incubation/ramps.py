"""How a learning rate or the weight of a loss goes over a stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

RampName = Literal["constant", "rise", "fall", "cosine"]
RAMPS: Mapping[RampName, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "rise": lambda progress: progress,
    "fall": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 + 0.5 * math.cos(math.pi * progress),
}
"""A factor by the share of a stage that is done, in [0, 1)."""


def warm_up(step: int, warmup: int) -> float:
    """The factor of the learning rate in the first `warmup` steps: up in a line."""
    return min(1.0, (step + 1) / (warmup + 1))
