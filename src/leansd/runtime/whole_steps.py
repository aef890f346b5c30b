"""Plans of whole steps for pipelines whose denoiser is a transformer, such as SD3's or FLUX's.

Of such a denoiser nothing is known but its output, so a plan may inherit the head alone. The clock
is the scheduler's own step index; what is played lies in `leansd.core`.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from leansd.anatomy.reading import unwrap_module
from leansd.core.devices import Stopwatch, start_stopwatch
from leansd.core.player import Player
from leansd.core.schedule import CallSchedule
from leansd.errors import LeansdError
from leansd.plans.anatomy import WHOLE
from leansd.plans.plan import Plan
from leansd.plans.resolve import PlanContext, Resolved, Source, resolve_plan
from leansd.runtime.clock import read_schedule
from leansd.runtime.context import (
    count_depth,
    describe_runs,
    find_calling_pipeline,
    read_scale,
)
from leansd.runtime.hooks import (
    COMPILED,
    HOOKED,
    PLAIN,
    ForwardHooks,
    PatchedMethod,
    hook_pipeline_end,
)
from leansd.runtime.report import Report
from leansd.runtime.watch import OTHER_NET, Conditions, NetState, NetWatch

CONDITIONS = ("encoder_hidden_states", "pooled_projections", "cap_feats", "skip_layers")
"""Arguments by which calls of one step are told apart and changes in the midst of a run noticed."""


class WholeRun:
    """One run of a pipeline."""

    def __init__(
        self, plan: Plan, schedule: CallSchedule, notes: tuple[str, ...], transformer: nn.Module
    ) -> None:
        self.notes = notes
        self.schedule = schedule
        self.player = Player(plan, schedule)
        self.times: list[tuple[int, Stopwatch]] = []
        self.wrap: Callable[[torch.Tensor], Any] = Transformer2DModelOutput
        """How the transformer gives an output where not in a tuple."""
        self._index, self._ordinal = -1, 0
        self._watch = NetWatch(transformer, WHOLE)
        self._known: dict[int, tuple[NetState, Conditions]] = {}
        """What the last step's calls went by."""

    def take_call(self, index: int, device: torch.device, named: Mapping[str, Any]) -> Hashable:
        """An identity for a call: which of its step it is.

        What was kept of it is forgotten where others look into the transformer, or something is not
        as it was at the step before.
        """
        self._ordinal = self._ordinal + 1 if index == self._index else 0
        self._index, key = index, self._ordinal
        why = self._find_change(key, {name: named[name] for name in CONDITIONS if name in named})
        if why:
            self.player.forget(device, (key,))
            self.player.stats.forced[why] += 1
        return key

    def _find_change(self, key: int, named: Mapping[str, Any]) -> str:
        """Why a call cannot go on from that of the step before, in words; empty where it can."""
        state, conditions = self._watch.read(), Conditions(named)
        then, before = self._known.get(key, (state, conditions))
        self._known[key] = state, conditions
        if self._watch.is_hooked:
            return "a module of the transformer is hooked"
        if state is not then:
            return OTHER_NET
        name = conditions.find_change(before)
        return f"{name} changed" if name else ""

    def note_odd(self, index: int, stop: Callable[[], Stopwatch]) -> None:
        """Count a call of which nothing can be kept."""
        stats = self.player.stats
        stats.calls.add(index)
        stats.computed.add(index)
        stats.forced["what the transformer takes or gives is no one tensor"] += 1
        self.times.append((index, stop()))


