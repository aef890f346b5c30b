"""Weaving a function around modules, and taking it off again exactly.

The one way in: nothing else in this package patches a module. An instance's `forward` is replaced,
so classes, state_dict keys and hooks stay as they are. What is put there is a `functools.partial`
over the bound method, which `copy.deepcopy` rebinds to the copy; the copy itself is plain.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import nn

Forward = Callable[..., Any]
Around = Callable[..., Any]
"""`around(name, forward, *args, **kwargs)` returns what the module shall return."""

PLAIN, HOOKED = "forward", "_old_forward"
"""Where a module keeps its forward, and where it does while accelerate has hooked it."""


class Strand:
    """The link from one woven module to the function around it; cut in copies and after release."""

    __slots__ = ("around", "name")

    def __init__(self, name: str, around: Around | None) -> None:
        self.name = name
        self.around = around

    def __deepcopy__(self, memo: dict[int, Any]) -> Strand:
        return Strand(self.name, None)


def call_around(strand: Strand, forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """What a woven module's `forward` does."""
    around = strand.around  # read once: another thread may cut the strand meanwhile
    if around is None:
        return forward(*args, **kwargs)
    return around(strand.name, forward, *args, **kwargs)


def exchange_forward(forward: Forward, own: Forward) -> Forward:
    """`forward` of a module with `own` in the place of the module's own, below all that is woven.

    For one call: nothing is put on the module.
    """
    if isinstance(forward, functools.partial) and forward.func is call_around:
        strand, before = forward.args
        return functools.partial(call_around, strand, exchange_forward(before, own))
    return own


@dataclass(frozen=True, slots=True)
class Woven:
    """One module with what was put in the place of its forward."""

    module: nn.Module
    strand: Strand
    woven: Forward
    before: Forward
    was_set: bool
    """Whether the instance had a forward of its own before."""

    def release(self) -> None:
        """Put back what was there, wherever hooks have moved it."""
        self.strand.around = None
        holds = vars(self.module)
        if holds.get(PLAIN) is self.woven and not self.was_set:
            delattr(self.module, PLAIN)
            return
        for slot in (PLAIN, HOOKED):
            if holds.get(slot) is self.woven:
                setattr(self.module, slot, self.before)

    @property
    def is_plain(self) -> bool:
        """Whether a released module runs what it did before it was woven."""
        runs = getattr(self.module, _find_slot(self.module))
        return runs == self.before and self.was_set == (PLAIN in vars(self.module))

    def resume(self, around: Around) -> None:
        """Put there once more what was released."""
        self.strand.around = around
        setattr(self.module, _find_slot(self.module), self.woven)


def _find_slot(module: nn.Module) -> str:
    """Within accelerate's offload hooks, which come and go with every pipeline call."""
    return HOOKED if HOOKED in vars(module) else PLAIN


def weave_module(name: str, module: nn.Module, around: Around) -> Woven:
    strand = Strand(name, around)
    slot = _find_slot(module)
    before = getattr(module, slot)
    woven = functools.partial(call_around, strand, before)
    functools.update_wrapper(woven, before)
    was_set = PLAIN in vars(module)
    setattr(module, slot, woven)
    return Woven(module, strand, woven, before, was_set)


class Weave:
    """`around` woven around `modules`, until `release` or the end of the `with` block."""

    def __init__(self, modules: Mapping[str, nn.Module], around: Around) -> None:
        self._around = around
        self._woven: dict[str, Woven] = {}
        self._released: dict[str, Woven] = {}
        self.renew(modules)

    def renew(self, modules: Mapping[str, nn.Module]) -> None:
        """Weave what stands in the place of modules now; those that are woven stay as they are."""
        for name, module in modules.items():
            old = self._woven.get(name)
            if old is not None and old.module is module:
                continue
            if old is not None:
                old.release()
            self._woven[name] = weave_module(name, module, self._around)

    def release(self) -> None:
        """Put back what was there. Twice is as good as once."""
        while self._woven:
            name, each = self._woven.popitem()
            each.release()
            self._released[name] = each

    def resume(self, modules: Mapping[str, nn.Module]) -> bool:
        """Weave what was released again, with the very same functions: compiled graphs know them.

        Returns False, and does nothing, where it would not be `modules` or what one of them runs
        has changed since.
        """
        released = self._released
        if {name: each.module for name, each in released.items()} != dict(modules):
            return False
        if not all(each.is_plain for each in released.values()):
            return False
        while released:
            name, each = released.popitem()
            each.resume(self._around)
            self._woven[name] = each
        return True

    def __enter__(self) -> Weave:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


ENDED = "_reset_stateful_cache"
"""What diffusers' pipelines call at the end of a call on every component that has it."""


class EndOfCall:
    """`on_end` called whenever a pipeline call ends that has `module` among its components."""

    def __init__(self, module: nn.Module, on_end: Callable[[], None]) -> None:
        self._module = module
        self._before = vars(module).get(ENDED)
        self._strand = Strand(ENDED, on_end)
        self._woven = functools.partial(end_call, self._strand, getattr(module, ENDED, None))
        setattr(module, ENDED, self._woven)

    def release(self) -> None:
        """Put back what was there. Twice is as good as once."""
        self._strand.around = None
        if vars(self._module).get(ENDED) is not self._woven:
            return
        delattr(self._module, ENDED)
        if self._before is not None:
            setattr(self._module, ENDED, self._before)


def end_call(strand: Strand, before: Callable[..., None] | None, *args: Any, **kwargs: Any) -> None:
    """What a pipeline calls at its end, on the module or on a copy of it."""
    if before is not None:
        before(*args, **kwargs)
    on_end = strand.around
    if on_end is not None:
        on_end()
