"""The former name of `leansd.plans.row`."""

from leansd.plans.row import Attend, Gates, check_gates, resolve_gates

__all__ = ["Attend", "Gates", "check_gates", "resolve_gates"]
