"""The processes that train together."""

from __future__ import annotations

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def read_processes() -> PartialState:
    """Which of how many processes this is, as `accelerate launch` has started it.

    Without the flag accelerate takes each of several processes on CPUs for the only one.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
