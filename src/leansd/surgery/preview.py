"""What an operation would make, before it is done: counted, no weight touched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from leansd.anatomy.counting import dissect
from leansd.anatomy.inputs import TOKENS
from leansd.errors import LeansdError
from leansd.plans.address import SEPARATOR, get_layer
from leansd.plans.anatomy import Anatomy, Unit
from leansd.surgery.apply import NetOrNets, Operation, plan_operation
from leansd.surgery.blueprint import Piece
from leansd.surgery.edits import Surgery

LISTED = 12
"""Addresses that a line of a preview names before it only counts."""


@runtime_checkable
class Measured(Protocol):
    """Has the seconds of units by address, as a cost model does."""

    @property
    def units(self) -> Mapping[str, Mapping[Any, float]]: ...


@dataclass(frozen=True)
class Preview:
    """What goes, and what is left."""

    surgery: Surgery
    before: Anatomy
    after: Anatomy
    gone: tuple[str, ...]
    """What the net operated on loses, by its own addresses, the shortest that say it."""
    moved: Mapping[str, str]
    """New addresses of layers and samplers that have another now."""
    taken: Mapping[str, str]
    """Layers and samplers of the new net that come from another net: its name and address."""
    replaced: Mapping[str, str]
    """What stands in the place of units and parts of the new net."""
    skips: tuple[tuple[str, str], ...]
    """Every layer on the way up, and whose output it reads by a skip: each is read once."""
    kind: str
    """Class of the new net."""
    config: Mapping[str, Any]
    """Entries of the new config that differ from the old."""
    seconds: tuple[float, float] | None = None
    """What the units took, and what those that are left are to take; where a cost was given."""

    def __str__(self) -> str:
        params = (self.before.params / 1e6, self.after.params / 1e6)
        macs = (self.before.macs / 1e9, self.after.macs / 1e9)
        height, width = self.after.size or (0, 0)
        uncounted = self.before.uncounted or self.after.uncounted
        lines = [
            f"{self.surgery.name} on {self.before.name}: {len(self.before) - 2} units become "
            f"{len(self.after) - 2}, a {self.kind}",
            f"parameters  {_compare(*params, 'M')}",
            f"MACs        {uncounted}"
            if uncounted
            else f"MACs        {_compare(*macs, 'G')} at {height}x{width} latents, "
            f"{self.after.tokens} tokens",
        ]
        if self.seconds is not None:
            before, after = (1e3 * each for each in self.seconds)
            lines.append(f"time        {_compare(before, after, 'ms')}, that of the units")
        config = [f"{name} {_show(value)}" for name, value in self.config.items()]
        rows = {**self.list_changes(), **({"config": config} if config else {})}
        lines += [f"{name:<11} {_list(what)}" for name, what in rows.items()]
        pairs = [f"{up} reads {skip}" for up, skip in self.skips]
        lines.append(f"{'skips':<11} {len(pairs)}, balanced: {_list(pairs)}")
        return "\n".join(lines)

    def list_changes(self) -> dict[str, list[str]]:
        """All that goes, comes from elsewhere, is replaced or renamed; nothing else is listed."""
        changes = {
            "dropped": list(self.gone),
            "taken": [f"{at} ({origin})" for at, origin in self.taken.items()],
            "replaced": [f"{at} ({by})" for at, by in self.replaced.items()],
            "renamed": [f"{old} to {new}" for old, new in self.moved.items()],
        }
        return {name: each for name, each in changes.items() if each}


def preview(
    nets: NetOrNets,
    surgery: Surgery | str | Path,
    *,
    cost: Measured | Mapping[str, float] | None = None,
    latent: int | tuple[int, int] | None = None,
    tokens: int = TOKENS,
) -> Preview:
    """What `operate` would make of the same arguments.

    Args:
        cost: a cost model of the net operated on (`leansd.profile`), or seconds by the address of
            its units; units that become smaller, or come from another net, take their share by
            multiply-accumulates.
        latent: height (and width) in latent pixels; by default the UNet's own sample size.
        tokens: length of the text condition.

    Raises:
        LeansdError: what `operate` would raise, or the cost lacks a unit.
    """
    plan = plan_operation(nets, surgery)
    counted = {
        name: dissect(net.unet, latent=latent, tokens=tokens, name=name)
        for name, net in plan.nets.items()
        if name in plan.lineage.nets or name == plan.lineage.base
    }
    before = counted[plan.lineage.base]
    after = dissect(plan.outline, latent=before.size, tokens=tokens, name=plan.surgery.name)
    rows = plan.blueprint.pieces
    own = [row for row in rows if row.origin.net == plan.lineage.base]
    base = plan.nets[plan.lineage.base].unet
    return Preview(
        surgery=plan.surgery,
        before=before,
        after=after,
        gone=_shorten(_list_gone(plan, own), before),
        moved=_join({row.place: row.at for row in own if row.place != row.at}),
        taken=_join({row.at: str(row.origin) for row in rows if row not in own}),
        replaced={each.at: each.by for each in plan.build.replaced},
        skips=plan.blueprint.skips,
        kind=type(plan.outline).__name__,
        config={
            name: value
            for name, value in plan.build.config.items()
            if value != base.config.get(name)
        },
        seconds=None if cost is None else _predict(rows, before, after, cost),
    )


def _list_gone(plan: Operation, own: list[Piece]) -> set[str]:
    """Units, and transformer blocks of those that stay."""
    anatomy = plan.blueprint.sources[plan.lineage.base].anatomy
    kept = {row.origin.at: row for row in own}
    gone = {at for at in anatomy.addresses if at not in kept}
    for part in anatomy.parts:
        row = kept.get(part.reads[0])
        if row is not None and part.at not in row.parts:
            gone.add(part.at.rpartition(SEPARATOR)[0])
    return gone


def _shorten(gone: set[str], anatomy: Anatomy) -> tuple[str, ...]:
    """Blocks and layers in the place of all that lies under them."""
    short: dict[str, None] = {}
    for at in (*anatomy.addresses, *sorted(gone - set(anatomy.addresses))):
        if at not in gone:
            continue
        parts = at.split(SEPARATOR)
        for depth in range(1, len(parts) + 1):
            whole = SEPARATOR.join(parts[:depth])
            under = [each for each in anatomy.addresses if f"{each}.".startswith(f"{whole}.")]
            if at == whole or (gone.issuperset(under) and under):
                short[whole] = None
                break
    return tuple(short)


def _join(names: Mapping[str, str]) -> dict[str, str]:
    """Layers in the place of their units."""
    return {
        get_layer(one): SEPARATOR.join(other.split(SEPARATOR)[:2]) for one, other in names.items()
    }


def _predict(
    rows: Iterable[Piece], before: Anatomy, after: Anatomy, cost: Measured | Mapping[str, float]
) -> tuple[float, float]:
    if isinstance(cost, Measured):
        cost = {at: times["whole"] for at, times in cost.units.items()}
    missing = [unit.at for unit in before if unit.at not in cost]
    if missing:
        raise LeansdError(f"the cost has no time of {missing[0]}; profile the net operated on")
    left = 0.0
    for row in rows:
        unit = _find_like(row, before)
        share = after.by_address[row.at].macs / unit.macs if unit.macs else 1.0
        left += cost[unit.at] * share
    return sum(cost[unit.at] for unit in before), left


def _find_like(row: Piece, before: Anatomy) -> Unit:
    """The unit of the net operated on whose time tells that of a row."""
    place = row.place
    if place in before.by_address:
        return before.by_address[place]
    alike = [unit for unit in before if unit.kind == row.unit.kind]
    return min(alike, key=lambda unit: abs(unit.scale - row.unit.scale))


def _compare(before: float, after: float, unit: str) -> str:
    change = 100 * (after / before - 1) if before else 0.0
    digits = 2 if before >= 10 else 4
    return f"{before:.{digits}f} {unit} -> {after:.{digits}f} {unit} ({change:+.1f} %)"


def _list(items: list[str]) -> str:
    more = f", and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return ", ".join(items[:LISTED]) + more


def _show(value: Any) -> str:
    return "null" if value is None else str(list(value) if isinstance(value, tuple) else value)
