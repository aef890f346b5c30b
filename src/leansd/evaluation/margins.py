"""Fronts: what each family of contestants reaches at a speed, and by how much ours is better.

A measured point counts for every speed up to its own: who is faster than asked is good enough.
Between neighbouring points of its front a rival is taken to reach what lies on the line between
them, over the logarithm of the speed; ours is only what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Point:
    """One contestant: how many times faster than the full run, and a quality; more is better."""

    name: str
    speed: float
    quality: float


@dataclass(frozen=True)
class Margin:
    """Ours against the best rival at one speed; what nobody reaches is None."""

    speed: float
    ours: Point | None
    rival: Point | None
    family: str = ""

    @property
    def value(self) -> float | None:
        """By how much ours is better."""
        if self.ours is None or self.rival is None:
            return None
        return self.ours.quality - self.rival.quality


def find_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in both speed and quality, slowest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda each: (-each.speed, -each.quality)):
        if not front or point.quality > front[-1].quality:
            front.append(point)
    return front[::-1]


def read_points(points: Sequence[Point], speed: float) -> Point | None:
    """The best measured point that is at least so fast."""
    fast = [point for point in points if point.speed >= speed]
    return max(fast, key=lambda point: point.quality, default=None)


def read_front(points: Sequence[Point], speed: float) -> Point | None:
    """The best that a family reaches at a speed, between its measured points too."""
    front = find_front(points)
    for slow, fast in pairwise(front):
        if slow.speed < speed < fast.speed:
            share = math.log(speed / slow.speed) / math.log(fast.speed / slow.speed)
            quality = slow.quality + share * (fast.quality - slow.quality)
            return Point(f"{slow.name} to {fast.name}", speed, quality)
    return read_points(front, speed)


def find_margin(
    ours: Sequence[Point], rivals: Mapping[str, Sequence[Point]], speed: float
) -> Margin:
    """Ours against the best of all rivals, by family, at a speed."""
    reached = {family: read_front(points, speed) for family, points in rivals.items()}
    there = {family: point for family, point in reached.items() if point is not None}
    own = read_points(ours, speed)
    if not there:
        return Margin(speed, own, None)
    best = max(there, key=lambda family: there[family].quality)
    return Margin(speed, own, there[best], best)