class WholeStepFollower:
    """Follows a plan with the calls of a pipeline's transformer."""

    def __init__(self, pipe: Any, transformer: nn.Module, source: Source) -> None:
        self.pipe, self.source, self.transformer = pipe, source, transformer
        self._inner: nn.Module = unwrap_module(transformer)[0]
        self._arguments = tuple(inspect.signature(type(self._inner).forward).parameters)[1:]
        """Names of the transformer's arguments, the latents' first."""
        self.thread: int | None = None
        """The thread of the `with` block; a pipeline is one thread's at a time."""
        self.last: WholeRun | None = None
        self._runs: dict[tuple[int, int], WholeRun] = {}
        """Runs by thread, and by how many calls of the pipeline lie within one another there."""
        self._hooks: ForwardHooks | None = None
        self._end: PatchedMethod | None = None
        self._warned: set[str] = set()
        if isinstance(source, Plan):
            self._resolve(PlanContext(source.steps))

    def attach(self) -> None:
        with _LOCK:
            if id(self.pipe) in _ATTACHED:
                raise LeansdError(
                    f"already attached: it follows plan {_ATTACHED[id(self.pipe)].source.name}; "
                    "leave that `with` block first, or call leansd.release_"
                )
            _ATTACHED[id(self.pipe)] = self
            compiled = vars(self.transformer).get(COMPILED) is not None
            slots = (COMPILED,) if compiled else (PLAIN, HOOKED)
            self._hooks = ForwardHooks({"transformer": self.transformer}, self._around, slots)
            self._end = hook_pipeline_end(self._inner, self._forget)

    def release(self) -> None:
        with _LOCK:
            if _ATTACHED.get(id(self.pipe)) is self:
                del _ATTACHED[id(self.pipe)]
        if self._end is not None and self._hooks is not None:
            self._end.release()
            self._hooks.release()
        for run in self._runs.values():
            run.player.clear()
        self._runs.clear()

    def report(self) -> Report:
        """What the last run did, kept and gained.

        Raises:
            LeansdError: nothing has run yet.
        """
        run = self.last
        if run is None or not run.player.stats.calls:
            raise LeansdError(
                "nothing has run yet: call the pipeline first, then ask for the report"
            )
        stats, seconds = run.player.stats, dict[int, float]()
        for index, stopwatch in run.times:
            seconds[index] = seconds.get(index, 0.0) + stopwatch()
        calls, computed, total = len(stats.calls), len(stats.computed), sum(seconds.values())
        each = sum(seconds[index] for index in stats.computed) / computed
        forced = dict(stats.forced)
        if run.player.reason:
            forced[run.player.reason] = calls
        return Report(
            plan=run.player.plan,
            calls=calls,
            full_calls=computed,
            computed=computed,
            inherited=calls - computed,
            idle=0,
            bytes_kept=stats.bytes_kept,
            predicted_speedup=calls / computed,
            measured_speedup=each * calls / total,
            seconds=total,
            forced=forced,
            notes=run.notes,
        )

    # -- a call of the transformer -----------------------------------------------------------------

    def _around(self, _: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if find_calling_pipeline() is not self.pipe:
            return forward(*args, **kwargs)
        named = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        given = named.get(self._arguments[0])
        latents, (run, index) = _stack(given), self._find_run()
        stop = start_stopwatch(self.pipe.device if latents is None else latents.device)
        odd = list[Any]()

        def compute() -> torch.Tensor:
            output = forward(*args, **kwargs)
            found = output if isinstance(output, tuple) else tuple(output.values())
            made = _stack(found[0]) if len(found) == 1 else None
            if made is None:
                odd.append(output)
                raise _OddOutput
            if not isinstance(output, tuple):
                run.wrap = type(output)
            return made

        if latents is None:
            output = forward(*args, **kwargs)
            run.note_odd(index, stop)
            return output
        key = run.take_call(index, latents.device, named)
        try:
            made = run.player.play(index, latents, compute, (key,))
        except _OddOutput:
            run.note_odd(index, stop)
            return odd[0]
        run.times.append((index, stop()))
        rows: Any = made if isinstance(given, torch.Tensor) else list(made.unbind())
        return run.wrap(rows) if named.get("return_dict", True) else (rows,)

    def _find_run(self) -> tuple[WholeRun, int]:
        """This thread's run, and which of its calls comes now."""
        scheduler, call = self.pipe.scheduler, (threading.get_ident(), count_depth(self.pipe))
        index = getattr(scheduler, "step_index", None)
        if index is None:
            index = getattr(scheduler, "begin_index", None) or 0
        run = self._runs.get(call)
        if run is None or run.schedule.timesteps is not scheduler.timesteps:
            if run is not None:
                run.player.clear()
            schedule = read_schedule(scheduler)
            known = PlanContext(
                schedule.steps,
                guidance=read_scale(self.pipe),
                strength=1 - schedule.rows[index] / schedule.steps,
                log_snr=schedule.log_snr if len(schedule.log_snr) == schedule.steps else (),
            )
            resolved = self._resolve(known)
            run = WholeRun(resolved.plan, schedule, resolved.notes, self._inner)
            self.last = self._runs[call] = run
        return run, index

    def _resolve(self, known: PlanContext) -> Resolved:
        resolved = resolve_plan(self.source, describe_runs(self.pipe, known))
        for note in resolved.notes:
            if note not in self._warned:
                self._warned.add(note)
                warnings.warn(note, stacklevel=2)
        return resolved

    def _forget(self) -> None:
        """A pipeline call is over in this thread, also one that was interrupted: keep nothing."""
        if self._hooks is not None:
            self._hooks.renew({"transformer": self.transformer})
        if find_calling_pipeline() in (None, self.pipe):
            thread, depth = threading.get_ident(), count_depth(self.pipe)
            self.last = self._runs.get((thread, depth), self.last)
            for call in [each for each in self._runs if each[0] == thread and each[1] >= depth]:
                self._runs.pop(call).player.clear()


class _OddOutput(Exception):
    """The transformer gives something else than one tensor."""


def _stack(rows: Any) -> torch.Tensor | None:
    """Latents or outputs [B, ...], which come as one tensor or, in Z-Image, as a list of rows.

    None for anything else: pictures of several sizes, lists of lists.
    """
    if isinstance(rows, list) and rows and all(isinstance(each, torch.Tensor) for each in rows):
        same = all(each.shape == rows[0].shape for each in rows)
        return torch.stack(rows) if same else None
    return rows if isinstance(rows, torch.Tensor) else None


_LOCK = threading.Lock()
_ATTACHED: dict[int, WholeStepFollower] = {}
"""Followers by the id of their pipeline, which they keep alive."""


def find_whole_follower(pipe: Any) -> WholeStepFollower | None:
    """The follower that a pipeline's transformer has."""
    return _ATTACHED.get(id(pipe))
