"""Watching modules by hooks that they do not know of.

What others hook inside a UNet is computed at every call; a test that counts what a plan leaves out
has to look without being seen.
"""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules import module as torchs

Hook = Callable[..., Any]


class Watch:
    """Calls a hook whenever its module runs, until it is removed."""

    def __init__(self, seen: dict[nn.Module, Hook], module: nn.Module, hook: Hook) -> None:
        assert module not in seen, "one watch a module"
        self._seen, self._module = seen, module
        seen[module] = hook
        if len(seen) == 1:
            _HANDLES[id(seen)] = _REGISTER[id(seen)](
                lambda running, *args: seen[running](running, *args) if running in seen else None
            )

    def remove(self) -> None:
        del self._seen[self._module]
        if not self._seen:
            _HANDLES.pop(id(self._seen)).remove()


_BEFORE: dict[nn.Module, Hook] = {}
_AFTER: dict[nn.Module, Hook] = {}
_HANDLES: dict[int, Any] = {}
_REGISTER: dict[int, Callable[[Hook], Any]] = {
    id(_BEFORE): torchs.register_module_forward_pre_hook,
    id(_AFTER): torchs.register_module_forward_hook,
}


def forget_watches() -> None:
    """Remove those that are left: modules of later tests, compiled ones too, must not meet them."""
    for seen in (_BEFORE, _AFTER):
        seen.clear()
        if (handle := _HANDLES.pop(id(seen), None)) is not None:
            handle.remove()


def watch(module: nn.Module, hook: Hook) -> Watch:
    """Call `hook(module, inputs, output)` after every call; what it gives is put in its place."""
    return Watch(_AFTER, module, hook)


def watch_before(module: nn.Module, hook: Hook) -> Watch:
    """Call `hook(module, inputs)` before every call."""
    return Watch(_BEFORE, module, hook)
