"""What can be put in the place of a unit or a part, a module each that holds a `REPLACEMENT`.

A new one is a module here, and a line in `surgery/replacements.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from diffusers import UNet2DConditionModel

from leansd.anatomy.reading import find_unet, read_anatomy
from leansd.plans.anatomy import Anatomy, Unit
from leansd.surgery.lineage import Origin

Options: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class AddressedUNet:
    """A UNet and its anatomy, read once: its modules by address."""

    unet: UNet2DConditionModel
    anatomy: Anatomy

    @classmethod
    def read(cls, unet: UNet2DConditionModel) -> AddressedUNet:
        """The UNet in `unet`, which may be compiled."""
        found = find_unet(unet)
        return cls(found, read_anatomy(found))

    def find(self, at: str) -> Any:
        """The module at an address."""
        return self.unet.get_submodule(self.anatomy[at].path)


Nets: TypeAlias = Mapping[str, AddressedUNet]


@dataclass(frozen=True)
class Replacement:
    """How one kind of module comes into a UNet in the place of another."""

    validate: Callable[[Unit, Options], None]
    """Raises a `LeansdError` where it cannot stand in the place of a unit or part, or not with
    these options."""
    build: Callable[[AddressedUNet, str, Options], None]
    """Puts it at an address of a UNet, in the place of what is there. It follows from structure
    and options alone, so that a saved net is built again, and works on the meta device."""
    inherit: Callable[[AddressedUNet, str, Nets, Origin, Options], None] = (
        lambda student, at, nets, origin, options: None
    )
    """Fills what `build` could not take over: student, address in it, the nets by name, where in
    them the place comes from, options."""
    resolve_options: Callable[[Origin, Options, Mapping[str, Anatomy]], Options] = (
        lambda origin, options, anatomies: options
    )
    """All options of one place: where it comes from, the options that an edit gives, and the nets'
    anatomies by name. What it makes is plain JSON, and what `build` and `inherit` are given."""
    reaches: Callable[[str], tuple[str, ...]] = lambda path: (path,)
    """The paths of the modules that it changes, by the path of its place."""
