"""The former name of `leansd.plans.row`."""

from leansd.plans.row import SAMPLE, Drift, Measure

__all__ = ["SAMPLE", "Drift", "Measure"]
