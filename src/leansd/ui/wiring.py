"""What the page does: every event, and what it changes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gradio as gr

from leansd.errors import LeansdError
from leansd.faces.costs import Profiled
from leansd.faces.fronts import describe_choice
from leansd.plans.liveness import GUIDANCE
from leansd.plans.plan import Plan
from leansd.ui import fragments
from leansd.ui.cells import (
    EDITED,
    Brush,
    Tier,
    change_cells,
    describe_cell,
    find_brush,
    lay_out_grid,
    turn_guidance,
    turn_key,
)
from leansd.ui.duels import Progress
from leansd.ui.history import read_entry
from leansd.ui.page import MOST_STEPS
from leansd.ui.reading import explain, explain_all, read_cells, read_settings
from leansd.ui.showing import Changes, Showing
from leansd.ui.studio import SAVED, Drawn, Tuned, fit_plan
from leansd.ui.tickets import Done, Stopped, follow

DEVICE = "device"
"""The name of the queue in which all that computes stands."""
TUNED = "tuned"


class Wiring(Showing):
    """The handlers of one page; what a session has in hand is in its components."""

    # -- settings ------------------------------------------------------------------------------

    @explain_all
    def begin(self, choice: str, tier: Tier, *given: Any) -> Iterator[Changes]:
        """A page that has just been opened."""
        parts, names = self.parts, self.studio.folders.list_models()
        settings = read_settings(*given)
        model = self.studio.open(settings.model)
        settings = settings.model_copy(update={"guidance": model.guidance})
        plan = self.studio.make_plan(choice, settings)
        yield {
            parts.model: gr.update(choices=names),
            parts.plan_name: gr.update(choices=self.studio.list_plans(), value=choice),
            **self.show_model(model),
            **self.show_plan(plan, settings, tier),
            **self.show_history(),
        }

    @explain
    def pick_model(self, choice: str | None, tier: Tier, *given: Any) -> Changes:
        """Another model: its own guidance, and the plan anew."""
        settings = read_settings(*given)
        model = self.studio.open(settings.model)
        settings = settings.model_copy(update={"guidance": model.guidance})
        choice = choice or "balanced"
        plan = self.studio.make_plan(choice, settings)
        return {
            self.parts.plan_name: choice,
            **self.show_model(model),
            **self.show_plan(plan, settings, tier),
        }

    @explain
    def pick_plan(self, choice: str | None, tier: Tier, *given: Any) -> Changes:
        """Another plan; a saved one brings its own number of steps."""
        settings = read_settings(*given)
        if choice is None:
            return {}
        if choice.startswith(SAVED):
            own = self.studio.folders.load_plan(choice.removeprefix(SAVED))
            settings = settings.model_copy(update={"steps": min(own.steps, MOST_STEPS)})
        plan = self.studio.make_plan(choice, settings)
        return {self.parts.steps: settings.steps, **self.show_plan(plan, settings, tier)}

    @explain
    def pick_steps(self, plan: Plan | None, choice: str | None, tier: Tier, *given: Any) -> Changes:
        """Other steps or another sampler: presets fit themselves, other plans are stretched."""
        settings = read_settings(*given)
        if choice is not None and not choice.startswith(SAVED):
            plan = self.studio.make_plan(choice, settings)
        if plan is None:
            return {}
        return self.show_plan(fit_plan(plan, settings.steps), settings, tier)

    def roll(self) -> int:
        """Another seed."""
        return random.randrange(1, 1_000_000)

    # -- plans ---------------------------------------------------------------------------------

    @explain
    def pick_tier(self, plan: Plan | None, tier: Tier, *given: Any) -> Changes:
        if plan is None:
            return {}
        model = self.studio.open(read_settings(*given).model)
        return {self.parts.grid: asdict(lay_out_grid(plan, model.anatomy, tier))}

    @explain
    def edit(
        self, event: gr.EventData, plan: Plan | None, tier: Tier, brush: Brush, *given: Any
    ) -> Changes:
        """Clicked, painted or typed on: cells, a row's name, or a step's head."""
        if plan is None:
            return {}
        settings = read_settings(*given)
        anatomy = self.studio.open(settings.model).anatomy
        kind, cells = read_cells(event, plan)
        at, step = cells[0]
        if kind == "step":
            changed = turn_key(plan, anatomy, step, brush)
        elif at == GUIDANCE:
            steps = range(1, plan.steps) if kind == "line" else [s for a, s in cells if a == at]
            changed = turn_guidance(plan, anatomy, steps)
        elif kind == "line":
            meant = find_brush(plan, anatomy, at, plan.steps - 1, brush)
            every = [(at, each) for each in range(1, plan.steps)]
            changed = change_cells(plan, anatomy, every, meant)
        else:
            meant = find_brush(plan, anatomy, at, step, brush)
            inside = [cell for cell in cells if cell[0] != GUIDANCE]
            changed = change_cells(plan, anatomy, inside, meant)
        grid = lay_out_grid(changed, anatomy, tier)
        told = describe_cell(grid, at, step) if kind == "cells" else ""
        return {
            self.parts.plan_name: None,
            self.parts.cell: fragments.show_note(told) if told else "",
            **self.show_plan(changed, settings, tier),
        }

    @explain
    def save_plan(self, plan: Plan | None, name: str, *given: Any) -> Changes:
        if plan is None:
            raise LeansdError("there is no plan to save yet")
        wanted = name.strip() or plan.name.removesuffix(EDITED)
        path = self.studio.folders.save_plan(plan, wanted)
        settings, saved = read_settings(*given), plan.rename(path.stem)
        return {
            self.parts.plan: saved,
            **self.show_forecast(saved, self.studio.open(settings.model), settings),
            self.parts.save_name: path.stem,
            self.parts.plan_name: gr.update(
                choices=self.studio.list_plans(), value=SAVED + path.stem
            ),
            self.parts.download: gr.update(value=str(path), interactive=True),
            self.parts.cell: fragments.show_note(f"saved as {path.name}"),
        }

    @explain
    def load_plan(self, path: str, tier: Tier, *given: Any) -> Changes:
        """A plan file from the visitor's own machine."""
        try:
            plan = Plan.load(path)
        except LeansdError as error:
            # The path is one of the page's own, which says nothing to who chose the file.
            raise LeansdError(str(error).replace(str(path), Path(path).name)) from None
        if plan.steps > MOST_STEPS:
            raise LeansdError(f"plan {plan.name} has {plan.steps} steps, the page {MOST_STEPS}")
        settings = read_settings(*given).model_copy(update={"steps": plan.steps})
        self.studio.check_plan(plan, self.studio.open(settings.model))
        return {
            self.parts.steps: plan.steps,
            self.parts.plan_name: None,
            self.parts.cell: fragments.show_note(f"loaded {plan.name}"),
            **self.show_plan(plan, settings, tier),
        }

    # -- work ----------------------------------------------------------------------------------

    def set_busy(self, busy: bool) -> Changes:
        """What can be begun and stopped."""
        parts = self.parts
        begins = dict.fromkeys((parts.draw, parts.tune, parts.measure), not busy)
        stops = dict.fromkeys((parts.stop, parts.tune_stop, parts.measure_stop), busy)
        return {part: gr.update(interactive=on) for part, on in (begins | stops).items()}

    @explain
    def take_ticket(self, request: gr.Request) -> Changes:
        self.desk.issue(str(request.session_hash))
        before = self.desk.waiting - 1
        said = fragments.show_note(f"{before} before yours: it begins when they are over")
        turn = gr.update(value=said, visible=before > 0)
        return {self.parts.turn: turn, **self.set_busy(True)}

    def give_back(self, request: gr.Request) -> Changes:
        self.desk.close(str(request.session_hash))
        return {self.parts.turn: gr.update(visible=False), **self.set_busy(False)}

    def stop(self, request: gr.Request) -> None:
        self.desk.stop(str(request.session_hash))

    def leave(self, request: gr.Request) -> None:
        """The page was closed: nobody waits for its work."""
        self.desk.close(str(request.session_hash))

    @explain_all
    def draw(
        self, request: gr.Request, plan: Plan | None, rounds: float, *given: Any
    ) -> Iterator[Changes]:
        parts = self.parts
        settings = read_settings(*given)
        ticket = self.desk.find(str(request.session_hash))
        if plan is None:
            raise LeansdError("there is no plan yet: choose one")

        def hold(tell: Callable[[Progress], None]) -> Drawn:
            return self.studio.draw(settings, plan, rounds=int(rounds), ticket=ticket, tell=tell)

        beats = fragments.list_beats(plan, self.studio.open(settings.model).anatomy)
        last = None
        yield {
            parts.turn: gr.update(visible=False),
            parts.lanes: fragments.show_lanes(beats, None, "starting"),
            parts.tabs: gr.Tabs(selected="pictures"),
        }
        try:
            for told in follow(hold):
                if isinstance(told, Done):
                    drawn = told.result
                    lanes = fragments.show_lanes(beats, last and last.end())
                    yield {
                        parts.lanes: lanes,
                        **self.show_entry(drawn.entry, drawn.warnings),
                        **self.show_history(),
                    }
                else:
                    last = told
                    yield {parts.lanes: fragments.show_lanes(beats, told, describe(told))}
        except Stopped:
            yield {parts.lanes: fragments.show_lanes(beats, last, "stopped")}

    @explain_all
    def tune(
        self, request: gr.Request, speed: float, tries: float, prompts: str, tier: Tier, *given: Any
    ) -> Iterator[Changes]:
        parts = self.parts
        settings = read_settings(*given)
        ticket = self.desk.find(str(request.session_hash))
        lines = [line.strip() for line in (prompts or "").splitlines() if line.strip()]

        def seek(tell: Callable[[tuple[str, float]], None]) -> Tuned:
            return self.studio.tune(
                settings,
                lines,
                speedup=speed,
                tries=int(tries),
                ticket=ticket,
                tell=lambda text, share: tell((text, share)),
            )

        yield {
            parts.turn: gr.update(visible=False),
            parts.tuning: fragments.show_bar("starting", 0),
        }
        try:
            for told in follow(seek):
                if isinstance(told, Done):
                    tuned = told.result
                    plan = tuned.chosen.plan.rename(f"{TUNED} {speed:g}x")
                    found = settings.model_copy(update={"steps": plan.steps})
                    said = describe_choice(tuned.front, tuned.chosen)
                    yield {
                        parts.tuning: fragments.show_note(f"{said}. It is the plan in hand now.")
                        + fragments.show_front(tuned),
                        parts.steps: plan.steps,
                        parts.plan_name: None,
                        parts.save_name: plan.name,
                        **self.show_plan(plan, found, tier),
                    }
                else:
                    yield {parts.tuning: fragments.show_bar(*told)}
        except Stopped:
            told = "stopped; the same settings go on from here"
            yield {parts.tuning: fragments.show_note(told)}
        except LeansdError:
            yield {parts.tuning: ""}
            raise

    @explain_all
    def measure(self, request: gr.Request, plan: Plan | None, *given: Any) -> Iterator[Changes]:
        parts = self.parts
        settings = read_settings(*given)
        ticket = self.desk.find(str(request.session_hash))

        def probe(tell: Callable[[tuple[int, int]], None]) -> Profiled:
            return self.studio.profile(
                settings, ticket=ticket, tell=lambda run, runs: tell((run, runs))
            )

        yield {
            parts.turn: gr.update(visible=False),
            parts.costs: fragments.show_bar("warming up", 0),
        }
        try:
            for told in follow(probe):
                if isinstance(told, Done):
                    changes: Changes = {parts.costs: fragments.show_profile(told.result)}
                    if plan is not None:
                        model = self.studio.open(settings.model)
                        changes |= self.show_forecast(plan, model, settings)
                    yield changes
                else:
                    done, of = told
                    yield {
                        parts.costs: fragments.show_bar(f"probing run {done} of {of}", done / of)
                    }
        except Stopped:
            yield {parts.costs: fragments.show_note("stopped")}

    # -- history -------------------------------------------------------------------------------

    @explain
    def recall(self, event: gr.SelectData, keys: list[str], tier: Tier) -> Changes:
        """The settings, plan and pictures of a duel of the past."""
        parts = self.parts
        place = int(event.index)
        if not 0 <= place < len(keys):
            return {}
        entry = read_entry(self.studio.folders.history, keys[place])
        settings = entry.settings
        model = self.studio.open(settings.model)
        return {
            **self.show_model(model),
            parts.model: settings.model,
            parts.prompt: settings.prompt,
            parts.negative: settings.negative,
            parts.seed: settings.seed,
            parts.steps: settings.steps,
            parts.sampler: settings.sampler,
            parts.guidance: settings.guidance,
            parts.plan_name: None,
            parts.tabs: gr.Tabs(selected="pictures"),
            **self.show_plan(entry.plan, settings, tier),
            **self.show_entry(entry),
        }


def describe(progress: Progress) -> str:
    """What goes on, in words."""
    if progress.side is None:
        return "warming up: two steps that are not timed"
    turn = f", round {progress.turn + 1} of {progress.rounds}" if progress.rounds > 1 else ""
    return f"{fragments.NAMES[progress.side].lower()}{turn}: in turns, so that both times are true"
