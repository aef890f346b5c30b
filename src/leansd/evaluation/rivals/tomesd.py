"""Token merging (Bolya and Hoffman, arXiv 2303.17604) through its package, alone and with ours.

It makes every step cheaper rather than steps fewer, so it composes with all others.
"""

from __future__ import annotations

import importlib
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from leansd.evaluation.contest import OURS, Contestant, Enter, Grounds, follow, run_plain, send_plan
from leansd.evaluation.rivals.rival import Rival

RATIO = 0.5
"""Of tokens that are merged away, the package's own default."""


def send_merging(grounds: Grounds) -> list[Contestant]:
    """Full runs with merged tokens."""
    if not grounds.contest.is_long:
        return []
    return [Contestant("tomesd", "tomesd", grounds.contest.steps, 1.0, merge(run_plain))]


def send_composed(grounds: Grounds) -> list[Contestant]:
    """Ours with merged tokens."""
    if not grounds.contest.is_long:
        return []
    alone = [(plan, send_plan(grounds, plan, plan.name, OURS)) for plan in grounds.own]
    return [
        Contestant(
            f"{plan.name} + tomesd",
            "ours+tomesd",
            plan.steps,
            each.cost,
            merge(follow(plan)),
            plan.fingerprint,
        )
        for plan, each in alone
    ]


def merge(other: Enter) -> Enter:
    """Tokens merged under whatever else is done to the pipeline."""

    @contextmanager
    def enter(pipe: Any) -> Generator[Any]:
        package = importlib.import_module("tomesd")
        package.apply_patch(pipe, ratio=RATIO)
        try:
            with other(pipe) as called:
                yield called
        finally:
            package.remove_patch(pipe)
            for part in pipe.unet.modules():
                vars(part).pop("_tome_info", None)

    return enter


TOMESD = Rival("tomesd", "token merging", send_merging, package="tomesd", module="tomesd")
COMPOSED = Rival(
    "ours+tomesd",
    "ours with token merging",
    send_composed,
    package="tomesd",
    module="tomesd",
    competes=False,
)
