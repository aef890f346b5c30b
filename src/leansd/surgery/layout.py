"""A blueprint numbered anew and checked: which unit reads what, and whether it fits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NoReturn

from leansd.errors import LeansdError
from leansd.plans.address import SEPARATOR, get_block, get_layer
from leansd.plans.anatomy import HEAD, STEM, Unit
from leansd.surgery.blueprint import Blueprint, Piece, Replaced, get_block_number
from leansd.surgery.lineage import Lineage, Origin


@dataclass(frozen=True)
class Row:
    """A unit of the finished net."""

    at: str
    """Its address there."""
    piece: Piece
    unit: Unit
    """As `read_anatomy` must find it, but for its path and parameters."""

    @property
    def replaced(self) -> Iterator[Replaced]:
        """What stands in its place or in parts', with addresses of the finished net."""
        blocks = {number: place for place, number in enumerate(self.piece.blocks)}
        for each in self.piece.replaced:
            inside = each.at.removeprefix(self.piece.origin.at)
            if inside:
                _, block, *part = inside.split(SEPARATOR)
                inside = SEPARATOR.join(["", f"t{blocks[int(block[1:])]}", *part])
            yield each._replace(at=self.at + inside)

    @property
    def is_changed(self) -> bool:
        """Whether it is not what it was in the net it comes from, as far as structure goes."""
        return any(each.is_new for each in self.piece.replaced)


@dataclass(frozen=True)
class Layout:
    """The finished net as data."""

    rows: tuple[Row, ...]
    blueprint: Blueprint

    @property
    def skips(self) -> tuple[tuple[str, str], ...]:
        """Every up layer, and the unit whose output it reads by a skip."""
        return tuple((row.at, row.unit.reads[1]) for row in self.rows if len(row.unit.reads) > 1)

    def list_block(self, block: str) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if get_block(row.at) == block)

    def count_blocks(self, side: str) -> int:
        """How many blocks there are down (`dn`) or up (`up`)."""
        return len({get_block(row.at) for row in self.rows if row.at.startswith(side)})


def lay_out(blueprint: Blueprint) -> Layout:
    """Number the places anew and let the hidden state run through them.

    Raises:
        LeansdError: skips are unbalanced, channels do not fit, or a block is of no use; the
            message names places as the net that is operated on does.
    """
    names = _number(blueprint.pieces)
    scales = _find_scales(blueprint.pieces)
    _check_blocks(blueprint.pieces)
    _check_balance(blueprint.pieces, scales)
    pushing = _list_pushing(blueprint.pieces)
    rows: list[Row] = []
    skips: list[Row] = []
    for piece in blueprint.pieces:
        reads: tuple[Row, ...] = tuple(rows[-1:])
        if piece.skip:
            reads = (*reads, skips.pop())
        _check_channels(piece, reads)
        at = names[piece.at]
        unit = replace(
            piece.unit, at=at, scale=scales[piece.at], reads=tuple(read.at for read in reads)
        )
        rows.append(Row(at, piece, unit))
        if piece.at in pushing:
            skips.append(rows[-1])
    return Layout(tuple(rows), blueprint)


