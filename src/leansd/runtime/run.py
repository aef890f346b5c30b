"""One thread's run, and the follower that gives every UNet call its place in it.

A follower is the inner half of an attachment: it knows the plan, the clock and the state of the
run that each thread is in. The engine asks it what a call is to do, and nothing else.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any
from weakref import WeakSet

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from leansd.anatomy.reading import read_anatomy
from leansd.core.devices import Stopwatch
from leansd.core.outputs import explain_unknown_output
from leansd.core.schedule import CallSchedule
from leansd.errors import LeansdError
from leansd.plans.anatomy import HEAD
from leansd.plans.compile import compile_plan
from leansd.plans.liveness import Lane, Program
from leansd.plans.methods import METHODS
from leansd.plans.plan import Plan
from leansd.plans.resolve import PlanChoice, PlanContext, Resolved, Source, resolve_plan
from leansd.plans.row import OWN, SAMPLE
from leansd.runtime.adaptive import AdaptiveBranch
from leansd.runtime.arguments import UNetArguments
from leansd.runtime.call import CacheBranch, UNetStep
from leansd.runtime.clock import CallPosition, Clock, LoopClock, SchedulerClock, is_view
from leansd.runtime.context import count_depth, describe_runs, find_calling_pipeline
from leansd.runtime.controlnet import ControlResiduals, UpcomingCall, complete_residuals
from leansd.runtime.guidance import (
    LatentsWatch,
    begin_mixing,
    count_pictures,
    exchange,
    find_lane,
    find_latents,
    find_scale,
    guides,
    has_two_halves,
    is_guided,
    mix_output,
    refuse,
    require_mixable,
)
from leansd.runtime.hooks import PatchedMethod
from leansd.runtime.nets import NO_OTHERS, NetSet
from leansd.runtime.report import Report, RunStats
from leansd.runtime.watch import CallSignature, Conditions, NetWatch, wants_gradients

MOST_OUTSIDE = 10_000
"""Calls of no run that are counted for a report, at most."""


@dataclass(eq=False)
class Run:
    """The state of one run: the calls of a pipeline from its first step to its last."""

    schedule: CallSchedule
    plan: Plan
    stats: RunStats
    residuals: ControlResiduals
    branches: dict[int, CacheBranch] = field(default_factory=dict[int, CacheBranch])
    """Caches by the place of the call in its step."""
    index: int = -1
    ordinal: int = 0
    begun: bool = False
    """Whether the UNet has been called; a ControlNet is called before."""
    is_full: bool = False
    """Whether the last call computes everything, whatever the plan says."""
    latents: LatentsWatch | None = None
    """While outputs are mixed, what tells whether latents are changed between steps."""
    two_halves: bool | None = None
    """Whether its batches are an unconditional and a conditional half; None before it is known."""

    @property
    def shares_lanes(self) -> bool:
        """Whether branches called apart share what they keep, so that one can be left out.

        Under a drift each branch is a run of its own: nothing tells one what the other's pictures
        do.
        """
        return (self.plan.guides or self.plan.mixes) and self.plan.drift is None

    @property
    def bytes(self) -> int:
        return sum(branch.bytes for branch in self.branches.values())

    def count(self, index: int) -> int:
        """Which of the calls at this step it is."""
        self.ordinal = self.ordinal + 1 if index == self.index else 0
        self.index = index
        return self.ordinal

    def get_branch(self, ordinal: int) -> CacheBranch:
        if ordinal not in self.branches:
            drift = self.plan.drift
            self.branches[ordinal] = CacheBranch() if drift is None else AdaptiveBranch(drift)
        return self.branches[ordinal]

    def end_mixing(self) -> None:
        if self.latents is not None:
            self.latents.release()
            self.latents = None

    def clear(self) -> None:
        """Keep nothing any more; the report keeps its counts."""
        for branch in self.branches.values():
            branch.clear()
        self.end_mixing()
        self.residuals.branches.clear()


class _ThreadState(threading.local):
    """What one thread is in the midst of."""

    def __init__(self) -> None:
        self.depth = 0
        """How many calls of the pipeline lie within one another: a callback may call it again."""
        self.clock: Clock | None = None
        self.run: Run | None = None
        self.outer: list[tuple[int, Clock | None, Run | None]] = []
        """The states of the calls that wait for the innermost one."""


class Follower:
    """Follows a plan with the UNet calls of one pipeline, or of whoever calls a bare UNet."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        pipe: Any | None,
        source: Source,
        *,
        nets: NetSet = NO_OTHERS,
        compile_options: dict[str, Any] | None = None,
        wrapper: nn.Module | None = None,
    ) -> None:
        self.unet = unet
        self.pipe = pipe
        self.source = source
        self.nets = nets
        """The UNets that its plan may run besides."""
        self.compile_options = compile_options
        """Options of `torch.compile`; None where nothing is compiled."""
        self.wrapper = wrapper
        """What `torch.compile` has made of the UNet, where the pipeline calls that."""
        self.bypass: PatchedMethod | None = None
        """On the wrapper while it is attached."""
        self.anatomy = read_anatomy(unet)
        self.thread: int | None = None
        """The thread it was entered in; None for one that holds until it is released."""
        self.last: RunStats | None = None
        """Counts of the last run."""
        self.watches: tuple[NetWatch, ...] = ()
        """Watches of the UNets that it may run, its own first, while it is attached."""
        self._outside = RunStats(source if isinstance(source, Plan) else Plan.full(1))
        self._state = _ThreadState()
        self._warned: set[str] = set()
        self._latents = WeakSet[LatentsWatch]()
        compile_ = partial(compile_plan, anatomy=self.anatomy, nets=nets.nets)
        self._compile = lru_cache(maxsize=64)(compile_)
        plans = source.plans if isinstance(source, PlanChoice) else (source,)
        for plan in plans:
            if isinstance(plan, Plan):
                compile_plan(plan, self.anatomy, nets=nets.nets)
        if pipe is None and isinstance(source, PlanChoice):
            raise LeansdError("a bare UNet does not say what guidance its loop has: give one plan")
        if pipe is None and isinstance(source, Plan) and source.mixes:
            raise refuse(source, "a bare UNet does not say what guidance its loop has")
        if pipe is None and not isinstance(source, Plan):
            raise LeansdError(
                f"a bare UNet does not say how many steps a run has; give the pipeline, or a plan "
                f"as in leansd.preset({source.name!r}, steps=30)"
            )

    @property
    def run(self) -> Run | None:
        """This thread's run."""
        return self._state.run

    @property
    def clock(self) -> Clock:
        """This thread's clock."""
        state = self._state
        if state.clock is None:
            if self.pipe is not None:
                state.clock = SchedulerClock(self.pipe)
            else:
                assert isinstance(self.source, Plan)
                state.clock = LoopClock(self.source.steps)
        return state.clock

    def start_call(self, arguments: UNetArguments) -> UNetStep | None:
        """Place a UNet call; None where it is none of this follower's."""
        self._enter()
        position = self.clock.locate(arguments.timestep)
        if position is None:
            return None
        run, sample = self._find_run(position), arguments.sample
        run.begun, self.last = True, run.stats
        run.stats.note_size(sample, arguments.text)
        lane = find_lane(self.pipe) if run.shares_lanes else None
        signature = self._sign(arguments, lane, drops_guidance=run.plan.drops_guidance)
        reason = self._find_reason(run, arguments)
        latents = sample[:, : self.anatomy[HEAD].channels[1]]
        if lane == "rest":
            branch = run.get_branch(0)
            if reason or not branch.completes(position.index, signature):
                branch.program = None
                return None
            return branch.open(position, latents, lane)
        branch = run.get_branch(0 if lane else run.count(position.index))
        change = reason or branch.find_break(position.index, signature)
        if not change:
            assert branch.program is not None
            change = self._find_observed(branch.program, position.index)
        if change:
            if reason or branch.program is not None:
                run.stats.forced[change] += 1
            apart = lane is not None
            self._start_over(run, branch, position, signature, sample, apart=apart)
            if run.plan.mixes:
                run.end_mixing()
                if not reason and (position.starts or run.ordinal):
                    self._begin_mixing(run, branch, position, latents, apart=apart)
        run.is_full = bool(change)
        step = branch.open(position, latents, lane) if lane else branch.take(position, latents)
        # What others look into or differentiate is no matter for a graph.
        step.compiles = step.compiles and not reason
        return step

    def mix(self, step: UNetStep, output: Any) -> Any:
        """A UNet's output mixed with those before, where the plan says so."""
        run = self._state.run
        if run is None or run.latents is None:
            return output
        ((own, noise),) = step.split(output[0])
        mixed = mix_output(self.pipe, own, noise)
        return output if mixed is noise else exchange(output, mixed)

    def complete(self, arguments: UNetArguments) -> UNetArguments:
        """The arguments of a call just placed, with all that a ControlNet left out for its plan."""
        run = self._state.run
        if run is None or not run.is_full:
            return arguments
        return complete_residuals(run.residuals, arguments)

    def note_outside(self, arguments: UNetArguments, seconds: Stopwatch) -> None:
        """Count a call that is of no run: it computed everything."""
        if self.last is not None or len(self._outside.calls) >= MOST_OUTSIDE:
            return
        self._outside.note_size(arguments.sample, arguments.text)
        self._outside.add(compile_plan(Plan.full(1), self.anatomy).calls, seconds, 0)
        self._outside.forced["its time step is of no run of the pipeline's scheduler"] += 1

    def end_call(self, step: UNetStep, noise: torch.Tensor, seconds: Stopwatch) -> None:
        """Count a call that gave `noise` [B, C, H, W]."""
        run = self._state.run
        if run is not None:
            run.stats.add(step.calls, seconds, run.bytes)
            run.stats.note_output(noise, run.schedule.rows[step.call.index])
        step.release()

    def end_run(self) -> None:
        """This thread's run is over: tell what is wrong with it, and keep nothing."""
        self._enter()
        if self._state.run is not None:
            self.last = self._state.run.stats
        self._tell_fault()
        self.abort()

    def abort(self) -> None:
        """Forget this thread's run, as where its call failed midway; the one around it goes on."""
        state = self._state
        if state.run is not None:
            state.run.clear()
        nothing = 0, None, None
        state.depth, state.clock, state.run = state.outer.pop() if state.outer else nothing

    def forget(self) -> None:
        """Forget the runs of all threads."""
        self._tell_fault()
        for watch in self._latents:
            watch.release()
        self._state = _ThreadState()

    def report(self) -> Report:
        """What the last run did, kept and gained.

        Raises:
            LeansdError: nothing has run yet.
        """
        stats = self.last or self._outside
        if not stats.calls:
            raise LeansdError(
                "nothing has run yet: call the pipeline first, then ask for the report"
            )
        return stats.summarise(self.unet, self.nets.unets)

    def peek(self, arguments: UNetArguments) -> UpcomingCall | None:
        """What the UNet call after this call of a ControlNet will do."""
        self._enter()
        position = self.clock.peek(arguments.timestep)
        if position is None or not self.watches:
            return None
        run = self._find_run(position)
        branch, plan = None if position.starts else run.branches.get(0), run.plan
        nets, residuals = self.nets.nets, run.residuals
        if plan.drift is not None:
            # Which pictures it will compute is not known yet, so it may be all of them.
            plan, branch = Plan.full(plan.steps), None
        if branch is not None and branch.follows(position.index):
            program = branch.program
            assert program is not None
            changed = branch.has_changed(self._read_states())
            is_full = changed or bool(self._find_reason(run, arguments))
            is_full = is_full or bool(self._find_observed(program, position.index))
            return UpcomingCall(position.index, program, residuals, nets, is_full)
        guided = guides(self.pipe) if run.two_halves is None else run.two_halves
        program = self._compile_from(plan, position, guided=guided)
        return UpcomingCall(
            position.index, program, residuals, nets, is_full=True, keeps_all=plan.guides
        )

    def warn_once(self, text: str, about: str = "") -> None:
        """Warn, unless the same or the like has been said."""
        if (about or text) not in self._warned:
            self._warned.add(about or text)
            warnings.warn(text, stacklevel=2)

    def _tell_fault(self) -> None:
        run = self._state.run
        fault = run.stats.find_fault() if run is not None else ""
        if fault:
            self.warn_once(f"{fault}; the pictures show nothing", "fault")

    def compiles(self) -> bool:
        """Whether the calls of this thread's run are to be compiled."""
        run = self._state.run
        return self.compile_options is not None and run is not None and run.plan.drift is None

    # -- placing a call --------------------------------------------------------------------------

    def _enter(self) -> None:
        """Turn to the run of the innermost call of the pipeline; those around it wait."""
        if self.pipe is None:
            return
        state, depth = self._state, count_depth(self.pipe)
        while state.depth > depth:
            self.abort()  # of a call that failed
        if state.depth < depth:
            state.outer.append((state.depth, state.clock, state.run))
            state.depth, state.clock, state.run = depth, None, None

    def _find_run(self, position: CallPosition) -> Run:
        """The run that a call is of; a ControlNet asks for it before the UNet does."""
        run = self._state.run
        ended = run is None or run.schedule is not position.schedule
        if run is None or ended or (position.starts and run.begun):
            if run is not None:
                self._tell_fault()
                run.clear()
            resolved = self._resolve_plan(position)
            plan, notes = resolved.plan, resolved.notes
            unknown = explain_unknown_output(plan, position.schedule)
            if unknown:
                self.warn_once(f"plan {plan.name} is computed in full: {unknown}")
                plan, notes = Plan.full(plan.steps), (*notes, unknown)
            stats = RunStats(plan, notes)
            run = Run(position.schedule, plan, stats, ControlResiduals(stats))
            self._state.run = run
        return run

    def _resolve_plan(self, position: CallPosition) -> Resolved:
        """The plan of a run that begins with this call."""
        schedule = position.schedule
        steps = schedule.steps
        nets = {name: net.anatomy for name, net in self.nets.nets.items()}
        context = PlanContext(steps, anatomy=self.anatomy, nets=nets)
        if self.pipe is not None:
            known = replace(
                context,
                guidance=find_scale(self.pipe) if guides(self.pipe) else None,
                strength=1 - schedule.rows[position.index] / steps,
                log_snr=schedule.log_snr if len(schedule.log_snr) == steps else (),
            )
            context = describe_runs(self.pipe, known)
        try:
            resolved = resolve_plan(self.source, context)
        except LeansdError:
            self.abort()
            raise
        for note in resolved.notes:
            warnings.warn(note, stacklevel=2)
        plan = resolved.plan
        if plan.drift is not None and self.compile_options is not None:
            self.warn_once(
                f"plan {plan.name} decides as it runs what each picture inherits, which one graph "
                "cannot: it runs eagerly"
            )
        return resolved

    def _start_over(
        self,
        run: Run,
        branch: CacheBranch,
        position: CallPosition,
        signature: CallSignature,
        sample: torch.Tensor,
        *,
        apart: bool,
    ) -> None:
        """Let a branch begin anew with this call, which is computed in full."""
        plan = run.plan
        guided = apart or is_guided(self.pipe, sample.shape[0])
        if not apart and (plan.guides or plan.mixes or plan.drift is not None):
            guided = run.two_halves = has_two_halves(self.pipe, sample)
        program = self._compile_from(plan, position, guided=guided)
        pictures = count_pictures(self.pipe, sample.shape[0], two_halves=guided)
        branch.start_over(program, signature, pictures)

    def _begin_mixing(
        self,
        run: Run,
        branch: CacheBranch,
        position: CallPosition,
        latents: torch.Tensor,
        *,
        apart: bool,
    ) -> None:
        """Let the outputs of a run be mixed, from its first call on.

        One that starts over midway, or is computed in full throughout, mixes none.
        """
        plan, program, pipe = run.plan, branch.program, self.pipe
        assert program is not None
        assert pipe is not None
        try:
            if run.ordinal:
                raise refuse(plan, "the pipeline calls its UNet several times at a step")
            require_mixable(plan, pipe, self.anatomy, position.index)
            branch.outputs = begin_mixing(plan, program, pipe, latents, apart=apart)
        except LeansdError:
            self.abort()
            raise
        run.latents = LatentsWatch(plan, pipe)
        self._latents.add(run.latents)

    def _compile_from(self, plan: Plan, position: CallPosition, *, guided: bool) -> Program:
        """The calls of a run from this one on."""
        index, schedule = position.index, position.schedule
        return self._compile(
            plan, start=index, rows=schedule.rows, moments=schedule.moments, guided=guided
        )

    def _sign(
        self, arguments: UNetArguments, lane: Lane | None, *, drops_guidance: bool
    ) -> CallSignature:
        sample = arguments.sample
        guided = lane is not None or is_guided(self.pipe, sample.shape[0])
        batch = (sample.shape, sample.dtype, sample.device, guided)
        scale = find_scale(self.pipe) if drops_guidance and guided else None
        return CallSignature(batch, Conditions(arguments.named), self._read_states(), scale)

    def _read_states(self) -> tuple[Any, ...]:
        return tuple(watch.read() for watch in self.watches)

    # -- calls that are computed in full, whatever the plan says ---------------------------------

    def _find_reason(self, run: Run, arguments: UNetArguments) -> str:
        """Why a call is computed in full, in words; empty where it may inherit."""
        parameters = [each for watch in self.watches for each in watch.parameters]
        if wants_gradients(arguments, parameters):
            reason = "gradients are wanted"
            if self.pipe is None:
                self.warn_once(
                    "calls that want gradients are computed in full: call the UNet within "
                    "torch.no_grad() to have it follow the plan"
                )
            return reason
        for watch in self.watches:
            if watch.unknown_processor:
                kind = watch.unknown_processor
                self.warn_once(
                    f"the UNet has an attention processor that leansd does not know, {kind}; as it "
                    "may keep what it sees or mix pictures, every call is computed in full"
                )
                return f"{kind} looks into the UNet"
        if _needs_latents(run.plan, self.anatomy) and find_latents(self.pipe, self.anatomy) is None:
            return "which channels are the latents is not known"
        return ""

    def _find_observed(self, program: Program, index: int) -> str:
        call = program[index]
        watches = dict(zip((OWN, *self.nets.unets), self.watches, strict=False))
        at = watches[call.net].find_observed(call) if watches else ""
        return f"{at} is hooked" if at else ""


