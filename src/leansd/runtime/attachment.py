"""An attachment: one pipeline, or bare UNet, and the plan that it follows, run after run."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from leansd.anatomy.reading import read_anatomy
from leansd.errors import LeansdError
from leansd.plans.compile import compile_plan
from leansd.plans.liveness import Lane, Program
from leansd.plans.plan import Plan
from leansd.plans.presets import Preset
from leansd.plans.resolve import PlanContext, resolve_plan
from leansd.plans.row import OWN
from leansd.runtime.adaptive import AdaptiveBranch
from leansd.runtime.clock import Clock, Course, LoopClock, SchedulerClock, Tick
from leansd.runtime.context import describe_runs
from leansd.runtime.control import (
    Control,
    ControlRun,
    Prospect,
    attach_control,
    detach_control,
)
from leansd.runtime.engine import Engine
from leansd.runtime.engines import attach, detach
from leansd.runtime.guidance import count_pictures, find_lane, guides, is_guided
from leansd.runtime.nets import ALONE, Company
from leansd.runtime.passes import Branch, Step
from leansd.runtime.report import Lap, Report, Tally


class Attachment:
    """A pipeline, or a raw UNet, that follows a plan: `with leansd.inherit(pipe, plan) as run`."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        pipe: Any | None,
        source: Plan | Preset,
        compile_options: Mapping[str, Any] | None = None,
        company: Company = ALONE,
    ) -> None:
        self.unet = unet
        self.pipe = pipe
        self.source = source
        self.compile_options = compile_options
        """Of `torch.compile`; None where nothing is compiled."""
        self.company = company
        """The UNets that its plan may run besides."""
        self.hosts: dict[str, Engine] = {}
        """Their engines, while it is attached."""
        self.thread: int | None = None
        """The thread it was entered in; None for one that holds until it is released."""
        self._compile = lru_cache(maxsize=64)(self._make_program)
        self._engine: Engine | None = None
        self._control: Control | None = None
        self._local = threading.local()
        self._last: Tally | None = None
        self._anatomy = read_anatomy(unet)
        if isinstance(source, Plan):
            compile_plan(source, self._anatomy, nets=company.nets)
        elif pipe is None:
            raise LeansdError(
                f"a bare UNet does not say how many steps a run has; give the pipeline, or a plan "
                f"as in leansd.preset({source.name!r}, steps=30)"
            )

    # -- user's side -------------------------------------------------------------------------

    def __enter__(self) -> Attachment:
        self.thread = threading.get_ident()
        return self.attach()

    def __exit__(self, *exception: object) -> None:
        self.release()

    def attach(self) -> Attachment:
        """Follow the plan from now on."""
        self._engine = attach(self)
        self._control = attach_control(self, self._engine.anatomy)
        return self

    def release(self) -> None:
        """Stop following the plan; the UNet is as it was, nothing is kept."""
        if self._control is not None:
            detach_control(self, self._control)
        self._control = self._engine = None
        detach(self)
        self._local = threading.local()

    def report(self) -> Report:
        """What the last run did, kept and gained.

        Raises:
            LeansdError: nothing has run yet.
        """
        if self._last is None or not self._last.calls:
            raise LeansdError(
                "nothing has run yet: call the pipeline first, then ask for the report"
            )
        return self._last.summarise(self.unet, self.company.unets)

    # -- engine's side -----------------------------------------------------------------------

    def _make_program(
        self,
        plan: Plan,
        start: int,
        rows: tuple[int, ...],
        moments: tuple[float, ...],
        guided: bool,
    ) -> Program:
        return compile_plan(
            plan, self._anatomy,
            nets=self.company.nets, start=start, rows=rows, moments=moments, guided=guided,
        )  # fmt: skip

    def find_host(self, net: str) -> Engine | None:
        """Who runs a call instead of the pipeline's own UNet; None where that one does."""
        return None if net == OWN else self.hosts[net]

    def get_clock(self) -> Clock:
        """This thread's clock."""
        local = self._local
        if not hasattr(local, "clock"):
            local.clock = self._make_clock()
        return local.clock

    def _make_clock(self) -> Clock:
        if self.pipe is not None:
            return SchedulerClock(self.pipe)
        assert isinstance(self.source, Plan)
        return LoopClock(self.source.steps)

    def begin(self, engine: Engine, sample: torch.Tensor, timestep: Any) -> Step | None:
        """Place a UNet call; None where it is none of this attachment's."""
        tick = self.get_clock().tell(timestep)
        if tick is None:
            return None
        local = self._local
        if tick.starts:
            plan = self._pick_plan(tick.course, engine)
            local.plan, local.branches, local.here = plan, {}, (-1, -1)
            control = getattr(local, "control", None)
            local.tally = self._last = Tally(plan, control)
            if control is not None:
                control.begun = True
        lane = find_lane(self.pipe) if _saves_guidance_apart(local.plan) else None
        if lane is not None:
            return self._begin_apart(engine, sample, tick, lane)
        index, ordinal = local.here
        ordinal = ordinal + 1 if index == tick.index else 0
        local.here = (tick.index, ordinal)
        branch = local.branches.setdefault(ordinal, self._make_branch(local.plan))
        guided = is_guided(self.pipe, sample.shape[0])
        if not branch.expects(tick.index, sample, guided):
            course = tick.course
            program = self._compile(local.plan, tick.index, course.rows, course.moments, guided)
            branch.start_over(program, sample, guided)
        return branch.take(tick, engine.pick_latents(sample))

    def _make_branch(self, plan: Plan) -> Branch:
        if plan.drift is None:
            return Branch()
        return AdaptiveBranch(plan.drift, partial(count_pictures, self.pipe))

    def _begin_apart(
        self, engine: Engine, sample: torch.Tensor, tick: Tick, lane: Lane
    ) -> Step | None:
        """Place one of the two calls of a step that share what they keep."""
        branch = self._local.branches.setdefault(0, Branch())
        if lane == "rest" and not branch.completes(tick.index, sample):
            branch.program = None
            return None
        if lane == "cond" and not branch.expects(tick.index, sample, True):
            course = tick.course
            plan = self._local.plan
            program = self._compile(plan, tick.index, course.rows, course.moments, True)
            branch.start_over(program, sample, True)
        return branch.open(tick, engine.pick_latents(sample), lane)

    def foresee(self, timestep: Any) -> Prospect | None:
        """What the UNet call at this time step, which is yet to come, will do."""
        tick, engine = self.get_clock().foretell(timestep), self._engine
        if tick is None or engine is None:
            return None
        local, course = self._local, tick.course
        branch = None if tick.starts else local.branches.get(0)
        plan = self._pick_plan(course, engine)
        if plan.drift is not None:
            # Which pictures it will compute is not known yet, so it may be all of them.
            plan, branch = Plan.full(plan.steps), None
        if branch is not None and branch.follows(tick.index):
            return Prospect(tick.index, branch.program, starts=False)
        program = self._compile(plan, tick.index, course.rows, course.moments, guides(self.pipe))
        return Prospect(tick.index, program, tick.starts)

    def get_control_run(self, prospect: Prospect) -> ControlRun:
        """The state of the pipeline's ControlNet in this thread's run."""
        local = self._local
        run = getattr(local, "control", None)
        # Until the UNet is called, all calls at the first step belong to the run that starts.
        if run is None or (prospect.starts and run.begun):
            run = local.control = ControlRun()
        return run

    def _pick_plan(self, course: Course, engine: Engine) -> Plan:
        """The plan for a run; a ControlNet asks for it before the UNet does."""
        picked = getattr(self._local, "picked", None)
        if picked is None or picked[0] is not course:
            picked = self._local.picked = course, self._build_plan(course.steps, engine)
        return picked[1]

    def _build_plan(self, steps: int, engine: Engine) -> Plan:
        nets = {name: net.anatomy for name, net in self.company.nets.items()}
        context = PlanContext(steps, anatomy=engine.anatomy, nets=nets)
        if self.pipe is not None:
            context = describe_runs(self.pipe, steps, anatomy=engine.anatomy, nets=nets)
        try:
            resolved = resolve_plan(self.source, context)
        except LeansdError:
            self.abort()
            raise
        for note in resolved.notes:
            warnings.warn(note, stacklevel=2)
        plan = resolved.plan
        if plan.drift is not None and self.compile_options is not None:
            warnings.warn(
                f"plan {plan.name} decides as it runs what each picture inherits, which one graph "
                "cannot: it runs eagerly",
                stacklevel=2,
            )
            self.compile_options = None
        return plan

    def end(self, step: Step, lap: Lap) -> None:
        local = self._local
        local.tally.add(step.calls, lap, sum(branch.bytes for branch in local.branches.values()))
        step.release()

    def note_size(self, sample: torch.Tensor, text: torch.Tensor | None) -> None:
        """Remember what the cost of this run is to be counted at."""
        tally: Tally = self._local.tally
        tally.size = (sample.shape[-2], sample.shape[-1])
        tally.tokens = text.shape[1] if text is not None else 0

    def abort(self) -> None:
        """Forget this thread's run: its call failed midway, or has ended."""
        run = vars(self._local)
        for branch in run.get("branches", {}).values():
            branch.clear()
        if "control" in run:
            run["control"].memories.clear()  # the report keeps its counts
        run.clear()


def _saves_guidance_apart(plan: Plan) -> bool:
    """Whether branches called apart share what they keep, so that one of them can be left out.

    Under a drift each branch is a run of its own: nothing tells one what the other's pictures do.
    """
    return plan.guides and plan.drift is None
