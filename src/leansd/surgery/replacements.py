"""Replacements by the name that a `replace` edit gives; each is imported when first asked for."""

from __future__ import annotations

from importlib import import_module

from leansd.errors import LeansdError
from leansd.surgery.edits import read_name
from leansd.surgery.parts import Replacement
from leansd.text import suggest_name

HOMES: dict[str, str] = {
    "condconv": "leansd.surgery.parts.condconv",
    "gri": "leansd.surgery.parts.gri",
    "narrow-ff": "leansd.surgery.parts.narrow_ff",
    "skip": "leansd.surgery.parts.skip",
}
"""Modules by the name of their replacement."""


def find_replacement(by: str) -> Replacement:
    """The replacement of a name.

    Raises:
        LeansdError: there is none.
    """
    by = read_name(by)
    if by not in HOMES:
        raise LeansdError(f"no replacement is called {by!r}{suggest_name(by, HOMES)}")
    return import_module(HOMES[by]).REPLACEMENT
