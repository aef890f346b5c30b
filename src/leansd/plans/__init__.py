"""Plans as pure data: addresses, key steps, plans, liveness, presets, drawing. Imports no torch."""

from leansd.plans.anatomy import Anatomy, Selection, Unit
from leansd.plans.plan import Plan
from leansd.plans.presets import preset
from leansd.plans.row import How, Row

__all__ = ["Anatomy", "How", "Plan", "Row", "Selection", "Unit", "preset"]
