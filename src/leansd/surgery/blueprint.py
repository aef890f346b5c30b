"""A UNet's structure as data, changed by edits: which units there are and where each comes from.

Places keep the addresses of the net that is operated on until the last edit is done; `layout.py`
then numbers them anew and checks what fits together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any, NamedTuple

from leansd.errors import LeansdError
from leansd.plans.address import SEPARATOR, covers, get_layer, select
from leansd.plans.anatomy import HEAD, STEM, Anatomy, Unit
from leansd.surgery.edits import Drop, Replace, Surgery, Take
from leansd.surgery.lineage import Origin
from leansd.surgery.replacements import find_replacement


class Replaced(NamedTuple):
    """Something that stands in the place of a unit or a part."""

    at: str
    by: str
    options: Mapping[str, Any]
    is_new: bool = True
    """Whether this surgery put it there; otherwise it came with the unit."""


@dataclass(frozen=True)
class Source:
    """A net that a surgery may take from, as data."""

    anatomy: Anatomy
    config: Mapping[str, Any]
    """The config that diffusers builds its UNets from."""
    drop: tuple[str, ...] = ()
    """What is taken out of what the config builds, as addresses in that."""
    replaced: tuple[Replaced, ...] = ()


@dataclass(frozen=True)
class Piece:
    """One unit of a blueprint."""

    at: str
    """Its place, named as in the net that is operated on."""
    origin: Origin
    unit: Unit
    """The row of the anatomy that it comes from."""
    skip: int
    """How many of the channels that it takes come by a skip."""
    parts: tuple[str, ...]
    """Its parts' addresses in the origin that are kept, `dn0.l1.attn.t0.sa`."""
    replaced: tuple[Replaced, ...] = ()
    """What stands in its place, or in a part's; addresses are the origin's."""

    @property
    def blocks(self) -> tuple[int, ...]:
        """Numbers, in the origin, of the transformer blocks that are kept."""
        return tuple(dict.fromkeys(get_block_number(at) for at in self.parts))

    def place(self, at: str) -> str:
        """What an address of the origin is called in the net that is operated on."""
        return self.at + at.removeprefix(self.origin.at)


@dataclass(frozen=True)
class Blueprint:
    """The units of a UNet in running order; the first of `sources` is the net operated on."""

    pieces: tuple[Piece, ...]
    sources: Mapping[str, Source]

    @property
    def base(self) -> str:
        return next(iter(self.sources))

    @property
    def places(self) -> tuple[str, ...]:
        return tuple(piece.at for piece in self.pieces)

    def select(self, pattern: str) -> tuple[str, ...]:
        """The places that a pattern covers; those of parts, where it is too deep for units."""
        places = self.places
        if not any(covers(pattern, at) for at in places):
            parts = (piece.place(at) for piece in self.pieces for at in piece.parts)
            places = (*places, *parts)
        return select(pattern, places)

    @property
    def is_untouched(self) -> bool:
        """Whether it is the net operated on, unit for unit."""
        return self.pieces == list_pieces(self.base, self.sources[self.base])

    def set(self, pieces: Iterable[Piece]) -> Blueprint:
        """The blueprint with other pieces, brought into running order."""
        return replace(self, pieces=tuple(sorted(pieces, key=lambda piece: rank(piece.at))))


