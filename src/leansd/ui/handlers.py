"""What the page does: every event, and what it changes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial, wraps
from html import escape
from inspect import isgeneratorfunction
from pathlib import Path
from typing import Any, TypeAlias

import gradio as gr
from pydantic import ValidationError

from leansd.errors import LeansdError
from leansd.evaluation.prompt_sets import choose_prompts
from leansd.plans.liveness import GUIDANCE
from leansd.plans.plan import Plan
from leansd.report.plans import describe_choice
from leansd.text import explain_validation
from leansd.tuning.front import Front, Point
from leansd.ui import fragments
from leansd.ui.folders import OWN_SAMPLER, HistoryEntry, Settings, list_entries, read_entry
from leansd.ui.job_queue import Done, JobQueue, Stopped, follow
from leansd.ui.page import MOST_STEPS, Parts
from leansd.ui.plan_grid import (
    EDITED,
    change_cells,
    describe_cell,
    find_brush,
    lay_out_grid,
    turn_guidance,
    turn_key,
)
from leansd.ui.studio import SAVED, KnownModel, Studio

Given: TypeAlias = dict[Any, Any]
"""The values of `Parts.inputs`, by component."""
Changes: TypeAlias = dict[Any, Any]
"""New values, by component."""
TellPage: TypeAlias = Callable[..., None]

DEVICE = "device"
"""The name of the queue in which all that computes stands."""
# On a phone the pictures lie below the settings.
SHOW_RESULTS = (
    "() => { if (window.innerWidth < 800) document.getElementById('results')"
    ".scrollIntoView({behavior: 'smooth'}) }"
)


def connect(parts: Parts, handlers: Handlers) -> None:
    """Everything that happens on the page; called inside its blocks."""
    # A handler reads what it likes, and names what it may change.
    forecasts = [parts.forecast, parts.plan_forecast]
    plan = [parts.plan, parts.grid, *forecasts, parts.lanes]
    model = [parts.sampler, parts.guidance, parts.anatomy, parts.costs, parts.prompts]
    history = [parts.gallery, parts.keys]
    entry = [parts.full, parts.lean, parts.slider, parts.numbers]
    busy = [
        *(parts.draw, parts.tune, parts.measure, parts.turn),
        *(parts.stop, parts.tune_stop, parts.measure_stop),
    ]

    def listen(event: Any, handler: Any, shows: list[Any], **options: Any) -> Any:
        """One event, with no name to be called by from outside the page."""
        given = options.pop("inputs", parts.inputs)
        hidden = {"api_visibility": "private", "show_progress": "hidden"}
        return event(handler, given, shows, **hidden, **options)

    # Quick handlers do not wait for what computes; past the queue their errors would not be shown.
    quick = partial(listen, concurrency_id="page", concurrency_limit=8)
    slow = partial(listen, concurrency_id=DEVICE, concurrency_limit=1)

    listen(
        parts.blocks.load,
        handlers.begin,
        [parts.model, parts.plan_name, *model, *plan, *history],
    )
    parts.blocks.unload(handlers.leave)
    quick(parts.model.input, handlers.pick_model, [parts.plan_name, *model, *plan])
    quick(parts.plan_name.input, handlers.pick_plan, [parts.steps, *plan])
    for event in (parts.steps.input, parts.sampler.input, parts.guidance.input):
        quick(event, handlers.pick_steps, plan, trigger_mode="always_last")
    quick(parts.dice.click, handlers.roll, [parts.seed])
    edited = [parts.plan_name, parts.cell, *plan]
    quick(parts.grid.select, handlers.edit, edited, trigger_mode="multiple")
    quick(parts.tier.input, handlers.pick_tier, [parts.grid])
    saved = [parts.plan, parts.save_name, parts.plan_name, parts.download, parts.cell]
    for event in (parts.save.click, parts.save_name.submit):
        quick(event, handlers.save_plan, [*saved, *forecasts])
    loading = {*parts.inputs, parts.upload}
    quick(parts.upload.upload, handlers.load_plan, [parts.steps, *edited], inputs=loading)
    chosen = [parts.plan_name, parts.tabs, *parts.settings.values(), *model[2:], *plan, *entry]
    quick(parts.gallery.select, handlers.recall, chosen)

    drawn = [parts.lanes, parts.tabs, *entry, *history]
    found = [parts.tuning, parts.steps, parts.plan_name, parts.save_name, *plan]
    for event, handler, shows, js in (
        (parts.draw.click, handlers.draw, drawn, SHOW_RESULTS),
        (parts.prompt.submit, handlers.draw, drawn, SHOW_RESULTS),
        (parts.tune.click, handlers.tune, found, None),
        (parts.measure.click, handlers.measure, [parts.costs, *forecasts], None),
    ):
        # A job first, then the work in its turn, at last, whatever came of it, the job is closed.
        # With a script of its own, an event hands over what that returns: nothing.
        begun = quick(event, handlers.open_job, busy, inputs=None, js=js)
        done = slow(begun.success, handler, [*shows, parts.turn])
        # `then` alone does not follow an error.
        for over in (done.success, done.failure):
            quick(over, handlers.close_job, busy, inputs=None)
    for stop in (parts.stop, parts.tune_stop, parts.measure_stop):
        listen(stop.click, handlers.stop, [], inputs=None, queue=False)


def explain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Say a user's mistake on the page instead of failing; no changes leave it as it is."""

    def tell(error: LeansdError) -> gr.Error:
        text = escape(str(error), quote=False)
        return gr.Error(text, title="Not possible", print_exception=False)

    @wraps(function)
    def call(*given: Any) -> Any:
        try:
            made = function(*given)
        except LeansdError as error:
            raise tell(error) from error
        return gr.skip() if made == {} else made  # gradio takes an empty dict for one value

    @wraps(function)
    def run(*given: Any) -> Iterator[Any]:
        try:
            yield from function(*given)
        except LeansdError as error:
            raise tell(error) from error

    return run if isgeneratorfunction(function) else call


