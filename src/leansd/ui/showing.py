"""What the page shows of what the studio knows: new values for its components."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

import gradio as gr

from leansd.evaluation.prompts import choose_prompts
from leansd.plans.plan import Plan
from leansd.ui import fragments
from leansd.ui.cells import Tier, lay_out_grid
from leansd.ui.history import Entry, Settings, list_entries
from leansd.ui.page import Parts
from leansd.ui.studio import Model, Studio
from leansd.ui.tickets import Desk

Changes: TypeAlias = dict[Any, Any]
"""New values by component."""


class Showing:
    """Values for the components of one page."""

    def __init__(self, studio: Studio, desk: Desk, parts: Parts) -> None:
        self.studio, self.desk, self.parts = studio, desk, parts

    def show_plan(self, plan: Plan, settings: Settings, tier: Tier) -> Changes:
        """Everything that shows the plan in hand."""
        parts, model = self.parts, self.studio.open(settings.model)
        return {
            parts.plan: plan,
            parts.grid: asdict(lay_out_grid(plan, model.anatomy, tier)),
            **self.show_forecast(plan, model, settings),
            parts.lanes: fragments.show_lanes(fragments.list_beats(plan, model.anatomy)),
        }

    def show_forecast(self, plan: Plan, model: Model, settings: Settings) -> Changes:
        forecast = self.studio.forecast(plan, model, guided=settings.guidance > 1)
        shown = fragments.show_forecast(plan, forecast)
        return dict.fromkeys((self.parts.forecast, self.parts.prediction), shown)

    def show_model(self, model: Model) -> Changes:
        parts = self.parts
        measured = fragments.show_profile(model.profiled) if model.profiled is not None else ""
        return {
            parts.guidance: model.guidance,
            parts.anatomy: fragments.show_anatomy(model),
            parts.costs: measured,
            parts.prompts: "\n".join(choose_prompts(model.name, 6)),
        }

    def show_history(self) -> Changes:
        entries = list_entries(self.studio.folders.history)
        shown = [(str(entry.lean), entry.caption) for entry in entries]
        return {self.parts.gallery: shown, self.parts.keys: [entry.key for entry in entries]}

    def show_entry(self, entry: Entry, warnings: Sequence[str] = ()) -> Changes:
        parts = self.parts
        full, lean = entry.open_pictures()
        return {
            parts.full: full,
            parts.lean: lean,
            parts.slider: gr.update(value=(full, lean), visible=True),
            parts.numbers: fragments.show_numbers(entry, warnings),
        }
