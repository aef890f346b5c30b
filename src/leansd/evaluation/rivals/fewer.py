"""Fewer steps: what everybody can do without any package, and what every plan has to beat."""

from __future__ import annotations

from leansd.evaluation.contest import Contestant, Grounds
from leansd.evaluation.rivals.rival import Rival

SHARES = {
    True: (1.2, 1.4, 1.6, 1.8, 2.0, 2.3, 2.7, 3.2, 4.0),
    False: (1.4, 1.8, 2.3, 3.2),
}
"""Times fewer steps, in long contests and in others."""
OTHER_SHARES = {True: (1.4, 1.8, 2.3, 3.2), False: (1.8, 2.3, 3.2)}
"""The same with other samplers."""


def send_fewer(grounds: Grounds) -> list[Contestant]:
    """The same sampler with fewer steps."""
    contest = grounds.contest
    counts = {max(1, round(contest.steps / share)) for share in SHARES[contest.is_long]}
    return [
        Contestant(f"{count} steps", "fewer", count, count / contest.steps)
        for count in sorted(counts - {contest.steps}, reverse=True)
    ]


def send_others(grounds: Grounds) -> list[Contestant]:
    """Other samplers with fewer steps: better or worse than the full run under the converged run,
    whatever they do to its own picture."""
    contest = grounds.contest
    shares = OTHER_SHARES[contest.is_long]
    counts = sorted({max(1, round(contest.steps / share)) for share in shares}, reverse=True)
    return [
        Contestant(
            f"{count} steps of {sampler}", "samplers", count, count / contest.steps, sampler=sampler
        )
        for sampler in grounds.others
        for count in counts
    ]


FEWER = Rival("fewer", "fewer steps of the same sampler", send_fewer)
OTHERS = Rival("samplers", "fewer steps of other samplers", send_others)
