"""Drift as data: how far something may change before a plan's inheritance is called off.

A plan with a drift is a frame. Its key steps are computed as ever; at the others a picture inherits
only while a cheap probe, which is computed anyway, has drifted less than a threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from leansd.errors import LeansdError

SAMPLE = "sample"
"""As a probe: the latents that the UNet is given, known before anything is computed."""

Measure = Literal["change", "predicted"]
"""What is compared with the threshold; both are relative, in sums of absolute values.

`change`     the probe now against the probe when the picture was last computed in full.
`predicted`  the output's change as predicted from the probe's, call by call, and added up since the
             picture was last computed in full (EasyCache, arXiv 2507.02860): the probe's change
             since the call before, times how much the output changed for the probe's change between
             the last two full computations, over the last computed output.
"""
MEASURES: tuple[Measure, ...] = get_args(Measure)


@dataclass(frozen=True)
class Drift:
    """Inherit while the drift of `probe` is below `threshold`, each picture on its own."""

    probe: str
    """Address of a unit that runs before anything inherits, or `sample`."""
    threshold: float
    """0 computes everything, infinity follows the plan."""
    measure: Measure = "change"

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise LeansdError(f"a drift's threshold must be 0 or more, not {self.threshold}")
        if self.measure not in MEASURES:
            known = ", ".join(MEASURES)
            raise LeansdError(f"unknown measure of drift {self.measure!r}; there are {known}")

    def __str__(self) -> str:
        what = "change of" if self.measure == "change" else "output change predicted from"
        return f"inherits while the {what} {self.probe} is below {self.threshold:g}"
