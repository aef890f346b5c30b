"""How far a tuning is: runs of the calls, counted; how many a speed will take shows only then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from leansd.tuning.calibration import PROBES
from leansd.tuning.proposals import FEWER, FINALISTS

REGIMES = 3
"""About how many there are."""
POLISHING = 8
"""About how many runs it takes to fit all corrections of a plan together."""

Tell: TypeAlias = Callable[[str, float], None]
"""Told in a few words what goes on, and the share of the work that is done."""


@dataclass
class Progress:
    """Counts runs of the calls; how many a speed will take is known only after it."""

    tell: Tell
    tries: int
    speeds: int
    grids: int
    done: float = 0.0

    @property
    def _first(self) -> int:
        # Profiling counts as two runs, the held-out full run as one.
        return 2 + len(PROBES) + self.grids + 1

    @property
    def _each(self) -> int:
        tried = self.grids + (REGIMES - 1) * FEWER + self.tries
        return tried + FINALISTS * (POLISHING + 1) + 1

    def add(self, text: str, runs: int = 1) -> None:
        self.done += runs
        self._say(text)

    def end_speed(self, place: int) -> None:
        self.done = self._first + (place + 1) * self._each
        self._say("next speed" if place + 1 < self.speeds else "done")

    def _say(self, text: str) -> None:
        self.tell(text, min(1.0, self.done / (self._first + self.speeds * self._each)))
