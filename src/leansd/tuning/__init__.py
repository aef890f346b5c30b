"""Tuning: the plan that loses least at a given speed, the cut that loses least at a given cost."""

from leansd.tuning.cutting import Cut, cut
from leansd.tuning.front import Front, Point
from leansd.tuning.tuner import tune

__all__ = ["Cut", "Front", "Point", "cut", "tune"]
