"""Weaving a function around modules, and taking it off again exactly.

The one way in: nothing else in this package patches a module. An instance's `forward` is replaced,
so classes, state_dict keys and hooks stay as they are. What is put there is a `functools.partial`
over the bound method, which `copy.deepcopy` rebinds to the copy; the copy itself is plain.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
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


class Weave:
    """`around` woven around `modules`, until `release` or the end of the `with` block."""

    def __init__(self, modules: Mapping[str, nn.Module], around: Around) -> None:
        self._around = around
        self._woven: list[tuple[nn.Module, Strand, Forward, Forward, bool]] = []
        self._released: list[tuple[nn.Module, Strand, Forward, Forward, bool]] = []
        for name, module in modules.items():
            strand = Strand(name, around)
            slot = _find_slot(module)
            before = getattr(module, slot)
            woven = functools.partial(call_around, strand, before)
            functools.update_wrapper(woven, before)
            self._woven.append((module, strand, woven, before, PLAIN in vars(module)))
            setattr(module, slot, woven)

    def release(self) -> None:
        """Put back what was there, wherever hooks have moved it. Twice is as good as once."""
        while self._woven:
            module, strand, woven, before, was_set = self._woven.pop()
            self._released.append((module, strand, woven, before, was_set))
            strand.around = None
            holds = vars(module)
            if holds.get(PLAIN) is woven and not was_set:
                delattr(module, PLAIN)
                continue
            for slot in (PLAIN, HOOKED):
                if holds.get(slot) is woven:
                    setattr(module, slot, before)

    def resume(self, modules: Mapping[str, nn.Module]) -> bool:
        """Weave what was released again, with the very same functions: compiled graphs know them.

        Returns False, and does nothing, where it would not be `modules` or what one of them runs
        has changed since.
        """
        if {strand.name: module for module, strand, *_ in self._released} != dict(modules):
            return False
        for module, _, _, before, was_set in self._released:
            if getattr(module, _find_slot(module)) != before or was_set != (PLAIN in vars(module)):
                return False
        while self._released:
            module, strand, woven, before, was_set = self._released.pop()
            self._woven.append((module, strand, woven, before, was_set))
            strand.around = self._around
            setattr(module, _find_slot(module), woven)
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


def _find_slot(module: nn.Module) -> str:
    """Within accelerate's offload hooks, which come and go with every pipeline call."""
    return HOOKED if HOOKED in vars(module) else PLAIN
