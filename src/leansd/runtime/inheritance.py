"""Feature inheritance at run time: a UNet's units follow a plan, call by call.

An `Engine` is woven around one UNet and serves every attachment to it. A UNet call is placed by an
attachment's clock, becomes a `Pass`, and the units ask that pass what to do. Whatever is unexpected
(another batch, size, dtype or device, a call out of order) makes a call a full one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import UNet2DConditionModel

from leansd.anatomy.reading import read_anatomy
from leansd.errors import LeansdError
from leansd.plans.address import get_block, get_layer
from leansd.plans.anatomy import Anatomy
from leansd.plans.liveness import Program, compile_plan
from leansd.plans.plan import Plan
from leansd.plans.presets import Preset, build_for, look_up
from leansd.runtime.clock import Clock, Course, LoopClock, SchedulerClock
from leansd.runtime.report import Lap, Report, Tally, start_lap
from leansd.runtime.store import RECALLS, Shape, Store, unwrap
from leansd.runtime.weave import Weave

UNET = "unet"


class Branch:
    """The state of one run for one of the calls that a pipeline makes at each step.

    Ordinary pipelines make one; those that call the UNet for each guidance branch, or for each tile
    of a panorama, make several, and each has features of its own.
    """

    def __init__(self) -> None:
        self.store = Store()
        self.shapes: dict[str, Shape] = {}
        self.program: Program | None = None
        self.last = -1
        self.signature: object = None


class Pass:
    """One UNet call: answers every unit's question what to do."""

    def __init__(self, branch: Branch, program: Program, index: int, course: Course) -> None:
        self.branch = branch
        self.call = program[index]
        self.log_snr = course.log_snr
        self.records_shapes = index == program.start
        self.writable = False
        """Whether placeholders may be written to."""

    def run_unit(self, at: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call, branch = self.call, self.branch
        if at in call.pattern.computed:
            given = args[0].detach().clone() if self._needs_input(at) else None
            output = forward(*args, **kwargs)
            for kept in call.keeps.get(at, ()):
                branch.store.keep(kept, unwrap(output), given)
            if self.records_shapes:
                branch.shapes[at] = Shape.of(output)
            return output
        return branch.shapes[at].wrap(self.give(at, args[0]))

    def give(self, at: str, given: torch.Tensor | None = None) -> torch.Tensor:
        """The output of a unit that is not computed; `given` is its present input."""
        how = self.call.pattern.inherited.get(at)
        if how is None:
            return self.branch.shapes[at].make_placeholder(writable=self.writable)
        sources = self.call.sources[at]
        return RECALLS[how](self.branch.store, sources, self.call.index, self.log_snr, given)

    def skips(self, units: Sequence[str]) -> bool:
        """Whether none of these units runs or needs its input."""
        pattern = self.call.pattern
        return all(
            at in pattern.idle or pattern.inherited.get(at) in ("reuse", "forecast") for at in units
        )

    def _needs_input(self, at: str) -> bool:
        return any(kept.what == "change" for kept in self.call.keeps.get(at, ()))


class Attachment:
    """A pipeline, or a raw UNet, that follows a plan: `with leansd.inherit(pipe, plan) as run`."""

    def __init__(self, engine: Engine, pipe: Any | None, source: Plan | Preset) -> None:
        self.engine = engine
        self.pipe = pipe
        self.source = source
        self.thread: int | None = None
        """The thread it was entered in; None for one that holds until it is released."""
        self._local = threading.local()
        self._last: Tally | None = None
        if isinstance(source, Plan):
            source.resolve(engine.anatomy)
        elif pipe is None:
            raise LeansdError(
                f"a bare UNet does not say how many steps a run has; give the pipeline, or a plan "
                f"as in leansd.preset({source.name!r}, steps=30)"
            )

    # -- user's side -------------------------------------------------------------------------

    def __enter__(self) -> Attachment:
        self.thread = threading.get_ident()
        self.engine.attach(self)
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def release(self) -> None:
        """Stop following the plan; the UNet is as it was, nothing is kept."""
        self.engine.detach(self)
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
        return self._last.summarise(self.engine)

    # -- engine's side -----------------------------------------------------------------------

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

    def begin(self, sample: torch.Tensor, timestep: Any) -> Pass | None:
        """Place a UNet call; None where it is none of this attachment's."""
        tick = self.get_clock().tell(timestep)
        if tick is None:
            return None
        local = self._local
        if tick.starts:
            plan = build_for(self.source, tick.course.steps, self.engine.anatomy.up_blocks)
            local.plan, local.branches, local.here = plan, {}, (-1, -1)
            local.tally = self._last = Tally(plan)
        index, ordinal = local.here
        ordinal = ordinal + 1 if index == tick.index else 0
        local.here = (tick.index, ordinal)
        branch = local.branches.setdefault(ordinal, Branch())
        program = self._follow(branch, local.plan, tick.course, tick.index, sample)
        branch.last = tick.index
        return Pass(branch, program, tick.index, tick.course)

    def _follow(
        self, branch: Branch, plan: Plan, course: Course, index: int, sample: torch.Tensor
    ) -> Program:
        """The branch's program, started over where the call is not the one it expects."""
        signature = (sample.shape, sample.dtype, sample.device)
        expected = branch.program is not None and index == branch.last + 1
        if not expected or signature != branch.signature:
            branch.store.clear()
            branch.shapes.clear()
            branch.signature = signature
            branch.program = self.engine.compile(plan, index, course.rows, course.moments)
        assert branch.program is not None
        return branch.program

    def end(self, step: Pass, lap: Lap) -> None:
        local = self._local
        local.tally.add(
            step.call, lap, sum(branch.store.bytes for branch in local.branches.values())
        )
        step.branch.store.release(step.call.releases)

    def note_size(self, sample: torch.Tensor, text: torch.Tensor | None) -> None:
        """Remember what the cost of this run is to be counted at."""
        tally: Tally = self._local.tally
        tally.size = (sample.shape[-2], sample.shape[-1])
        tally.tokens = text.shape[1] if text is not None else 0

    def abort(self) -> None:
        """Forget the run: its call failed midway."""
        self._local = threading.local()


class Engine:
    """Woven around one UNet while anything is attached to it."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.unet = unet
        self.anatomy: Anatomy = read_anatomy(unet)
        self.attachments: list[Attachment] = []
        self._active = threading.local()
        self._lock = threading.Lock()
        self._weave: Weave | None = None
        self._blocks = _list_block_outputs(self.anatomy)
        self.compile = lru_cache(maxsize=64)(self._compile)

    def attach(self, attachment: Attachment) -> None:
        with self._lock:
            for other in self.attachments:
                if other.pipe is attachment.pipe and _share_thread(other, attachment):
                    raise LeansdError(
                        f"already attached: it follows plan {other.source.name}; leave that `with` "
                        "block first, or call leansd.release_"
                    )
            self.attachments.append(attachment)
            if self._weave is None:
                self._weave = Weave(self._list_modules(), self._around)

    def detach(self, attachment: Attachment) -> None:
        with self._lock:
            if attachment in self.attachments:
                self.attachments.remove(attachment)
            if not self.attachments and self._weave is not None:
                self._weave.release()
                self._weave = None

    def _list_modules(self) -> dict[str, torch.nn.Module]:
        modules: dict[str, torch.nn.Module] = {UNET: self.unet}
        for block, (path, _, _) in self._blocks.items():
            modules[block] = self.unet.get_submodule(path)
        for unit in self.anatomy:
            modules[unit.at] = self.unet.get_submodule(unit.path)
        return modules

    def _compile(
        self, plan: Plan, start: int, rows: tuple[int, ...], moments: tuple[float, ...]
    ) -> Program:
        return compile_plan(plan, self.anatomy, start=start, rows=rows, moments=moments)

    def _around(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if name == UNET:
            return self._run_unet(forward, *args, **kwargs)
        step: Pass | None = getattr(self._active, "step", None)
        if step is None:
            return forward(*args, **kwargs)
        if name in self._blocks:
            return self._run_block(step, name, forward, *args, **kwargs)
        return step.run_unit(name, forward, *args, **kwargs)

    def _run_unet(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        attachment = self._find(timestep)
        step = attachment.begin(sample, timestep) if attachment is not None else None
        if attachment is None or step is None:
            return self._run_plain(forward, *args, **kwargs)
        step.writable = _adds_in_place(kwargs)
        text = args[2] if len(args) > 2 else kwargs.get("encoder_hidden_states")
        attachment.note_size(sample, text)
        self._active.step = step
        end_lap = start_lap(sample.device)
        try:
            output = forward(*args, **kwargs)
        except BaseException:
            attachment.abort()
            raise
        finally:
            self._active.step = None
        attachment.end(step, end_lap())
        return output

    def _run_plain(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._active.step = None
        return forward(*args, **kwargs)

    def _run_block(
        self, step: Pass, block: str, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """A block with nothing to compute returns at once: it would join skips for nobody."""
        path, units, outputs = self._blocks[block]
        if step.skips(units) and not kwargs.get("additional_residuals"):
            given = tuple(step.give(at) for at in outputs)
            return (given[-1], given) if block.startswith("dn") else given[-1]
        if getattr(self.unet.get_submodule(path), "b1", None) is None:
            return forward(*args, **kwargs)
        # FreeU multiplies what comes in in place.
        before, step.writable = step.writable, True
        try:
            return forward(*args, **kwargs)
        finally:
            step.writable = before

    def _find(self, timestep: Any) -> Attachment | None:
        """Whose call this is: by the scheduler that the time step is a view of, else by thread."""
        attachments = tuple(self.attachments)
        for attachment in attachments:
            if attachment.get_clock().owns(timestep):
                return attachment
        if _is_view(timestep):
            # Part of another scheduler's course, so no attached pipeline's.
            attachments = tuple(each for each in attachments if each.pipe is None)
        here = threading.get_ident()
        mine = [each for each in attachments if each.thread == here]
        loose = mine or [each for each in attachments if each.thread is None]
        return loose[-1] if len(loose) == 1 else None


def _share_thread(one: Attachment, other: Attachment) -> bool:
    """Whether both would answer in some thread; a pipeline serves one thread at a time."""
    return one.pipe is not None or None in (one.thread, other.thread) or one.thread == other.thread


def _adds_in_place(kwargs: dict[str, Any]) -> bool:
    """Whether the UNet's forward will add a T2I-Adapter's features in place."""
    if kwargs.get("down_intrablock_additional_residuals") is not None:
        return True
    return (
        kwargs.get("down_block_additional_residuals") is not None
        and kwargs.get("mid_block_additional_residual") is None
    )


def _is_view(timestep: Any) -> bool:
    """Whether a time step is an element of a longer tensor."""
    if not isinstance(timestep, torch.Tensor):
        return False
    return timestep.untyped_storage().nbytes() > timestep.element_size()


def _list_block_outputs(
    anatomy: Anatomy,
) -> dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """For every block, its module path, its units and those whose outputs the block returns.

    A down block returns what each of its layers and its downsampler gave, for the skips; a mid or
    up block what its last unit gave.
    """
    table: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {}
    for block in anatomy.blocks:
        units = anatomy.select(block).addresses
        ends = {get_layer(at): at for at in units}
        outputs = tuple(ends.values()) if block.startswith("dn") else units[-1:]
        path = anatomy[units[0]].path.rsplit(".", 2)[0]
        table[block] = (path, units, outputs)
        assert all(get_block(at) == block for at in units)
    return table


_ENGINES: WeakKeyDictionary[UNet2DConditionModel, Engine] = WeakKeyDictionary()
_ENGINES_LOCK = threading.Lock()


def get_engine(unet: UNet2DConditionModel) -> Engine:
    """The engine of a UNet; its anatomy is read afresh while nothing is attached."""
    with _ENGINES_LOCK:
        engine = _ENGINES.get(unet)
        if engine is None or not engine.attachments:
            engine = Engine(unet)
            _ENGINES[unet] = engine
        return engine


def inherit(target: Any, plan: Plan | str) -> Attachment:
    """Let a pipeline, or a bare UNet, follow a plan inside a `with` block.

    Args:
        target: a diffusers pipeline with a `unet`, or a `UNet2DConditionModel`.
        plan: a `Plan`, the name of a preset (which fits itself to every run's step count) or the
            path of a plan file.

    Raises:
        LeansdError: the plan does not suit the UNet, or the target is attached already. A run with
            another step count than the plan's is refused before its first step.
    """
    return _make_attachment(target, plan)


def inherit_(target: Any, plan: Plan | str) -> Attachment:
    """The same without a `with`: until `release_(target)`, in every thread."""
    attachment = _make_attachment(target, plan)
    attachment.engine.attach(attachment)
    return attachment


def release_(target: Any) -> None:
    """Undo `inherit_`. Releasing what is not attached does nothing."""
    pipe, unet = _split_target(target)
    engine = _ENGINES.get(unet)
    for attachment in tuple(engine.attachments) if engine is not None else ():
        if attachment.pipe is pipe:
            attachment.release()


def _make_attachment(target: Any, plan: Plan | str) -> Attachment:
    pipe, unet = _split_target(target)
    return Attachment(get_engine(unet), pipe, look_up(plan))


def _split_target(target: Any) -> tuple[Any | None, UNet2DConditionModel]:
    """(pipeline or None, UNet)."""
    if isinstance(target, UNet2DConditionModel):
        return None, target
    unet = getattr(target, "unet", None)
    if not isinstance(unet, UNet2DConditionModel):
        raise LeansdError(
            f"cannot attach to a {type(target).__name__}: it needs a pipeline with a "
            "UNet2DConditionModel as its `unet`, or such a UNet"
        )
    return target, unet