def _needs_latents(plan: Plan, anatomy: Any) -> bool:
    """Whether a plan looks at the latents themselves."""
    if plan.drift is not None and plan.drift.probe == SAMPLE:
        return True
    rows = (row.inherit for row in plan.rows)
    hows = {how for row in rows for at, how in row.items() if at == HEAD}
    return any(METHODS[how].takes_input for how in hows)


# -- whose call a UNet call is ---------------------------------------------------------------------


def find_follower(followers: Sequence[Follower], timestep: Any) -> Follower | None:
    """Whose call this is: of the pipeline that makes it, else of the scheduler, else by thread.

    The calls of a pipeline that is not attached are nobody's, whatever UNet and scheduler it has.
    A time step that is an element of a scheduler's tensor tells whose loop a loop of one's own is.
    """
    piped = [each for each in followers if each.pipe is not None]
    caller = find_calling_pipeline() if piped else None
    for each in piped:
        if each.pipe is caller or (caller is None and each.clock.owns(timestep)):
            return each
    if caller is not None or is_view(timestep):
        followers = [each for each in followers if each.pipe is None]
    here = threading.get_ident()
    mine = [each for each in followers if each.thread == here]
    loose = mine or [each for each in followers if each.thread is None]
    return loose[-1] if len(loose) == 1 else None
