"""Callers: which pipeline makes a UNet call, known from the stack of its thread."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from diffusers import ConfigMixin
from torch import nn

INSIDE = ("torch", "leansd.runtime")
"""Modules whose frames are no pipeline's."""


def find_calling_pipeline() -> Any | None:
    """The innermost pipeline that is being called in this thread."""
    return next((owner for _, owner in _list_methods() if _is_pipeline(owner)), None)


def count_depth(pipe: Any) -> int:
    """How many calls of a pipeline lie within one another in this thread.

    They are two where a callback draws a preview by the pipeline that it was called by.
    """
    return sum(name == "__call__" and owner is pipe for name, owner in _list_methods())


def _list_methods() -> Iterator[tuple[str, Any]]:
    """The methods that this thread is in, the innermost first, each with its object."""
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        is_method = code.co_argcount > 0 and code.co_varnames[0] == "self"
        if is_method and not frame.f_globals.get("__name__", "").startswith(INSIDE):
            yield code.co_name, frame.f_locals.get("self")
        frame = frame.f_back


def _is_pipeline(owner: Any) -> bool:
    """Whether an object is a pipeline of diffusers, an ordinary or a modular one."""
    is_configured = isinstance(owner, ConfigMixin) and not isinstance(owner, nn.Module)
    return is_configured and hasattr(type(owner), "components")
