"""What a rival is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TypeAlias

from leansd.evaluation.contest import Contestant, Grounds
from leansd.plans.presets import PRESETS

Send: TypeAlias = Callable[[Grounds], Sequence[Contestant]]


@dataclass(frozen=True)
class Rival:
    """A family of contestants.

    Attributes:
        send: its contestants; none where it has nothing to offer a contest.
        package: what has to be installed, as pip calls it.
        module: what is imported of it.
        preset: what has to be there where it is a plan.
        competes: whether it is held against ours; what builds on ours is only shown.
    """

    name: str
    summary: str
    send: Send
    package: str = ""
    module: str = ""
    preset: str = ""
    competes: bool = True

    def find_obstacle(self) -> str:
        """Why it cannot take part; empty where it can."""
        if self.module and find_spec(self.module) is None:
            return f"{self.package} is not installed (pip install {self.package})"
        if self.preset and self.preset not in PRESETS:
            return f"there is no preset {self.preset}"
        return ""
