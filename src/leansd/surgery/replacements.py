"""What can be put in the place of a unit or a part, by the name that a `replace` edit gives.

A new one is a module that holds a `REPLACEMENT`, and a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeAlias

from leansd.errors import LeansdError
from leansd.plans.anatomy import Unit
from leansd.surgery.lineage import Origin

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from leansd.surgery.blueprint import Source

Options: TypeAlias = Mapping[str, Any]


def _inherit_nothing(
    student: UNet2DConditionModel,
    at: str,
    nets: Mapping[str, UNet2DConditionModel],
    origin: Origin,
    options: Options,
) -> None:
    """What has no weights of its own, or takes those that it finds, inherits nothing more."""


def _keep_options(origin: Origin, options: Options, sources: Mapping[str, Source]) -> Options:
    """What has the same options at every place keeps them as they are given."""
    return options


def _reach_itself(path: str) -> tuple[str, ...]:
    """What stands in a place changes nothing beside it."""
    return (path,)


@dataclass(frozen=True)
class Replacement:
    """How one kind of module comes into a UNet in the place of another."""

    accepts: Callable[[Unit, Options], None]
    """Raises a `LeansdError` where it cannot stand in the place of a unit or part, or not with
    these options."""
    build: Callable[[UNet2DConditionModel, str, Options], None]
    """Puts it at an address of a UNet, in the place of what is there. It follows from structure
    and options alone, so that a saved net is built again, and works on the meta device."""
    inherit: Callable[
        [
            UNet2DConditionModel,
            str,
            Mapping[str, UNet2DConditionModel],
            Origin,
            Options,
        ],
        None,
    ] = _inherit_nothing
    """Fills what `build` could not take over: student, address in it, the nets by name, where in
    them the place comes from, options."""
    settle: Callable[[Origin, Options, Mapping[str, Source]], Options] = _keep_options
    """All options of one place: where it comes from, the options that an edit gives, and the nets
    as data by name. What it makes is plain JSON, and what `build` and `inherit` are given."""
    reaches: Callable[[str], tuple[str, ...]] = _reach_itself
    """The paths of the modules that it changes, by the path of its place."""


HOMES: dict[str, str] = {
    "condconv": "leansd.surgery.clme",
    "gri": "leansd.surgery.gri",
    "narrow-ff": "leansd.surgery.narrowing",
    "nothing": "leansd.surgery.nothing",
}
"""Modules by the name of their replacement; imported when it is first asked for."""


def find_replacement(by: str) -> Replacement:
    """The replacement of a name.

    Raises:
        LeansdError: there is none.
    """
    if by not in HOMES:
        near = get_close_matches(by, HOMES, n=1)
        offer = f"did you mean {near[0]}?" if near else f"there are {', '.join(HOMES)}"
        raise LeansdError(f"nothing is called {by!r} that could replace a unit; {offer}")
    return import_module(HOMES[by]).REPLACEMENT