def draw_blueprint(sources: Mapping[str, Source], surgery: Surgery) -> Blueprint:
    """What the edits make of the first net.

    Raises:
        LeansdError: an edit cannot be done; the message names surgery, edit and address.
    """
    base = next(iter(sources))
    blueprint = Blueprint(list_pieces(base, sources[base]), sources)
    for number, edit in enumerate(surgery.edits, 1):
        with _naming(f"surgery {surgery.name}, edit {number} ({edit})"):
            blueprint = apply_edit(edit, blueprint)
    return blueprint


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Put what was being done before the message of an error."""
    try:
        yield
    except LeansdError as error:
        raise LeansdError(f"{what}: {error}") from None


@singledispatch
def apply_edit(edit: object, blueprint: Blueprint) -> Blueprint:
    """The blueprint after one edit."""
    raise TypeError(f"{type(edit).__name__} is no edit")


@apply_edit.register
def _(edit: Drop, blueprint: Blueprint) -> Blueprint:
    for pattern in edit.drop:
        gone = set(blueprint.select(pattern))
        for end in (STEM, HEAD):
            if end in gone:
                raise LeansdError(
                    f"{end} cannot be dropped, every UNet has one; take another net's if need be"
                )
        blueprint = blueprint.set(
            _thin(piece, gone) for piece in blueprint.pieces if piece.at not in gone
        )
        _check_layers(blueprint, gone)
    return blueprint


@apply_edit.register
def _(edit: Take, blueprint: Blueprint) -> Blueprint:
    source = blueprint.sources.get(edit.source)
    if source is None:
        raise LeansdError(
            f"no net {edit.source!r} is given: there are {', '.join(blueprint.sources)}; "
            f'operate on {{"{blueprint.base}": unet, "{edit.source}": other}}'
        )
    here = edit.places
    whole = list_pieces(edit.source, source)
    taken: dict[str, Piece] = {}
    for pattern in edit.take:
        for at in _select_in(edit.source, pattern, source.anatomy):
            taken[at] = next(piece for piece in whole if piece.at == at)
    for name, place in here.items():
        if not any(covers(name, at) for at in taken):
            raise LeansdError(f"{name} is said to be called {place}, but is not taken")
        if rank(name)[0] != rank(place)[0]:
            raise LeansdError(f"{name} cannot come to {place}: one is down, the other is not")
    there = {place: name for name, place in here.items()}
    kept = [
        piece
        for piece in blueprint.pieces
        if (at := _rename(piece.at, there, barred=here)) is None
        or not any(covers(pattern, at) for pattern in edit.take)
    ]
    added = [replace(piece, at=_rename(at, here) or at) for at, piece in taken.items()]
    doubled = {piece.at for piece in kept} & {piece.at for piece in added}
    if doubled or len({piece.at for piece in added}) < len(added):
        raise LeansdError("two units would come to the same place; check what `as` says")
    after = blueprint.set([*kept, *added])
    _check_layers(after, {*blueprint.places} - {*after.places})
    return after


@apply_edit.register
def _(edit: Replace, blueprint: Blueprint) -> Blueprint:
    replacement = find_replacement(edit.by)
    for pattern in edit.replace:
        chosen = set(blueprint.select(pattern))
        pieces: list[Piece] = []
        for piece in blueprint.pieces:
            rows = {at: piece.place(at) for at in (piece.origin.at, *piece.parts)}
            for at, place in rows.items():
                if place not in chosen:
                    continue
                anatomy = blueprint.sources[piece.origin.net].anatomy
                replacement.accepts(replace(anatomy.by_address[at], at=place), edit.options)
                if any(each.at == at for each in piece.replaced):
                    raise LeansdError(f"{place} is replaced already; replace it once")
                new = Replaced(at, edit.by, edit.options)
                piece = replace(piece, replaced=(*piece.replaced, new))
            pieces.append(piece)
        blueprint = blueprint.set(pieces)
    return blueprint


def get_block_number(at: str) -> int:
    """Which transformer block of its unit a part lies in: 3 of `dn0.l1.attn.t3.sa`."""
    return int(at.split(SEPARATOR)[3][1:])


_SIDES = {"stem": 0, "dn": 1, "mid": 2, "up": 3, "head": 4}
_NUMBERED = re.compile(r"(\D+)(\d*)")


def rank(at: str) -> tuple[Any, ...]:
    """Where an address comes in running order."""
    block, *rest = at.split(SEPARATOR)
    side, number = _split(block)
    if not rest:
        return (_SIDES[side], int(number or 0))
    layer, *unit = rest
    # A sampler comes after all layers; a ResNet before the attention of its layer.
    place = (1, 0) if not unit else (0, int(_split(layer)[1]))
    return (_SIDES[side], int(number or 0), place, unit == ["attn"])


def _split(name: str) -> tuple[str, str]:
    found = _NUMBERED.fullmatch(name)
    if found is None or (found[1] not in _SIDES and found[1] not in ("l", "down", "up")):
        raise LeansdError(f"{name!r} is no part of an address; there are dn0, mid, up0, l0, down")
    return found[1], found[2]


def list_pieces(name: str, source: Source) -> tuple[Piece, ...]:
    anatomy = source.anatomy
    parts: dict[str, list[str]] = {}
    for part in anatomy.parts:
        parts.setdefault(part.reads[0], []).append(part.at)
    return tuple(
        Piece(
            at=unit.at,
            origin=Origin(name, unit.at),
            unit=unit,
            skip=anatomy.by_address[unit.reads[1]].channels[1] if len(unit.reads) > 1 else 0,
            parts=tuple(parts.get(unit.at, ())),
            replaced=tuple(each for each in source.replaced if covers(unit.at, each.at)),
        )
        for unit in anatomy
    )


def _thin(piece: Piece, gone: set[str]) -> Piece:
    """A piece without the transformer blocks that are gone."""
    left = tuple(at for at in piece.parts if piece.place(at) not in gone)
    if left == piece.parts:
        return piece
    blocks = {get_block_number(at) for at in left}
    if not left:
        raise LeansdError(f"{piece.at} would have no transformer block left; drop {piece.at}")
    for at in piece.parts:
        if at not in left and get_block_number(at) in blocks:
            place = piece.place(at)
            block = place.rpartition(SEPARATOR)[0]
            raise LeansdError(f"{place} cannot be dropped alone; drop {block}, or replace {place}")
    replaced = tuple(
        each for each in piece.replaced if each.at == piece.origin.at or each.at in left
    )
    return replace(piece, parts=left, replaced=replaced)


def _check_layers(blueprint: Blueprint, gone: set[str]) -> None:
    """Refuse a layer that lost its ResNet and not itself."""
    places = set(blueprint.places)
    for at in blueprint.places:
        layer = get_layer(at)
        resnet = f"{layer}.res"
        if at.endswith(".attn") and resnet in gone and resnet not in places:
            raise LeansdError(
                f"{resnet} cannot be dropped without its attention; drop {layer}, the whole layer"
            )


def _select_in(net: str, pattern: str, anatomy: Anatomy) -> tuple[str, ...]:
    """The units of another net under a pattern."""
    with _naming(f"net {net}"):
        return select(pattern, anatomy.addresses)


def _rename(at: str, names: Mapping[str, str], *, barred: Iterable[str] = ()) -> str | None:
    """An address under its other name; None for one whose name means something else there."""
    for name, other in names.items():
        if covers(name, at):
            return other + at.removeprefix(name)
    return None if any(covers(name, at) for name in barred) else at
