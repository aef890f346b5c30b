"""Rivals: what a user would take instead. A new one is a module here and a line in `ALL`.

Each sends contestants to a contest. One whose package or preset is not there sends none and says
why; nothing is ever installed.
"""

from __future__ import annotations

from leansd.errors import LeansdError
from leansd.evaluation.rivals import deepcache, fewer, schedules, tgate, tomesd
from leansd.evaluation.rivals.rival import Rival

__all__ = ["ALL", "Rival", "choose_rivals"]

ALL: dict[str, Rival] = {
    rival.name: rival
    for rival in (
        fewer.FEWER,
        fewer.OTHERS,
        deepcache.DEEPCACHE,
        tgate.TGATE,
        tgate.TGATE_PLAN,
        tomesd.TOMESD,
        tomesd.COMPOSED,
        schedules.EASYCACHE,
        schedules.SPECTRUM,
        schedules.CUTOFF,
    )
}


def choose_rivals(names: str) -> list[Rival]:
    """Rivals from a list such as `fewer,deepcache`; `all` is every one.

    Raises:
        LeansdError: there is no such rival.
    """
    if names == "all":
        return list(ALL.values())
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in ALL:
            raise LeansdError(f"no rival {name!r} (there are all, {', '.join(ALL)})")
    return [ALL[name] for name in dict.fromkeys(chosen)]
