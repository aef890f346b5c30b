"""The command line under way, as it would be typed again: reports say it."""

import shlex
from collections.abc import Sequence
from contextvars import ContextVar

GIVEN: ContextVar[Sequence[str]] = ContextVar("given", default=())
"""The words behind `leansd`."""


def quote_command() -> str:
    """The whole line, quoted for a shell."""
    return shlex.join(["leansd", *GIVEN.get()])
