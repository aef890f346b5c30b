"""The studio: models that are open, plans by name, and the work that a page asks for.

One pipeline is open at a time, and one piece of work runs at a time: two on one device would slow
each other down, and no time told would be true.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from leansd.anatomy.cost import dissect
from leansd.drawing import Request, default_size
from leansd.errors import LeansdError
from leansd.evaluation.cost import CostModel
from leansd.evaluation.profile import profile
from leansd.evaluation.prompts import find_guidance
from leansd.evaluation.records import stamp
from leansd.faces.costs import Profiled
from leansd.loading import load
from leansd.plans.anatomy import Anatomy
from leansd.plans.compile import compile_plan
from leansd.plans.macs import predict_speedup
from leansd.plans.plan import Plan
from leansd.plans.presets import PRESETS, SPEED_PRESETS, preset
from leansd.plans.resolve import PlanContext, Resolved, resolve_plan
from leansd.runtime.context import describe_runs
from leansd.runtime.samplers import name_sampler, set_sampler
from leansd.tuning.calibration import require_tunable
from leansd.tuning.front import Front, Point
from leansd.tuning.tuner import FEWEST_CALLS, tune
from leansd.ui.duels import Progress, hold_duel
from leansd.ui.folders import Folders
from leansd.ui.history import OWN_SAMPLER, Entry, Settings, keep_entry
from leansd.ui.tickets import Ticket, stopping

SAVED = "saved: "
"""Stands before the names of saved plans among the choices."""
TUNING_BATCH = 4
TUNING_GRIDS = (1.0, 0.7)
MOST_PROMPTS = 32
PROFILE_REPEATS = 3


@dataclass
class Model:
    """What the page knows of a model; it stays known when another one is opened."""

    name: str
    anatomy: Anatomy
    """With multiply-accumulates at the size that the model draws."""
    sampler: str
    """Of the model itself."""
    guidance: float
    size: tuple[int, int]
    profiled: Profiled | None = None
    """Where everything was timed on this machine."""


@dataclass
class Opened:
    """The pipeline that is open."""

    model: Model
    pipe: Any
    scheduler: Any
    warm: bool = False


@dataclass(frozen=True)
class Forecast:
    """How fast a plan should be."""

    unet: float
    """Full run's over this run's multiply-accumulates in the UNet."""
    run: float | None = None
    """Of the whole pipeline call, where it was profiled here."""
    seconds: float | None = None
    """Of the whole pipeline call, where it was profiled here."""


@dataclass(frozen=True)
class Drawn:
    """A duel that is in the history, and what must be said of it."""

    entry: Entry
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Tuned:
    """What a tuning found, and the point of its front that was asked for."""

    front: Front
    chosen: Point


@dataclass
class Studio:
    """All that pages share."""

    folders: Folders
    device: str | None = None
    _models: dict[str, Model] = field(default_factory=dict[str, Model])
    _opened: Opened | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    # -- models --------------------------------------------------------------------------------

    def open(self, name: str) -> Model:
        """What is known of a model; the first time its pipeline is opened for it.

        Raises:
            LeansdError: it is none of the models given, or cannot be opened.
        """
        if name not in self._models:
            with self._lock:
                self._open_pipeline(name)
        return self._models[name]

    def _open_pipeline(self, name: str) -> Opened:
        """The pipeline of a model; only one is in memory."""
        if self._opened is not None and self._opened.model.name == name:
            return self._opened
        source = self.folders.find_model(name)
        self._opened = None
        pipe = load(source, device=self.device)
        pipe.set_progress_bar_config(disable=True)
        width, height = size = default_size(pipe)
        factor = pipe.vae_scale_factor
        known = self._models.get(name)
        anatomy = dissect(
            pipe.unet,
            latent=(height // factor, width // factor),
            tokens=pipe.tokenizer.model_max_length,
            name=name,
        )
        model = known or Model(name, anatomy, name_sampler(pipe), find_guidance(pipe, name), size)
        self._models[name] = model
        self._opened = Opened(model, pipe, pipe.scheduler)
        return self._opened

    @contextmanager
    def _work_on(self, settings: Settings, ticket: Ticket):
        """The pipeline with the sampler asked for, for one piece of work at a time."""
        with self._lock:
            ticket.check()
            opened = self._open_pipeline(settings.model)
            opened.pipe.scheduler = opened.scheduler
            if settings.sampler != OWN_SAMPLER:
                set_sampler(opened.pipe, settings.sampler)
            try:
                yield opened
            finally:
                opened.pipe.scheduler = opened.scheduler

    # -- plans ---------------------------------------------------------------------------------

    def list_plans(self) -> list[str]:
        """Presets, those of the house first, and saved plans; none that needs further UNets."""
        others = [name for name in PRESETS if name not in SPEED_PRESETS and _runs_alone(name)]
        return [*SPEED_PRESETS, *others, *(SAVED + name for name in self.folders.list_plans())]

    def make_plan(self, choice: str, settings: Settings) -> Plan:
        """The plan that a choice means for these settings, checked against the model's UNet.

        Raises:
            LeansdError: there is none, or it does not suit the UNet.
        """
        return self.resolve(choice, settings).plan

    def resolve(self, choice: str, settings: Settings) -> Resolved:
        """The same with what must be said of it."""
        model = self.open(settings.model)
        source: Plan | str = choice
        if choice.startswith(SAVED):
            source = self.folders.load_plan(choice.removeprefix(SAVED))
        sampler = model.sampler if settings.sampler == OWN_SAMPLER else settings.sampler
        context = PlanContext(settings.steps, sampler, anatomy=model.anatomy)
        resolved = resolve_plan(source, context, fit=True)
        self.check_plan(resolved.plan, model)
        return resolved

    def check_plan(self, plan: Plan, model: Model) -> None:
        """Refuse a plan that this model cannot follow here."""
        if plan.nets:
            raise LeansdError(
                f"plan {plan.name} switches to net {plan.nets[0]!r}, and the page runs one UNet: "
                "use leansd generate --net"
            )
        compile_plan(plan, model.anatomy)

    def forecast(self, plan: Plan, model: Model, *, guided: bool = True) -> Forecast:
        """How fast the plan should be; where the model was profiled, in time as well."""
        program = compile_plan(plan, model.anatomy, guided=guided)
        unet = predict_speedup(program.calls, model.anatomy)
        if model.profiled is None or model.profiled.cost.is_guided != guided:
            return Forecast(unet)
        cost = model.profiled.cost
        try:
            return Forecast(unet, cost.predict_speedup(program), cost.predict_run(program))
        except LeansdError:  # gates were not timed
            return Forecast(unet)

    # -- work ----------------------------------------------------------------------------------

    def draw(
        self,
        settings: Settings,
        plan: Plan,
        *,
        rounds: int,
        ticket: Ticket,
        tell: Callable[[Progress], None],
    ) -> Drawn:
        """Hold a duel and keep it in the history.

        Raises:
            LeansdError: there is no prompt, or the plan is for another number of steps.
            Stopped: the ticket was.
        """
        request = make_request(settings)
        if plan.steps != settings.steps:
            raise LeansdError(
                f"plan {plan.name} is for {plan.steps} steps, not {settings.steps}: choose it again"
            )
        with self._work_on(settings, ticket) as opened:
            context = describe_runs(
                opened.pipe, anatomy=opened.model.anatomy, guidance=settings.guidance
            )
            warnings = resolve_plan(plan, context).notes
            outcome = hold_duel(
                opened.pipe,
                request,
                plan,
                rounds=rounds,
                warm=opened.warm,
                ticket=ticket,
                tell=tell,
            )
            opened.warm = True
        entry = keep_entry(self.folders.history, settings, plan, outcome)
        return Drawn(entry, warnings)

    def profile(
        self, settings: Settings, *, ticket: Ticket, tell: Callable[[int, int], None]
    ) -> Profiled:
        """Time everything on this machine; from then on plans are forecast in time as well.

        Raises:
            Stopped: the ticket was.
        """
        with self._work_on(settings, ticket) as opened, stopping(opened.pipe.unet, ticket):
            told = iter(range(1, PROFILE_REPEATS + 1))
            tell(0, PROFILE_REPEATS)
            cost: CostModel = profile(
                opened.pipe,
                call={"guidance_scale": settings.guidance},
                repeats=PROFILE_REPEATS,
                subject=settings.model,
                on_run=lambda: tell(next(told), PROFILE_REPEATS),
            )
            facts = stamp(opened.pipe.device)
        model = opened.model
        model.profiled = Profiled(
            cost, model.anatomy, settings.steps, (), PROFILE_REPEATS, facts, sampler=model.sampler
        )
        return model.profiled

    def tune(
        self,
        settings: Settings,
        prompts: Sequence[str],
        *,
        speedup: float,
        tries: int,
        ticket: Ticket,
        tell: Callable[[str, float], None],
    ) -> Tuned:
        """Find the plan that loses least at a speed, with a small budget; a stopped one goes on.

        Raises:
            LeansdError: there are too few prompts, or no plan is that fast.
            Stopped: the ticket was.
        """
        if not FEWEST_CALLS <= len(prompts) <= MOST_PROMPTS:
            raise LeansdError(
                f"{len(prompts)} prompts to tune on: give {FEWEST_CALLS} to {MOST_PROMPTS}, one a "
                "line; every third decides, the rest tune"
            )
        if settings.steps < 4:
            raise LeansdError(f"{settings.steps} steps cannot be tuned: 4 are needed at least")
        with self._work_on(settings, ticket) as opened, stopping(opened.pipe.unet, ticket):
            require_tunable(opened.pipe.scheduler, settings.steps)
            front = tune(
                opened.pipe,
                list(prompts),
                steps=settings.steps,
                settings={"guidance_scale": settings.guidance},
                speeds=(),
                grids=TUNING_GRIDS,
                speedup=speedup,
                tries=tries,
                seed=settings.seed,
                batch=TUNING_BATCH,
                sampler=name_sampler(opened.pipe),
                journal=self.folders.journals / f"{_slug(settings.model)}.jsonl",
                tell=tell,
            )
        return Tuned(front, front.find(speedup=speedup))


def make_request(settings: Settings) -> Request:
    """What the pipeline is asked for."""
    if not settings.prompt.strip():
        raise LeansdError("no prompt: say what to draw")
    return Request(
        prompt=settings.prompt.strip(),
        negative=settings.negative.strip() or None,
        seed=settings.seed,
        steps=settings.steps,
        guidance=settings.guidance,
    )


def fit_plan(plan: Plan, steps: int) -> Plan:
    """A plan stretched to other steps; it keeps its name, no longer what it was tuned for."""
    return plan if plan.steps == steps else replace(plan.fit(steps), tuned=None)


def _runs_alone(name: str) -> bool:
    """Whether a preset runs with the pipeline's own UNet and no further choices."""
    try:
        return not preset(name, 30).nets
    except LeansdError:
        return False


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-") or "model"
