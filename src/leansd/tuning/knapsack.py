"""The knapsack of a cut, solved exactly: what to take so that enough is saved at the least error.

Costs are whole ticks, errors add up. What excludes one another is a tree: an `Item` is taken or
left, the parts of `Every` are decided each for itself, of `Either` one way is gone. The answer is
the whole front: for every saving the least error, so one solution serves all budgets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import TypeAlias

import numpy as np


@dataclass(frozen=True, slots=True)
class Choice:
    """Items that are taken together."""

    ticks: int
    """What they save."""
    error: float
    names: tuple[str, ...]


ChoiceFront: TypeAlias = tuple[Choice, ...]
"""Choices of rising savings and errors, each with the least error of all that save as much."""

NOTHING = Choice(0, 0.0, ())


class Node(ABC):
    """A part of the problem; one that is in several places is solved once."""

    @cached_property
    def front(self) -> ChoiceFront:
        """The best choices that there are in it."""
        return self._solve()

    @abstractmethod
    def _solve(self) -> ChoiceFront: ...


@dataclass(frozen=True)
class Item(Node):
    """What can be taken or left."""

    name: str
    error: float
    """Not negative."""
    ticks: int

    def _solve(self) -> ChoiceFront:
        taken = Choice(self.ticks, self.error, (self.name,))
        return (NOTHING, taken) if self.ticks > 0 else (NOTHING,)


@dataclass(frozen=True)
class Every(Node):
    """Parts that do not touch one another; each is decided for itself."""

    parts: Sequence[Node]

    def _solve(self) -> ChoiceFront:
        return reduce(_combine, (part.front for part in self.parts), (NOTHING,))


@dataclass(frozen=True)
class Either(Node):
    """Ways of which only one can be gone."""

    ways: Sequence[Node]

    def _solve(self) -> ChoiceFront:
        choices = [choice for way in self.ways for choice in way.front]
        ticks, errors = _list_numbers(choices)
        return tuple(choices[place] for place in _list_best(ticks, errors))


def find_best(front: ChoiceFront, ticks: int) -> Choice | None:
    """The choice of least error that saves `ticks` or more; None where nothing saves as much."""
    return next((choice for choice in front if choice.ticks >= ticks), None)


def _combine(one: ChoiceFront, other: ChoiceFront) -> ChoiceFront:
    """All choices of one front with all of another; only the best are made."""
    (ticks, errors), (more_ticks, more_errors) = _list_numbers(one), _list_numbers(other)
    sums = np.add.outer(ticks, more_ticks).ravel(), np.add.outer(errors, more_errors).ravel()
    pairs = (divmod(place, len(other)) for place in _list_best(*sums))
    return tuple(_join(one[left], other[right]) for left, right in pairs)


def _join(one: Choice, other: Choice) -> Choice:
    return Choice(one.ticks + other.ticks, one.error + other.error, one.names + other.names)


def _list_numbers(choices: Sequence[Choice]) -> tuple[np.ndarray, np.ndarray]:
    ticks = np.array([choice.ticks for choice in choices])
    return ticks, np.array([choice.error for choice in choices])


def _list_best(ticks: np.ndarray, errors: np.ndarray) -> Iterable[int]:
    """Places of the choices that no other beats in both, by rising savings."""
    order = np.lexsort((errors, -ticks))  # most saved first, of equals the least error
    least = np.minimum.accumulate(errors[order])
    better = np.concatenate([[True], errors[order][1:] < least[:-1]])
    return order[better][::-1].tolist()
