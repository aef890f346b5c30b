"""A UNet's structure as data, changed by edits and numbered anew: what there is, and whence.

Pieces keep the addresses of the net that is operated on until the last edit is done; `lay_out` then
gives every unit its address in the finished net and checks that skips, channels and blocks fit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from diffusers import UNet2DConditionModel

from leansd.anatomy.reading import read_anatomy
from leansd.errors import LeansdError
from leansd.plans.address import SEPARATOR, covers, get_block, get_layer, select
from leansd.plans.anatomy import HEAD, STEM, Anatomy, Unit
from leansd.surgery.edits import Drop, Replace, Surgery, Take, read_name
from leansd.surgery.light_unet import read_config
from leansd.surgery.lineage import Lineage, Origin
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

    @classmethod
    def read(cls, name: str, net: UNet2DConditionModel) -> Source:
        """A net as data, without its adapters."""
        config = read_config(net)
        if config.get("encoder_hid_dim_type") == "ip_image_proj":
            has_text = getattr(net, "text_encoder_hid_proj", None) is not None
            config["encoder_hid_dim_type"] = "text_proj" if has_text else None
        structure = config.pop("structure", None) or {}
        replaced = tuple(
            Replaced(each["at"], read_name(each["by"]), each["options"], is_new=False)
            for each in structure.get("replace", ())
        )
        drop = tuple(structure.get("drop", ()))
        return cls(read_anatomy(net, name=name), config, drop, replaced)


@dataclass(frozen=True)
class Piece:
    """One unit of a blueprint."""

    place: str
    """The address in the net that is operated on."""
    origin: Origin
    unit: Unit
    """The unit's row: that of the origin first, and once laid out that of the finished net."""
    skip: int
    """How many of the channels that it takes come by a skip."""
    parts: tuple[str, ...]
    """Addresses of the parts that are kept, in the origin, `dn0.l1.attn.t0.sa`."""
    replaced: tuple[Replaced, ...] = ()
    """What stands in its place, or in a part's; addresses are the origin's."""

    @property
    def at(self) -> str:
        """The address in the finished net, once it is laid out."""
        return self.unit.at

    @property
    def blocks(self) -> tuple[int, ...]:
        """Numbers, in the origin, of the transformer blocks that are kept."""
        return tuple(dict.fromkeys(get_block_number(at) for at in self.parts))

    @property
    def is_changed(self) -> bool:
        """Whether something was put into it."""
        return any(each.is_new for each in self.replaced)

    def find_place(self, at: str) -> str:
        """What an address of the origin is called in the net that is operated on."""
        return self.place + at.removeprefix(self.origin.at)

    def list_replaced(self) -> Iterator[Replaced]:
        """What stands in its place or in parts', with addresses of the finished net."""
        blocks = {number: place for place, number in enumerate(self.blocks)}
        for each in self.replaced:
            inside = each.at.removeprefix(self.origin.at)
            if inside:
                _, block, *part = inside.split(SEPARATOR)
                inside = SEPARATOR.join(["", f"t{blocks[int(block[1:])]}", *part])
            yield each._replace(at=self.at + inside)


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
        return tuple(piece.place for piece in self.pieces)

    @property
    def is_untouched(self) -> bool:
        """Whether it is the net operated on, unit for unit."""
        own = list_pieces(self.base, self.sources[self.base])
        here, there = (
            [(each.place, each.origin, each.parts, each.replaced) for each in pieces]
            for pieces in (self.pieces, own)
        )
        return here == there

    @property
    def skips(self) -> tuple[tuple[str, str], ...]:
        """Every up layer, and the unit whose output it reads by a skip."""
        units = (piece.unit for piece in self.pieces)
        return tuple((unit.at, unit.reads[1]) for unit in units if len(unit.reads) > 1)

    def select(self, pattern: str) -> tuple[str, ...]:
        """The places that a pattern covers; those of parts, where it is too deep for units."""
        places = self.places
        if not any(covers(pattern, at) for at in places):
            parts = (piece.find_place(at) for piece in self.pieces for at in piece.parts)
            places = (*places, *parts)
        return select(pattern, places)

    def set(self, pieces: Iterable[Piece]) -> Blueprint:
        """The blueprint with other pieces, brought into running order."""
        return replace(self, pieces=tuple(sorted(pieces, key=lambda piece: rank(piece.place))))

    def list_block(self, block: str) -> tuple[Piece, ...]:
        """The pieces of a block of the finished net."""
        return tuple(piece for piece in self.pieces if get_block(piece.at) == block)


