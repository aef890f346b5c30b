"""The DeepCache package (Ma et al., arXiv 2312.00858) through its own helper."""

from __future__ import annotations

import importlib
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from leansd.evaluation.contest import Contestant, Enter, Grounds, keep_forwards
from leansd.evaluation.rivals.rival import Rival

INTERVALS = {True: (2, 3, 5), False: (2, 3)}
BRANCHES = {True: (0, 1, 2), False: (0,)}
SHALLOW = 0.2
"""About what a step between two full ones costs, by branch 0."""


def send_deepcache(grounds: Grounds) -> list[Contestant]:
    """Every interval and branch in long contests, the shallowest branch in others."""
    contest = grounds.contest
    return [
        Contestant(
            f"deepcache 1:{interval} b{branch}",
            "deepcache",
            contest.steps,
            (1 + (interval - 1) * SHALLOW * (1 + branch)) / interval,
            cache(interval, branch),
        )
        for branch in BRANCHES[contest.is_long]
        for interval in INTERVALS[contest.is_long]
    ]


def cache(interval: int, branch: int) -> Enter:
    """The package's helper, a fresh one each time.

    Used again, a helper counts from the first time step of its first run, which is wrong for
    image-to-image of another strength.
    """

    @contextmanager
    def enter(pipe: Any) -> Generator[Any]:
        package = importlib.import_module("DeepCache")
        with keep_forwards(pipe.unet):
            helper = package.DeepCacheSDHelper(pipe=pipe)
            helper.set_params(cache_interval=interval, cache_branch_id=branch)
            helper.enable()
            try:
                yield pipe
            finally:
                helper.disable()

    return enter


DEEPCACHE = Rival(
    "deepcache", "the DeepCache package", send_deepcache, package="DeepCache", module="DeepCache"
)