class Handlers:
    """The handlers of one page; what a session has in hand is in its components."""

    def __init__(self, studio: Studio, jobs: JobQueue, parts: Parts) -> None:
        self.studio, self.jobs, self.parts = studio, jobs, parts

    # -- what is shown -------------------------------------------------------------------------

    def show_plan(self, source: str | Plan, settings: Settings, given: Given) -> Changes:
        """Everything that shows the plan in hand: a choice, or a plan stretched to the steps."""
        parts, model = self.parts, self.studio.open(settings.model)
        resolved = self.studio.resolve(source, settings)
        plan = resolved.plan
        return {
            parts.plan: plan,
            **self.show_grid(plan, model, given),
            **self.show_forecast(plan, model, settings, resolved.notes),
            parts.lanes: fragments.show_lanes(fragments.list_beats(plan, model.anatomy)),
        }

    def show_grid(self, plan: Plan, model: KnownModel, given: Given) -> Changes:
        grid = lay_out_grid(plan, model.anatomy, given[self.parts.tier])
        return {self.parts.grid: asdict(grid) | {"labels": grid.labels}}

    def show_forecast(
        self, plan: Plan, model: KnownModel, settings: Settings, notes: tuple[str, ...] = ()
    ) -> Changes:
        forecast = self.studio.forecast(plan, model, guided=settings.guidance > 1)
        shown = fragments.show_forecast(plan, forecast, notes)
        return dict.fromkeys((self.parts.forecast, self.parts.plan_forecast), shown)

    def show_model(self, model: KnownModel, sampler: str) -> Changes:
        parts = self.parts
        measured = fragments.show_profile(model.profiled) if model.profiled is not None else ""
        return {
            parts.sampler: gr.update(choices=[OWN_SAMPLER, *model.samplers], value=sampler),
            parts.guidance: model.guidance,
            parts.anatomy: fragments.show_anatomy(model),
            parts.costs: measured,
            parts.prompts: "\n".join(choose_prompts(model.name, 6)),
        }

    def show_history(self) -> Changes:
        entries = list_entries(self.studio.folders.history)
        shown = [(str(entry.lean), entry.caption) for entry in entries]
        return {self.parts.gallery: shown, self.parts.keys: [entry.key for entry in entries]}

    def show_entry(self, entry: HistoryEntry, warnings: tuple[str, ...] = ()) -> Changes:
        parts = self.parts
        full, lean = entry.open_pictures()
        return {
            parts.full: full,
            parts.lean: lean,
            parts.slider: gr.update(value=(full, lean), visible=True),
            parts.numbers: fragments.show_numbers(entry, warnings),
        }

    # -- settings ------------------------------------------------------------------------------

    def read_settings(self, given: Given, **changes: Any) -> Settings:
        """The settings that the page shows, checked.

        Raises:
            LeansdError: one lies outside its bounds.
        """
        values = {name: given[part] for name, part in self.parts.settings.items()}
        values |= {name: int(values[name] or 0) for name in ("seed", "steps")}
        values |= {name: values[name] or "" for name in ("prompt", "negative")}
        try:
            return Settings(**values | changes)
        except ValidationError as error:
            raise LeansdError(explain_validation(error)) from None

    def read_own_settings(self, model: KnownModel, given: Given) -> Settings:
        """Settings of a model that was just chosen: its guidance, and a sampler that suits it."""
        sampler = given[self.parts.sampler]
        sampler = sampler if sampler in model.samplers else OWN_SAMPLER
        return self.read_settings(given, guidance=model.guidance, sampler=sampler)

    @explain
    def begin(self, given: Given) -> Changes:
        """A page that has just been opened."""
        parts, choice = self.parts, given[self.parts.plan_name]
        model = self.studio.open(given[parts.model])
        settings = self.read_own_settings(model, given)
        return {
            parts.model: gr.update(choices=self.studio.folders.list_models()),
            parts.plan_name: gr.update(choices=self.studio.list_plans(model), value=choice),
            **self.show_model(model, settings.sampler),
            **self.show_plan(choice, settings, given),
            **self.show_history(),
        }

    @explain
    def pick_model(self, given: Given) -> Changes:
        """Another model: its own guidance, and the plan anew."""
        model = self.studio.open(given[self.parts.model])
        settings, choices = self.read_own_settings(model, given), self.studio.list_plans(model)
        choice = given[self.parts.plan_name]
        choice = choice if choice in choices else "balanced"
        return {
            self.parts.plan_name: gr.update(choices=choices, value=choice),
            **self.show_model(model, settings.sampler),
            **self.show_plan(choice, settings, given),
        }

    @explain
    def pick_plan(self, given: Given) -> Changes:
        """Another plan; a saved one brings its own number of steps."""
        choice = given[self.parts.plan_name]
        if choice is None:
            return {}
        settings = self.read_settings(given)
        if choice.startswith(SAVED):
            own = self.studio.folders.load_plan(choice.removeprefix(SAVED))
            settings = self.read_settings(given, steps=min(own.steps, MOST_STEPS))
        return {self.parts.steps: settings.steps, **self.show_plan(choice, settings, given)}

    @explain
    def pick_steps(self, given: Given) -> Changes:
        """Other steps or another sampler: presets fit themselves, other plans are stretched."""
        choice = given[self.parts.plan_name]
        source = given[self.parts.plan]
        if choice is not None and not choice.startswith(SAVED):
            source = choice
        return self.show_plan(source, self.read_settings(given), given) if source else {}

    def roll(self, given: Given) -> Changes:
        """Another seed."""
        return {self.parts.seed: random.randrange(1, 1_000_000)}

    # -- plans ---------------------------------------------------------------------------------

    @explain
    def pick_tier(self, given: Given) -> Changes:
        plan = given[self.parts.plan]
        if plan is None:
            return {}
        return self.show_grid(plan, self.studio.open(given[self.parts.model]), given)

    @explain
    def edit(self, given: Given, event: gr.EventData) -> Changes:
        """Clicked, painted or typed on: cells, a row's name, or a step's head."""
        plan, brush = given[self.parts.plan], given[self.parts.brush]
        if plan is None:
            return {}
        settings = self.read_settings(given)
        anatomy = self.studio.open(settings.model).anatomy
        kind, cells = read_cells(event, plan)
        at, step = cells[0]
        if kind == "step":
            changed = turn_key(plan, anatomy, step, brush)
        elif at == GUIDANCE:
            steps = range(1, plan.steps) if kind == "line" else [s for a, s in cells if a == at]
            changed = turn_guidance(plan, anatomy, steps)
        else:
            if kind == "line":
                cells, step = [(at, each) for each in range(1, plan.steps)], plan.steps - 1
            inside = [cell for cell in cells if cell[0] != GUIDANCE]
            meant = find_brush(plan, anatomy, at, step, brush)
            changed = change_cells(plan, anatomy, inside, meant)
        grid = lay_out_grid(changed, anatomy, given[self.parts.tier])
        told = describe_cell(grid, at, step) if kind == "cells" else ""
        return {
            self.parts.plan_name: None,
            self.parts.cell: fragments.show_note(told) if told else "",
            **self.show_plan(changed, settings, given),
        }

    @explain
    def save_plan(self, given: Given) -> Changes:
        parts, plan = self.parts, given[self.parts.plan]
        if plan is None:
            raise LeansdError("there is no plan to save yet")
        wanted = (given[parts.save_name] or "").strip() or plan.name.removesuffix(EDITED)
        before = self.studio.folders.list_plans()
        path = self.studio.folders.save_plan(plan, wanted)
        replaced = ", in the place of the one before" if path.stem in before else ""
        settings, saved = self.read_settings(given), plan.rename(path.stem)
        return {
            parts.plan: saved,
            **self.show_forecast(saved, self.studio.open(settings.model), settings),
            parts.save_name: path.stem,
            parts.plan_name: gr.update(
                choices=self.studio.list_plans(self.studio.open(settings.model)),
                value=SAVED + path.stem,
            ),
            parts.download: gr.update(value=str(path), interactive=True),
            parts.cell: fragments.show_note(f"saved as {path.name}{replaced}"),
        }

    @explain
    def load_plan(self, given: Given) -> Changes:
        """A plan file from the visitor's own machine."""
        path = given[self.parts.upload]
        try:
            plan = Plan.load(path)
        except LeansdError as error:
            # The path is one of the page's own, which says nothing to who chose the file.
            raise LeansdError(str(error).replace(str(path), Path(path).name)) from None
        if plan.steps > MOST_STEPS:
            raise LeansdError(f"plan {plan.name} has {plan.steps} steps, the page {MOST_STEPS}")
        return {
            self.parts.steps: plan.steps,
            self.parts.plan_name: None,
            self.parts.cell: fragments.show_note(f"loaded {plan.name}"),
            **self.show_plan(plan, self.read_settings(given, steps=plan.steps), given),
        }

    # -- work ----------------------------------------------------------------------------------

    def _set_busy(self, busy: bool, turn: Any) -> Changes:
        """What can be begun and stopped."""
        parts = self.parts
        begins = dict.fromkeys((parts.draw, parts.tune, parts.measure), not busy)
        stops = dict.fromkeys((parts.stop, parts.tune_stop, parts.measure_stop), busy)
        changes = {part: gr.update(interactive=on) for part, on in (begins | stops).items()}
        return {parts.turn: turn, **changes}

    @explain
    def open_job(self, request: gr.Request) -> Changes:
        self.jobs.add(str(request.session_hash))
        before = self.jobs.waiting - 1
        said = fragments.show_note(f"{before} before yours: it begins when they are over")
        return self._set_busy(True, gr.update(value=said, visible=before > 0))

    def close_job(self, request: gr.Request) -> Changes:
        self.jobs.close(str(request.session_hash))
        return self._set_busy(False, gr.update(visible=False))

    def stop(self, request: gr.Request) -> None:
        self.jobs.stop(str(request.session_hash))

    def leave(self, request: gr.Request) -> None:
        """The page was closed: nobody waits for its work."""
        self.jobs.close(str(request.session_hash))

    def _follow(
        self,
        work: Callable[[TellPage], Any],
        first: Changes,
        progress: Callable[[Any], Changes],
        finish: Callable[[Any], Changes],
        stopped: Callable[[], Changes],
    ) -> Iterator[Changes]:
        """Show a piece of work from its begin to its end."""
        yield {self.parts.turn: gr.update(visible=False), **first}
        try:
            for told in follow(work):
                yield finish(told.result) if isinstance(told, Done) else progress(told)
        except Stopped:
            yield stopped()

    @explain
    def draw(self, given: Given, request: gr.Request) -> Iterator[Changes]:
        parts, plan = self.parts, given[self.parts.plan]
        settings = self.read_settings(given)
        job = self.jobs.find(str(request.session_hash))
        if plan is None:
            raise LeansdError("there is no plan yet: choose one")
        beats = fragments.list_beats(plan, self.studio.open(settings.model).anatomy)
        last: list[Any] = [None]

        def show(note: str = "") -> Changes:
            return {parts.lanes: fragments.show_lanes(beats, last[0], note)}

        def progress(told: Any) -> Changes:
            last[0] = told
            return show(fragments.describe_progress(told))

        yield from self._follow(
            lambda tell: self.studio.draw(
                settings, plan, rounds=int(given[parts.rounds]), job=job, on_progress=tell
            ),
            {**show("starting"), parts.tabs: gr.Tabs(selected="pictures")},
            progress,
            lambda drawn: {
                **show(),
                **self.show_entry(*drawn),
                **self.show_history(),
            },
            lambda: show("stopped"),
        )

    @explain
    def tune(self, given: Given, request: gr.Request) -> Iterator[Changes]:
        parts, speed = self.parts, given[self.parts.speed]
        settings = self.read_settings(given)
        job = self.jobs.find(str(request.session_hash))
        lines = [line.strip() for line in (given[parts.prompts] or "").splitlines()]

        def finish(tuned: tuple[Front, Point]) -> Changes:
            plan = tuned[1].plan.rename(f"tuned {speed:g}x")
            said = f"{describe_choice(*tuned)}. It is the plan in hand now."
            return {
                parts.tuning: fragments.show_note(said) + fragments.show_front(*tuned),
                parts.steps: plan.steps,
                parts.plan_name: None,
                parts.save_name: plan.name,
                **self.show_plan(plan, self.read_settings(given, steps=plan.steps), given),
            }

        try:
            yield from self._follow(
                lambda tell: self.studio.tune(
                    settings,
                    [line for line in lines if line],
                    speedup=speed,
                    tries=int(given[parts.tries]),
                    job=job,
                    on_progress=lambda text, share: tell((text, share)),
                ),
                {parts.tuning: fragments.show_bar("starting", 0)},
                lambda told: {parts.tuning: fragments.show_bar(*told)},
                finish,
                lambda: {
                    parts.tuning: fragments.show_note("stopped; the same settings go on from here")
                },
            )
        except LeansdError:
            yield {parts.tuning: ""}
            raise

    @explain
    def measure(self, given: Given, request: gr.Request) -> Iterator[Changes]:
        parts, plan = self.parts, given[self.parts.plan]
        settings = self.read_settings(given)
        job = self.jobs.find(str(request.session_hash))

        def progress(told: tuple[int, int]) -> Changes:
            done, of = told
            return {parts.costs: fragments.show_bar(f"probing run {done} of {of}", done / of)}

        def finish(profiled: Any) -> Changes:
            changes: Changes = {parts.costs: fragments.show_profile(profiled)}
            if plan is not None:
                model = self.studio.open(settings.model)
                changes |= self.show_forecast(plan, model, settings)
            return changes

        yield from self._follow(
            lambda tell: self.studio.profile(
                settings, job=job, on_progress=lambda run, runs: tell((run, runs))
            ),
            {parts.costs: fragments.show_bar("warming up", 0)},
            progress,
            finish,
            lambda: {parts.costs: fragments.show_note("stopped")},
        )

    # -- history -------------------------------------------------------------------------------

    @explain
    def recall(self, given: Given, event: gr.SelectData) -> Changes:
        """The settings, plan and pictures of a run of the past."""
        parts, keys, place = self.parts, given[self.parts.keys], int(event.index)
        if not 0 <= place < len(keys):
            return {}
        entry = read_entry(self.studio.folders.history, keys[place])
        settings = entry.settings
        own = settings.model_dump()
        model = self.studio.open(settings.model)
        return {
            **{part: own[name] for name, part in parts.settings.items()},
            **self.show_model(model, settings.sampler),
            parts.guidance: settings.guidance,
            parts.plan_name: gr.update(choices=self.studio.list_plans(model), value=None),
            parts.tabs: gr.Tabs(selected="pictures"),
            **self.show_plan(entry.plan, settings, given),
            **self.show_entry(entry),
        }


def read_cells(event: Any, plan: Plan) -> tuple[str, list[tuple[str, int]]]:
    """What the grid says was clicked, checked: anybody can send anything."""
    data: dict[str, Any] = getattr(event, "_data", None) or {}
    kind: Any = data.get("kind")
    given: Any = data.get("cells")
    cells = [
        (str(each[0]), each[1])
        for each in (given if isinstance(given, list) else [])
        if isinstance(each, list) and len(each) == 2 and isinstance(each[1], int)
    ]
    inside = [cell for cell in cells if 0 <= cell[1] < plan.steps][: 200 * MOST_STEPS]
    if kind not in ("cells", "step", "line") or not inside:
        raise LeansdError("nothing was chosen in the grid")
    return kind, inside
