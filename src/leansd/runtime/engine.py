"""The engine: hooks around one UNet that make every call follow the plan of whoever calls.

A UNet call is placed by a follower, becomes a `UNetStep`, and the units ask that step what to do.
Whatever is unexpected (another batch, size, dtype or device, a call out of order) makes a call a
full one. The registry at the end says which UNets are hooked, and for whom.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from leansd.anatomy.reading import read_anatomy
from leansd.core.devices import Stopwatch, start_stopwatch
from leansd.errors import LeansdError
from leansd.plans.address import get_layer
from leansd.plans.anatomy import Anatomy
from leansd.plans.row import OWN, Attend
from leansd.runtime.arguments import OutputShapes, UNetArguments
from leansd.runtime.call import UNetStep
from leansd.runtime.compiled import CompiledCalls, TraceSlot, freeze
from leansd.runtime.context import find_calling_pipeline
from leansd.runtime.controlnet import ControlHook, select_residuals
from leansd.runtime.guidance import run_step
from leansd.runtime.hooks import (
    PLAIN,
    ForwardHooks,
    exchange_forward,
    hook_pipeline_end,
    patch_method,
)
from leansd.runtime.run import Follower, find_follower
from leansd.runtime.watch import NetWatch
from leansd.surgery.parts.gri import attend, call_at_size, find_processor

UNET = "unet"
LOCK = threading.Lock()
"""Held while UNets are hooked, and released again."""


class Place(NamedTuple):
    """Where a hooked module hangs, so that another one in its place is noticed."""

    children: Mapping[str, nn.Module | None]
    """The children of the module above it, by name."""
    name: str
    child: nn.Module | None


class _ThreadState(threading.local):
    """What one thread is in the midst of."""

    step: UNetStep | None = None
    """The call whose units run."""
    expected: tuple[Follower, UNetStep] | None = None
    """A call that another UNet's engine is handing over: it goes through the module, for what is
    hooked to that, offloading for one, has to come along."""
    last: Follower | None = None
    """Whose call was the last one."""


class Engine:
    """Hooked to one UNet while anything is attached to it."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.unet = unet
        self.anatomy: Anatomy = read_anatomy(unet)
        self.followers: tuple[Follower, ...] = ()
        self.guests: tuple[Follower, ...] = ()
        """Followers of other UNets whose plans run this one at some steps."""
        self.shapes = OutputShapes(unet, self.anatomy)
        self.watch = NetWatch(unet, self.anatomy)
        self._thread = _ThreadState()
        self._traced = TraceSlot()
        self._compiled: dict[object, CompiledCalls] = {}
        self._blocks = _list_block_outputs(self.anatomy)
        self._paths = self._list_paths()
        self._places = self._list_places()
        self._end_hook = hook_pipeline_end(unet, self._end_call)
        self._paused = pause_compiled(unet)
        self.hooks = ForwardHooks({}, self._around)
        # Last: from here on other threads come in.
        self.hooks.renew(self._list_modules())

    def release(self) -> None:
        """Take everything off the UNet."""
        self._end_hook.release()
        self.hooks.release()
        while self._paused:
            module, compiled = self._paused.popitem()
            module._compiled_call_impl = compiled

    def resume(self) -> bool:
        """Hook the UNet once more after a release; False where it is not what it was."""
        if read_anatomy(self.unet).fingerprint != self.anatomy.fingerprint:
            return False
        if not self.hooks.resume(self._list_modules()):
            return False
        self._places = self._list_places()
        self._end_hook = hook_pipeline_end(self.unet, self._end_call)
        self._paused = pause_compiled(self.unet)
        return True

    def _list_paths(self) -> dict[str, str]:
        """Paths of the modules to hook, by name; that of the UNet itself is empty."""
        paths = {UNET: ""}
        paths.update((block, path) for block, (path, _, _) in self._blocks.items())
        paths.update((unit.at, unit.path) for unit in (*self.anatomy.units, *self.anatomy.parts))
        return paths

    def _list_modules(self) -> dict[str, nn.Module]:
        return {name: self.unet.get_submodule(path) for name, path in self._paths.items()}

    def _list_places(self) -> list[Place]:
        places: list[Place] = []
        for path in filter(None, self._paths.values()):
            parent, _, name = path.rpartition(".")
            children = self.unet.get_submodule(parent)._modules
            places.append(Place(children, name, children.get(name)))
        return places

    def _mend(self) -> None:
        """Hook what was put in the place of hooked modules, and what others have unhooked.

        Peft wraps and unwraps layers; diffusers' own hooks take off what came after them.
        """
        same = all(children.get(name) is child for children, name, child in self._places)
        if same and self.hooks.is_whole:
            return
        with LOCK:
            if self.followers or self.guests:  # not released meanwhile
                self.hooks.renew(self._list_modules())
                self._places = self._list_places()

    # -- a call of the UNet ----------------------------------------------------------------------

    def _around(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if name == UNET:
            return self._run_unet(forward, *args, **kwargs)
        step = self._find_slot().step
        if step is None:
            return forward(*args, **kwargs)
        if name in self._blocks:
            return self._run_block(step, name, forward, *args, **kwargs)
        by = step.call.attend.get(name)
        if by is not None:
            forward = self._gate(name, by, forward)
        return step.run_unit(name, forward, *args, **kwargs)

    def _run_unet(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        arguments, thread = UNetArguments.bind(args, kwargs), self._thread
        expected, thread.expected = thread.expected, None
        if expected is not None:
            return self._run_step(*expected, arguments, forward)
        follower = None
        if arguments.is_complete:
            thread.last = follower = find_follower(self.followers, arguments.timestep)
        self._mend()
        step = follower.start_call(arguments) if follower is not None else None
        if not arguments.is_complete:
            return forward(*args, **kwargs)  # which says what is missing
        stop = start_stopwatch(arguments.sample.device)
        if follower is None or step is None:
            output = forward(*args, **kwargs)
            self._note_outside(follower, arguments, stop())
            return output
        arguments = follower.complete(arguments)
        try:
            if step.call.net == OWN:
                output = self._run_step(follower, step, arguments, forward)
            else:
                other = follower.nets.unets[step.call.net]
                output = _ENGINES[id(other)].receive(follower, step, arguments)
            output = follower.mix(step, output)
        except BaseException:
            follower.abort()
            raise
        follower.end_call(step, output[0], stop())
        return output

    def _note_outside(
        self, follower: Follower | None, arguments: UNetArguments, seconds: Stopwatch
    ) -> None:
        """Tell whoever may have meant a call that it was of no run."""
        meant = self.followers if follower is None else (follower,)
        if follower is None and find_calling_pipeline() is not None:
            return
        for each in meant:
            each.note_outside(arguments, seconds)

    def receive(self, follower: Follower, step: UNetStep, arguments: UNetArguments) -> Any:
        """Run this UNet in the place of the one that a pipeline has called."""
        self._mend()
        self._thread.expected = follower, step
        try:
            return select_residuals(arguments, follower.unet, self.unet).call(self.unet)
        finally:
            self._thread.expected = None

    def _run_step(
        self,
        follower: Follower,
        step: UNetStep,
        arguments: UNetArguments,
        forward: Callable[..., Any],
    ) -> Any:
        """One call of this UNet, compiled where that is asked for and possible."""
        sample = arguments.sample
        step.writable = self._has_freeu() or arguments.adds_in_place
        for own, _ in step.split(sample):
            if not (own.shapes or own.records):
                own.shapes.update(self.shapes.make_shapes(sample))
        compiled = self._find_compiled(follower)
        if compiled is not None and compiled.suit(step, sample):
            return compiled.run(step, arguments, forward)
        return self.run_lanes(step, arguments, forward)

    def run_lanes(
        self, step: UNetStep, arguments: UNetArguments, forward: Callable[..., Any]
    ) -> Any:
        """The UNet's forward for the lanes that run, with its units following `step`."""
        slot = self._find_slot()
        slot.step = step
        try:
            if step.call.attend:
                # A gate to GRI has to know what feature map its tokens are.
                height, width = arguments.sample.shape[-2:]
                return call_at_size((height, width), run_step, step, arguments, forward)
            return run_step(step, arguments, forward)
        finally:
            slot.step = None

    def _find_slot(self) -> _ThreadState | TraceSlot:
        """Where units find their step: one place a thread, or that of the call being traced."""
        return self._traced if torch.compiler.is_dynamo_compiling() else self._thread

    def _find_compiled(self, follower: Follower) -> CompiledCalls | None:
        """The compiled calls of all followers with the same options."""
        options = follower.compile_options
        if options is None or not follower.compiles():
            return None
        key = freeze(options)
        if key not in self._compiled:
            with LOCK:
                self._compiled.setdefault(key, CompiledCalls(self.run_lanes, self.shapes, options))
        return self._compiled[key]

    def _has_freeu(self) -> bool:
        """Whether FreeU is on: its up blocks multiply what comes in in place."""
        return any(getattr(block, "b1", None) is not None for block in self.unet.up_blocks)

    def _run_block(
        self, step: UNetStep, block: str, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """A block with nothing to compute returns at once: it would join skips for nobody."""
        _, units, outputs = self._blocks[block]
        if step.skips(units) and kwargs.get("additional_residuals") is None:
            given = tuple(step.give(at) for at in outputs)
            return (given[-1], given) if block.startswith("dn") else given[-1]
        return forward(*args, **kwargs)

    def _gate(self, name: str, by: Attend, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of a self-attention that attends otherwise in this call."""
        attention: Any = self.unet.get_submodule(self._paths[name])
        processor = find_processor(attention, by)
        if processor is None:
            return forward
        return exchange_forward(forward, functools.partial(attend, attention, processor))

    def _end_call(self) -> None:
        """A pipeline call is over in this thread, also one that was interrupted: keep nothing."""
        self._mend()
        last, self._thread.last = self._thread.last, None
        caller = find_calling_pipeline()
        for follower in self.followers:
            ended = follower is last if caller is None else follower.pipe is caller
            if ended and follower.pipe is not None:
                follower.end_run()


def pause_compiled(unet: nn.Module) -> dict[Any, Any]:
    """Let modules that `compile()` has compiled run eagerly; gives what to put back, by module.

    Their graphs would hold the hooks of one call for all of them.
    """
    paused: dict[Any, Any] = {}
    for module in unet.modules():
        compiled = vars(module).get("_compiled_call_impl")
        if compiled is not None:
            paused[module] = compiled
            module._compiled_call_impl = None
    return paused


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
    return table


# -- the registry: which UNets and ControlNets are hooked, and for whom ----------------------------

_ENGINES: WeakValueDictionary[int, Engine] = WeakValueDictionary()
"""Engines by the id of their UNet, which they keep alive."""
_CONTROLS: WeakValueDictionary[int, ControlHook] = WeakValueDictionary()
"""Hooks by the id of their ControlNet, which they keep alive."""
ANCHOR = "_leansd_engine"
"""Where a UNet keeps the engine that has compiled it."""


class EngineAnchor:
    """Keeps an engine, and so its graphs, for as long as its UNet lives; a copy keeps none."""

    def __init__(self, engine: Engine | None = None) -> None:
        self.engine = engine

    def __deepcopy__(self, memo: dict[int, Any]) -> EngineAnchor:
        return EngineAnchor()

    def __reduce__(self) -> tuple[type[EngineAnchor], tuple[()]]:
        return EngineAnchor, ()


def attach(follower: Follower) -> None:
    """Hook the UNets and the ControlNet that a follower's plan runs, if they are not yet.

    Raises:
        LeansdError: the same pipeline is attached already.
    """
    with LOCK:
        engine = _find_engine(follower.unet, follower)
        for other in engine.followers:
            if other.pipe is follower.pipe and _share_thread(other, follower):
                _drop_unused(engine)
                raise LeansdError(
                    f"already attached: it follows plan {other.source.name}; leave that `with` "
                    "block first, or call leansd.release_"
                )
        hosts = [_find_engine(unet, follower) for unet in follower.nets.unets.values()]
        follower.watches = tuple(each.watch for each in (engine, *hosts))
        if follower.wrapper is not None:
            call = functools.partial(_call_inside, follower.unet)
            follower.bypass = patch_method(follower.wrapper, PLAIN, call)
        engine.followers += (follower,)
        for host in hosts:
            host.guests += (follower,)
        controlnet = getattr(follower.pipe, "controlnet", None)
        if isinstance(controlnet, nn.Module):
            control = _CONTROLS.get(id(controlnet))
            if control is None:
                control = ControlHook(engine.anatomy, controlnet, find_follower)
                _CONTROLS[id(controlnet)] = control
            control.followers += (follower,)


def detach(follower: Follower) -> None:
    """Undo `attach`; after the last follower all is as it was before the first.

    It goes by what was hooked, not by what the pipeline has now: its UNet may be another one.
    """
    with LOCK:
        for engine in list(_ENGINES.values()):
            engine.followers = _leave_out(engine.followers, follower)
            engine.guests = _leave_out(engine.guests, follower)
            _drop_unused(engine)
        for key, control in list(_CONTROLS.items()):
            control.followers = _leave_out(control.followers, follower)
            if not control.followers:
                control.hooks.release()
                del _CONTROLS[key]
    if follower.bypass is not None:
        follower.bypass.release()
        follower.bypass = None
    follower.forget()


def _call_inside(
    unet: nn.Module, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Call the UNet inside `torch.compile`'s wrapper, past the graph that knows no plan."""
    return unet(*args, **kwargs)


def list_followers(unet: nn.Module) -> tuple[Follower, ...]:
    """The followers that a UNet's calls have."""
    engine = _ENGINES.get(id(unet))
    return engine.followers if engine is not None else ()


def find_followers(pipe: Any | None, unet: nn.Module | None) -> list[Follower]:
    """The followers of a pipeline, whatever UNet they hooked; without one, of a bare UNet."""
    engines = list(_ENGINES.values())
    every = [each for engine in engines for each in engine.followers if each.pipe is pipe]
    return [each for each in every if pipe is not None or each.unet is unet]


def _find_engine(unet: UNet2DConditionModel, follower: Follower) -> Engine:
    """The engine that is hooked to a UNet; a new one, where there is none."""
    engine = _ENGINES.get(id(unet))
    if engine is None:
        engine = _ENGINES[id(unet)] = _revive(unet) or Engine(unet)
    if follower.compile_options is not None:
        setattr(unet, ANCHOR, EngineAnchor(engine))
    return engine


def _revive(unet: UNet2DConditionModel) -> Engine | None:
    """The engine that a UNet keeps, hooked again, unless its modules have changed."""
    engine = getattr(unet, ANCHOR, EngineAnchor()).engine
    if engine is None or engine.unet is not unet:
        return None
    return engine if engine.resume() else None


def _drop_unused(engine: Engine) -> None:
    if not (engine.followers or engine.guests):
        engine.release()
        _ENGINES.pop(id(engine.unet), None)


def _leave_out(followers: Sequence[Follower], one: Follower) -> tuple[Follower, ...]:
    return tuple(each for each in followers if each is not one)


def _share_thread(one: Follower, other: Follower) -> bool:
    """Whether both would answer in some thread; a pipeline serves one thread at a time."""
    return one.pipe is not None or None in (one.thread, other.thread) or one.thread == other.thread