def make_lineage(layout: Layout, surgery: str, fingerprint: str) -> Lineage:
    """Where the rows of a layout come from."""
    origins: dict[str, Origin] = {}
    changed: list[str] = []
    for row in layout.rows:
        origin = row.piece.origin
        origins[row.at] = origin
        for place, number in enumerate(row.piece.blocks):
            origins[f"{row.at}.t{place}"] = Origin(origin.net, f"{origin.at}.t{number}")
        parts = layout.blueprint.sources[origin.net].anatomy.parts
        before = {get_block_number(part.at) for part in parts if part.reads[0] == origin.at}
        if row.is_changed or before != {*row.piece.blocks}:
            changed.append(row.at)
    nets = {
        name: source.anatomy.addresses
        for name, source in layout.blueprint.sources.items()
        if any(origin.net == name for origin in origins.values())
    }
    return Lineage(
        surgery=surgery,
        fingerprint=fingerprint,
        base=layout.blueprint.base,
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
        block, layer = get_block(piece.at), get_layer(piece.at)
        side = block.rstrip("0123456789")
        if block not in blocks:
            count = sum(name.startswith(side) for name in blocks)
            blocks[block] = block if side == block else f"{side}{count}"
        if layer not in layers:
            count = sum(get_block(name) == block for name in layers)
            layers[layer] = f"{blocks[block]}{SEPARATOR}l{count}"
        inside = piece.at.removeprefix(layer)
        if piece.at == layer:  # an end, or a sampler
            names[piece.at] = blocks[block] + piece.at.removeprefix(block)
        else:
            names[piece.at] = layers[layer] + inside
    return names


def _find_scales(pieces: Iterable[Piece]) -> dict[str, int]:
    scale, scales = 1, dict[str, int]()
    for piece in pieces:
        if piece.unit.kind == "downsampler":
            scale *= 2
        if piece.unit.kind == "upsampler":
            if scale == 1:
                _refuse_scale(f"{piece.at} would make more than the latents' size", "drop it, too")
            scale //= 2
        scales[piece.at] = scale
    if scale != 1:
        _refuse_scale(
            f"the output would have 1/{scale} of the latents' sides",
            "drop as many samplers on the way down as on the way up",
        )
    return scales


def _refuse_scale(what: str, remedy: str) -> NoReturn:
    raise LeansdError(f"unbalanced samplers: {what}; {remedy}")


def _check_blocks(pieces: tuple[Piece, ...]) -> None:
    kinds: dict[str, list[str]] = {}
    for piece in pieces:
        kinds.setdefault(get_block(piece.at), []).append(piece.unit.kind)
    for block, found in kinds.items():
        if block not in (STEM, HEAD) and "resnet" not in found:
            sampler = next(piece.at for piece in pieces if get_block(piece.at) == block)
            raise LeansdError(f"{block} has only {sampler} left; drop {block}, or keep a layer")
        if block == "mid" and found[-1] != "resnet":
            last = [piece.at for piece in pieces if get_block(piece.at) == "mid"][-1]
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
        get_layer(piece.at): piece.at
        for piece in pieces
        if piece.at == STEM or piece.at.startswith("dn")
    }
    return set(ends.values())


def _check_balance(pieces: tuple[Piece, ...], scales: dict[str, int]) -> None:
    pushing = _list_pushing(pieces)
    for scale in sorted(set(scales.values())):
        here = [piece for piece in pieces if scales[piece.at] == scale]
        given = [piece.at for piece in here if piece.at in pushing]
        read = [piece.at for piece in here if piece.skip]
        if len(given) != len(read):
            side = "up" if len(given) < len(read) else "down"
            raise LeansdError(
                f"unbalanced skips at 1/{scale} of the latents' sides: {len(given)} outputs are "
                f"handed over ({' '.join(given)}) and {len(read)} read ({' '.join(read)}); "
                f"drop {abs(len(given) - len(read))} more on the way {side}"
            )


def _check_channels(piece: Piece, reads: tuple[Row, ...]) -> None:
    if not reads:
        return
    takes = piece.unit.channels[0] - piece.skip
    gets = reads[0].unit.channels[1]
    if takes != gets:
        before = reads[0].piece
        remedy = "keep the layer between them that changes their number"
        if before.origin.net != piece.origin.net:
            remedy = f"take {get_block(before.at)} of net {piece.origin.net}, too"
        raise LeansdError(
            f"{piece.at} takes {takes} channels and would get {gets} from {before.at}; {remedy}"
        )
    if piece.skip and piece.skip != reads[1].unit.channels[1]:
        raise LeansdError(
            f"{piece.at} takes {piece.skip} channels by its skip and would get "
            f"{reads[1].unit.channels[1]} from {reads[1].piece.at}; drop another layer of "
            f"{get_block(piece.at)}"
        )