def list_pieces(name: str, source: Source) -> tuple[Piece, ...]:
    """All units of a net."""
    anatomy = source.anatomy
    return tuple(
        Piece(
            place=unit.at,
            origin=Origin(name, unit.at),
            unit=unit,
            skip=sum(anatomy.by_address[at].channels[1] for at in unit.reads[1:]),
            parts=tuple(part.at for part in anatomy.parts if part.reads[0] == unit.at),
            replaced=tuple(each for each in source.replaced if covers(unit.at, each.at)),
        )
        for unit in anatomy
    )


def lay_out_surgery(sources: Mapping[str, Source], surgery: Surgery) -> Blueprint:
    """What the edits make of the first net, numbered anew and checked.

    Raises:
        LeansdError: an edit cannot be done, or what is left does not fit together; the message
            names surgery, edit and address.
    """
    base = next(iter(sources))
    blueprint = Blueprint(list_pieces(base, sources[base]), sources)
    for number, edit in enumerate(surgery.edits, 1):
        with _naming(f"surgery {surgery.name}, edit {number} ({edit})"):
            blueprint = apply_edit(edit, blueprint)
    with _naming(f"surgery {surgery.name}"):
        return lay_out(blueprint)


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Put what was being done before the message of an error."""
    try:
        yield
    except LeansdError as error:
        raise LeansdError(f"{what}: {error}") from None


def apply_edit(edit: Drop | Take | Replace, blueprint: Blueprint) -> Blueprint:
    """The blueprint after one edit."""
    match edit:
        case Drop():
            return _drop(edit, blueprint)
        case Take():
            return _take(edit, blueprint)
        case Replace():
            return _replace(edit, blueprint)


def _drop(edit: Drop, blueprint: Blueprint) -> Blueprint:
    for pattern in edit.drop:
        gone = set(blueprint.select(pattern))
        for end in (STEM, HEAD):
            if end in gone:
                raise LeansdError(
                    f"{end} cannot be dropped, every UNet has one; take another net's if need be"
                )
        blueprint = blueprint.set(
            _thin(piece, gone) for piece in blueprint.pieces if piece.place not in gone
        )
        _check_layers(blueprint, gone)
    return blueprint


def _take(edit: Take, blueprint: Blueprint) -> Blueprint:
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
        with _naming(f"net {edit.source}"):
            found = select(pattern, source.anatomy.addresses)
        taken |= {piece.place: piece for piece in whole if piece.place in found}
    for name, place in here.items():
        if not any(covers(name, at) for at in taken):
            raise LeansdError(f"{name} is said to be called {place}, but is not taken")
        if rank(name)[0] != rank(place)[0]:
            raise LeansdError(f"{name} cannot come to {place}: one is down, the other is not")
    there = {place: name for name, place in here.items()}
    kept = [
        piece
        for piece in blueprint.pieces
        if (at := _rename(piece.place, there, barred=here)) is None
        or not any(covers(pattern, at) for pattern in edit.take)
    ]
    added = [replace(piece, place=_rename(at, here) or at) for at, piece in taken.items()]
    doubled = {piece.place for piece in kept} & {piece.place for piece in added}
    if doubled or len({piece.place for piece in added}) < len(added):
        raise LeansdError("two units would come to the same place; check what `as` says")
    after = blueprint.set([*kept, *added])
    _check_layers(after, {*blueprint.places} - {*after.places})
    return after


def _replace(edit: Replace, blueprint: Blueprint) -> Blueprint:
    replacement = find_replacement(edit.by)
    anatomies = {name: source.anatomy for name, source in blueprint.sources.items()}
    for pattern in edit.replace:
        chosen = set(blueprint.select(pattern))
        pieces: list[Piece] = []
        for piece in blueprint.pieces:
            for at in (piece.origin.at, *piece.parts):
                place = piece.find_place(at)
                if place not in chosen:
                    continue
                origin = Origin(piece.origin.net, at)
                unit = anatomies[origin.net].by_address[at]
                replacement.validate(replace(unit, at=place), edit.options)
                if any(each.at == at for each in piece.replaced):
                    raise LeansdError(f"{place} is replaced already; replace it once")
                options = replacement.resolve_options(origin, edit.options, anatomies)
                new = Replaced(at, edit.by, options)
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


def _thin(piece: Piece, gone: set[str]) -> Piece:
    """A piece without the transformer blocks that are gone."""
    left = tuple(at for at in piece.parts if piece.find_place(at) not in gone)
    if left == piece.parts:
        return piece
    blocks = {get_block_number(at) for at in left}
    if not left:
        raise LeansdError(f"{piece.place} would have no transformer block left; drop {piece.place}")
    for at in piece.parts:
        if at not in left and get_block_number(at) in blocks:
            place = piece.find_place(at)
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


def _rename(at: str, names: Mapping[str, str], *, barred: Iterable[str] = ()) -> str | None:
    """An address under its other name; None for one whose name means something else there."""
    for name, other in names.items():
        if covers(name, at):
            return other + at.removeprefix(name)
    return None if any(covers(name, at) for name in barred) else at


def lay_out(blueprint: Blueprint) -> Blueprint:
    """Number the pieces anew and let the hidden state run through them.

    Raises:
        LeansdError: skips are unbalanced, channels do not fit, or a block is of no use; the
            message names places as the net that is operated on does.
    """
    names = _number(blueprint.pieces)
    scales = _find_scales(blueprint.pieces)
    _check_blocks(blueprint.pieces)
    _check_balance(blueprint.pieces, scales)
    pushing = _list_pushing(blueprint.pieces)
    done: list[Piece] = []
    skips: list[Piece] = []
    for piece in blueprint.pieces:
        reads: tuple[Piece, ...] = tuple(done[-1:])
        if piece.skip:
            reads = (*reads, skips.pop())
        _check_channels(piece, reads)
        unit = replace(
            piece.unit,
            at=names[piece.place],
            scale=scales[piece.place],
            reads=tuple(read.at for read in reads),
        )
        done.append(replace(piece, unit=unit))
        if piece.place in pushing:
            skips.append(done[-1])
    return replace(blueprint, pieces=tuple(done))


def make_lineage(blueprint: Blueprint, surgery: str, fingerprint: str) -> Lineage:
    """Where the units of a finished net come from."""
    origins: dict[str, Origin] = {}
    changed: list[str] = []
    for piece in blueprint.pieces:
        origin = piece.origin
        origins[piece.at] = origin
        for place, number in enumerate(piece.blocks):
            origins[f"{piece.at}.t{place}"] = Origin(origin.net, f"{origin.at}.t{number}")
        parts = blueprint.sources[origin.net].anatomy.parts
        before = {get_block_number(part.at) for part in parts if part.reads[0] == origin.at}
        if piece.is_changed or before != {*piece.blocks}:
            changed.append(piece.at)
    nets = {
        name: source.anatomy.addresses
        for name, source in blueprint.sources.items()
        if any(origin.net == name for origin in origins.values())
    }
    return Lineage(
        surgery=surgery,
        fingerprint=fingerprint,
        base=blueprint.base,
        origins=origins,
        changed=tuple(changed),
        nets=nets,
    )


def _number(pieces: Iterable[Piece]) -> dict[str, str]:
    """New addresses: blocks of a side, and layers of a block, counted without gaps."""
    blocks: dict[str, str] = {}
    layers: dict[str, str] = {}
    names: dict[str, str] = {}
    for piece in pieces:
        block, layer = get_block(piece.place), get_layer(piece.place)
        side = block.rstrip("0123456789")
        if block not in blocks:
            count = sum(name.startswith(side) for name in blocks)
            blocks[block] = block if side == block else f"{side}{count}"
        if layer not in layers:
            count = sum(get_block(name) == block for name in layers)
            layers[layer] = f"{blocks[block]}{SEPARATOR}l{count}"
        inside = piece.place.removeprefix(layer)
        if piece.place == layer:  # an end, or a sampler
            names[piece.place] = blocks[block] + piece.place.removeprefix(block)
        else:
            names[piece.place] = layers[layer] + inside
    return names


def _find_scales(pieces: Iterable[Piece]) -> dict[str, int]:
    scale, scales = 1, dict[str, int]()
    for piece in pieces:
        if piece.unit.kind == "downsampler":
            scale *= 2
        if piece.unit.kind == "upsampler":
            if scale == 1:
                raise LeansdError(
                    f"unbalanced samplers: {piece.place} would make more than the latents' size; "
                    "drop it, too"
                )
            scale //= 2
        scales[piece.place] = scale
    if scale != 1:
        raise LeansdError(
            f"unbalanced samplers: the output would have 1/{scale} of the latents' sides; drop as "
            "many samplers on the way down as on the way up"
        )
    return scales


def _check_blocks(pieces: tuple[Piece, ...]) -> None:
    kinds: dict[str, list[str]] = {}
    for piece in pieces:
        kinds.setdefault(get_block(piece.place), []).append(piece.unit.kind)
    for block, found in kinds.items():
        if block not in (STEM, HEAD) and "resnet" not in found:
            sampler = next(piece.place for piece in pieces if get_block(piece.place) == block)
            raise LeansdError(f"{block} has only {sampler} left; drop {block}, or keep a layer")
        if block == "mid" and found[-1] != "resnet":
            last = [piece.place for piece in pieces if get_block(piece.place) == "mid"][-1]
            raise LeansdError(f"{last} has no ResNet after it; drop it, too")
    down, up = (sorted(block for block in kinds if block.startswith(s)) for s in ("dn", "up"))
    if len(down) != len(up):
        raise LeansdError(
            f"{len(down)} blocks are left on the way down ({' '.join(down)}) and {len(up)} on the "
            f"way up ({' '.join(up)}); drop as many on both"
        )
    if not down:
        raise LeansdError("no block is left; keep one on the way down and one on the way up")


def _list_pushing(pieces: tuple[Piece, ...]) -> set[str]:
    """The places whose outputs are handed over as skips: stem, samplers down, ends of layers."""
    ends = {
        get_layer(piece.place): piece.place
        for piece in pieces
        if piece.place == STEM or piece.place.startswith("dn")
    }
    return set(ends.values())


def _check_balance(pieces: tuple[Piece, ...], scales: dict[str, int]) -> None:
    pushing = _list_pushing(pieces)
    for scale in sorted(set(scales.values())):
        here = [piece for piece in pieces if scales[piece.place] == scale]
        given = [piece.place for piece in here if piece.place in pushing]
        read = [piece.place for piece in here if piece.skip]
        if len(given) != len(read):
            side = "up" if len(given) < len(read) else "down"
            raise LeansdError(
                f"unbalanced skips at 1/{scale} of the latents' sides: {len(given)} outputs are "
                f"handed over ({' '.join(given)}) and {len(read)} read ({' '.join(read)}); "
                f"drop {abs(len(given) - len(read))} more on the way {side}"
            )


def _check_channels(piece: Piece, reads: tuple[Piece, ...]) -> None:
    if not reads:
        return
    takes = piece.unit.channels[0] - piece.skip
    gets = reads[0].unit.channels[1]
    if takes != gets:
        before = reads[0]
        remedy = "keep the layer between them that changes their number"
        if before.origin.net != piece.origin.net:
            remedy = f"take {get_block(before.place)} of net {piece.origin.net}, too"
        raise LeansdError(
            f"{piece.place} takes {takes} channels and would get {gets} from {before.place}; "
            f"{remedy}"
        )
    if piece.skip and piece.skip != reads[1].unit.channels[1]:
        raise LeansdError(
            f"{piece.place} takes {piece.skip} channels by its skip and would get "
            f"{reads[1].unit.channels[1]} from {reads[1].place}; drop another layer of "
            f"{get_block(piece.place)}"
        )
