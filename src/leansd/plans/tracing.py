"""The former name of `leansd.plans.compile`."""

from leansd.plans.compile import compile_plan

__all__ = ["compile_plan"]
