"""Tuning: find the plan that loses least at a given speed, for one model, sampler and machine."""

from leansd.tuning.front import Front, Point
from leansd.tuning.tuner import tune

__all__ = ["Front", "Point", "tune"]
