"""Pareto fronts: what no other point beats in both of two numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

Point = TypeVar("Point")


def find_front(
    points: Iterable[Point], rate: Callable[[Point], tuple[float, float]]
) -> list[Point]:
    """The points that no other one dominates, the least of the first number first.

    Args:
        rate: two numbers of a point, such as speed and quality; more is better.
    """
    front: list[Point] = []
    for point in sorted(points, key=rate, reverse=True):
        if not front or rate(point)[1] > rate(front[-1])[1]:
            front.append(point)
    return front[::-1]
