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
    if strand.around is None:
        return forward(*args, **kwargs)
    return strand.around(strand.name, forward, *args, **kwargs)


class Weave:
    """`around` woven around `modules`, until `release` or the end of the `with` block."""

    def __init__(self, modules: Mapping[str, nn.Module], around: Around) -> None:
        self._woven: list[tuple[nn.Module, Strand, Forward, Forward, bool]] = []
        for name, module in modules.items():
            strand = Strand(name, around)
            before = module.forward
            woven = functools.partial(call_around, strand, before)
            functools.update_wrapper(woven, before)
            self._woven.append((module, strand, woven, before, "forward" in vars(module)))
            module.forward = woven

    def release(self) -> None:
        """Put back what was there. Twice is as good as once."""
        while self._woven:
            module, strand, woven, before, was_set = self._woven.pop()
            strand.around = None
            if vars(module).get("forward") is not woven:
                _replace_underneath(module, woven, before)
            elif was_set:
                module.forward = before
            else:
                del module.forward

    def __enter__(self) -> Weave:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def _replace_underneath(module: nn.Module, woven: Forward, before: Forward) -> None:
    """Take `woven` out where a later hook (accelerate's offload) has kept it as the old forward."""
    for name, value in list(vars(module).items()):
        if value is woven:
            setattr(module, name, before)
