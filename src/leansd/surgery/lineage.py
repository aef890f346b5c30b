"""Where everything in an operated net comes from: weights and distillation pairs follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from leansd.errors import LeansdError
from leansd.files import write_file
from leansd.plans.address import get_block, get_layer
from leansd.plans.anatomy import HEAD, STEM

FILE = "lineage.json"


class Origin(NamedTuple):
    """A place in one of the nets that were given to `operate`."""

    net: str
    at: str

    def __str__(self) -> str:
        return f"{self.net}:{self.at}"


class Pair(NamedTuple):
    """An output of the student and the output of a teacher that it stands for."""

    student: str
    teacher: Origin


class Lineage(BaseModel):
    """For every unit and transformer block of an operated net, where it comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    surgery: str
    fingerprint: str
    """The surgery's."""
    base: str
    """The net operated on: what lies in no unit (time embedding, last norm) is its."""
    origins: dict[str, Origin]
    """By address in the operated net: units in running order, `dn2.l0.attn`, and the blocks of
    their transformers, `dn2.l0.attn.t0`."""
    changed: tuple[str, ...] = ()
    """Units that are not what they were: replaced, in part too, or with transformer blocks gone."""
    nets: dict[str, tuple[str, ...]]
    """The units of every net, in running order."""

    @property
    def units(self) -> tuple[str, ...]:
        """The units of the operated net, in running order."""
        return tuple(at for at in self.origins if at.count(".") <= 2)  # deeper are their blocks

    def pairs(self) -> tuple[Pair, ...]:
        """What to distil: for each block the output that ends it, and what it stands for.

        Layers and attentions that were dropped right after it are its to make good: in BK-SDM-Tiny,
        which lost `dn2.l1`, `dn2.l0.attn` stands for the teacher's `dn2.l1.attn`.
        """
        ends = {get_block(at): at for at in self.units if at not in (STEM, HEAD)}
        return tuple(Pair(at, self._absorb(self.origins[at])) for at in ends.values())

    def stands_for(self, at: str) -> Origin:
        """What a unit's output is to be like: what it comes from, or what was dropped after that.

        Raises:
            LeansdError: there is no such unit.
        """
        if at not in self.origins:
            raise LeansdError(f"{at} is no unit of the net that surgery {self.surgery} makes")
        return self._absorb(self.origins[at])

    def frozen(self, net: str) -> tuple[str, ...]:
        """The units that came from `net` unchanged: what the second stage of A-SDM freezes.

        Raises:
            LeansdError: no net of that name took part.
        """
        if net not in self.nets:
            raise LeansdError(f"no net {net!r} took part: there are {', '.join(self.nets)}")
        return tuple(
            at for at in self.units if self.origins[at].net == net and at not in self.changed
        )

    def trace(self, earlier: Mapping[str, Lineage]) -> Lineage:
        """The lineage through nets that were operated on themselves, back to what they came from.

        Args:
            earlier: the lineage of nets that took part, by name.
        """
        origins: dict[str, Origin] = {}
        changed = dict.fromkeys(self.changed)
        for at, origin in self.origins.items():
            if origin.net in earlier:
                before = earlier[origin.net]
                if origin.at in before.changed:
                    changed[at] = None
                origin = before.origins[origin.at]
            origins[at] = origin
        nets = {name: units for name, units in self.nets.items() if name not in earlier}
        for lineage in earlier.values():
            nets = lineage.nets | nets
        base = earlier[self.base].base if self.base in earlier else self.base
        return self.model_copy(
            update={"origins": origins, "changed": tuple(changed), "nets": nets, "base": base}
        )

    def save(self, path: str | Path) -> None:
        """Write it as a JSON file, or as `lineage.json` into a folder."""
        write_file(_find_file(path), self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Lineage:
        """Read a file, or the `lineage.json` of a folder.

        Raises:
            LeansdError: it is missing or no lineage.
        """
        path = _find_file(path)
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise LeansdError(f"cannot read the lineage {path}: {error.strerror}") from error
        except (ValidationError, UnicodeDecodeError) as error:
            raise LeansdError(f"{path} is not a lineage file") from error

    def _absorb(self, origin: Origin) -> Origin:
        """The last of the units right after `origin`, of its block, that came nowhere."""
        units = self.nets[origin.net]
        kept = {each.at for each in self.origins.values() if each.net == origin.net}
        last = origin.at
        for at in units[units.index(origin.at) + 1 :]:
            is_sampler = at == get_layer(at)
            if get_block(at) != get_block(last) or is_sampler or at in kept:
                break
            last = at
        return Origin(origin.net, last)


def _find_file(path: str | Path) -> Path:
    path = Path(path)
    return path / FILE if path.is_dir() else path
