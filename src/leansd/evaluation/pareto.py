"""Pareto fronts: what no other point beats in both of two numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np

Point = TypeVar("Point")


def find_front(
    points: Iterable[Point], rate: Callable[[Point], tuple[float, float]]
) -> list[Point]:
    """The points that no other one dominates, the least of the first number first.

    Args:
        rate: two numbers of a point, such as speed and quality; more is better.
    """
    every = list(points)
    first, second = np.array([rate(each) for each in every], dtype=float).reshape(-1, 2).T
    return [every[place] for place in list_front(first, second)]


def list_front(first: np.ndarray, second: np.ndarray) -> list[int]:
    """The places in two arrays of numbers [n] of the points on their front, in the same order."""
    order = np.lexsort((-second, -first))
    best = np.maximum.accumulate(second[order])
    better = np.ones(len(order), dtype=bool)
    better[1:] = best[1:] > best[:-1]
    return order[better][::-1].tolist()
