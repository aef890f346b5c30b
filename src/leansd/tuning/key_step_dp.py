"""Dynamic programming over key steps: the least error for every budget, in the error model.

The errors of segments add up and each depends on the last three key steps before it, and on what
those run, so a state is those three. Costs are counted in whole ticks, and for every state and
number of ticks the least error is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from leansd.tuning.error_model import Action, Key

Keys: TypeAlias = tuple[Key, ...]
Judge: TypeAlias = Callable[[Keys, int, Action], float]
"""`(last key steps, end of the segment, action) -> error`."""

MEMORY = 3
"""How many key steps the error of a segment can depend on."""


@dataclass(frozen=True)
class Segment:
    """From a key step up to the next one, or to the end of the run."""

    key: Key
    end: int
    action: Action


@dataclass(frozen=True)
class Proposal:
    """The best sequence of segments within some budget."""

    segments: tuple[Segment, ...]
    error: float
    ticks: int

    @property
    def keys(self) -> Keys:
        return tuple(segment.key for segment in self.segments)


def find_best(
    count: int,
    judge: Judge,
    costs: Mapping[Action, int],
    key_costs: Sequence[int],
    budgets: Sequence[int],
    *,
    longest: int,
) -> list[Proposal | None]:
    """The proposal of least error within each budget, in ticks; None where it is too small.

    Args:
        count: UNet calls of a run, the first of which is a key step.
        costs: ticks of a step between key steps, by what it does.
        key_costs: ticks of a key step, by what it runs.
        longest: the most steps between two key steps.
    """
    most = max(0, *budgets)
    actions = list(costs)
    table: dict[Keys, _Reached] = {}
    done = _Reached(most)
    states: list[Keys] = []
    number: dict[Keys, int] = {}

    def find(state: Keys) -> _Reached:
        if state not in table:
            table[state] = _Reached(most)
            number[state] = len(states)
            states.append(state)
        return table[state]

    for variant, cost in enumerate(key_costs):
        if cost <= most:
            find((Key(0, variant),)).errors[cost] = 0.0
    for step in range(count):
        for state in [state for state in states if state[-1].step == step]:
            reached = table[state].errors
            for end in range(step + 1, min(step + longest + 1, count) + 1):
                between = end - step - 1
                for place, action in enumerate(actions if between else actions[:1]):
                    error = judge(state, end, action)
                    if not np.isfinite(error):
                        continue
                    for variant, cost in enumerate(key_costs if end < count else (0,)):
                        spent = between * costs[action] + cost
                        if spent > most:
                            continue
                        after = (*state, Key(end, variant))[-MEMORY:]
                        target = done if end == count else find(after)
                        total = reached[: most + 1 - spent] + error
                        target.improve(total, spent, number[state], place)
    proposals: list[Proposal | None] = []
    for budget in budgets:
        ticks = int(done.errors[: max(budget, 0) + 1].argmin())
        if budget < 0 or not np.isfinite(done.errors[ticks]):
            proposals.append(None)
            continue
        error, spent = float(done.errors[ticks]), ticks
        segments: list[Segment] = []
        at: _Reached = done
        end, after = count, None
        while at.states[ticks] >= 0:
            state = states[int(at.states[ticks])]
            action = actions[int(at.actions[ticks])]
            segments.append(Segment(state[-1], end, action))
            step, cost = state[-1].step, 0 if after is None else key_costs[after.variant]
            ticks -= (end - step - 1) * costs[action] + cost
            at, end, after = table[state], step, state[-1]
        proposals.append(Proposal(tuple(reversed(segments)), error, spent))
    return proposals


class _Reached:
    """For every number of ticks: the least error of getting somewhere, and where from and how."""

    def __init__(self, most: int) -> None:
        self.errors = np.full(most + 1, np.inf)
        self.states = np.full(most + 1, -1)
        self.actions = np.zeros(most + 1, dtype=int)

    def improve(self, total: np.ndarray, spent: int, state: int, action: int) -> None:
        """Take what is better of `total`, the errors at `spent` ticks and on."""
        places = np.flatnonzero(total < self.errors[spent:])
        self.errors[places + spent] = total[places]
        self.states[places + spent] = state
        self.actions[places + spent] = action
