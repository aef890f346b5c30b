"""A blueprint as a diffusers config, and what no config can say.

diffusers counts layers by level, one more on the way up than down, and gives attention to all
layers of a block or to none. What is fewer is said as addresses to drop from what the config
builds.

`transformer_layers_per_block` has a number for each level, or where the layers of a level differ
one for each layer; then the way up has an entry of its own. The middle block has no entry: it
takes the first number of the last level.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from leansd.errors import LeansdError
from leansd.plans.address import get_block
from leansd.surgery.blueprint import Blueprint, Piece, Replaced
from leansd.surgery.edits import write_name

BY_LEVEL = (
    "attention_head_dim",
    "num_attention_heads",
    "cross_attention_dim",
    "only_cross_attention",
)
"""Config entries with a value for all levels, or one for each, that attentions are built with."""
STRUCTURAL = {
    *BY_LEVEL,
    "layers_per_block",
    "block_out_channels",
    "down_block_types",
    "up_block_types",
    "mid_block_type",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "sample_size",
    "structure",
}
"""Config entries in which nets may differ that give parts to one."""
WITHOUT_ATTENTION = {"CrossAttnDownBlock2D": "DownBlock2D", "CrossAttnUpBlock2D": "UpBlock2D"}
MID, MID_ATTENTION = "UNetMidBlock2D", "UNetMidBlock2DCrossAttn"


@dataclass(frozen=True)
class BuildConfig:
    """How a network is built: by a diffusers config, then by taking out and replacing."""

    config: Mapping[str, Any]
    drop: tuple[str, ...] = ()
    """Addresses in the network that the config builds."""
    replaced: tuple[Replaced, ...] = ()
    """Addresses are those of the finished network."""

    @property
    def is_plain(self) -> bool:
        """Whether the config says it all."""
        return not (self.drop or self.replaced)

    @property
    def structure(self) -> dict[str, Any]:
        """What the config of a `LightUNet2DConditionModel` holds besides, as plain JSON values."""
        replaced = [
            {"at": each.at, "by": write_name(each.by), "options": dict(each.options)}
            for each in self.replaced
        ]
        return {"drop": list(self.drop), "replace": replaced}


class Slot(NamedTuple):
    """A layer that the config builds, and the rows that it is for; without any it is dropped."""

    resnet: Piece | None = None
    attention: Piece | None = None


@dataclass(frozen=True)
class Block:
    """A block that the config builds."""

    at: str
    slots: tuple[Slot, ...]
    has_attention: bool

    @property
    def dropped(self) -> Iterator[str]:
        """Layers and attentions that are too many."""
        # The middle block has attention between its ResNets only.
        attended = len(self.slots) - (self.at == "mid") if self.has_attention else 0
        for number, slot in enumerate(self.slots):
            layer = f"{self.at}.l{number}"
            if slot.resnet is None:
                yield layer
            elif slot.attention is None and number < attended:
                yield f"{layer}.attn"

    @property
    def depths(self) -> tuple[int, ...]:
        """How many transformer blocks its attentions have, in the order of its layers."""
        return tuple(len(slot.attention.blocks) for slot in self.slots if slot.attention)

    @property
    def all_depths(self) -> list[int]:
        """The same for every layer, where it has attention; what is of no account is as others."""
        spare = self.depths[0] if self.depths else 1
        slots = self.slots if self.has_attention else ()
        return [len(slot.attention.blocks) if slot.attention else spare for slot in slots]


def make_config(blueprint: Blueprint) -> BuildConfig:
    """The config that comes closest, and the rest as addresses.

    Raises:
        LeansdError: what diffusers builds alike is not; the message names the address.
    """
    source = blueprint.sources[blueprint.base]
    replaced = tuple(each for row in blueprint.pieces for each in row.list_replaced())
    if blueprint.is_untouched:
        return BuildConfig(source.config, source.drop, replaced)
    _check_families(blueprint)
    base = source.config
    levels = len({get_block(row.at) for row in blueprint.pieces if row.at.startswith("dn")})
    channels = [blueprint.list_block(f"dn{level}")[0].unit.channels[1] for level in range(levels)]
    counts = [_count_layers(blueprint, level, levels) for level in range(levels)]
    down = [_fill_down(blueprint, level, counts[level]) for level in range(levels)]
    up = [_fill_up(blueprint, level, counts[level], channels) for level in range(levels)]
    mid = _fill_mid(blueprint)
    config = {
        **base,
        "block_out_channels": _write_like(base["block_out_channels"], channels),
        "layers_per_block": _write_like(base["layers_per_block"], counts),
        "down_block_types": _write_like(
            base["down_block_types"], [_find_type(blueprint, each, "down") for each in down]
        ),
        "up_block_types": _write_like(
            base["up_block_types"], [_find_type(blueprint, each, "up") for each in reversed(up)]
        ),
        "mid_block_type": _find_mid_type(blueprint, mid),
    }
    for name in BY_LEVEL:
        entries = [_find_entry(blueprint, name, level, levels) for level in range(levels)]
        config[name] = _write_like(base[name], entries)
    depths, extra = choose_depths(down, mid, up)
    if isinstance(depths, Sequence):
        depths = _write_like(base["transformer_layers_per_block"], depths)
        config["transformer_layers_per_block"] = depths
        config["reverse_transformer_layers_per_block"] = None
    else:
        config |= depths
    dropped = [at for block in (*down, mid, *reversed(up)) for at in block.dropped]
    return BuildConfig(
        config, (*_list_missing_samplers(blueprint, levels), *dropped, *extra), replaced
    )


def _check_families(blueprint: Blueprint) -> None:
    """Refuse nets that are built differently outside their blocks."""
    base = blueprint.sources[blueprint.base].config
    for name in {row.origin.net for row in blueprint.pieces} - {blueprint.base}:
        other = blueprint.sources[name].config
        for key in sorted({*base, *other} - STRUCTURAL):
            if not key.startswith("_") and _plain(base.get(key)) != _plain(other.get(key)):
                raise LeansdError(
                    f"net {name} is built with {key} {other.get(key)}, {blueprint.base} with "
                    f"{base.get(key)}; a surgery joins nets of one family"
                )


def _list_layers(blueprint: Blueprint, block: str) -> list[Slot]:
    """The layers of a block of the finished net."""
    rows = {row.at: row for row in blueprint.list_block(block)}
    return [
        Slot(row, rows.get(at.removesuffix("res") + "attn"))
        for at, row in rows.items()
        if row.unit.kind == "resnet"
    ]


def _count_layers(blueprint: Blueprint, level: int, levels: int) -> int:
    """What `layers_per_block` must be for both ways of a level to get enough."""
    down = len(_list_layers(blueprint, f"dn{level}"))
    return max(down, len(_list_layers(blueprint, f"up{levels - 1 - level}")) - 1)


def _fill_down(blueprint: Blueprint, level: int, count: int) -> Block:
    block = f"dn{level}"
    layers = _list_layers(blueprint, block)
    slots = (*layers, *[Slot()] * (count - len(layers)))
    return Block(block, slots, any(slot.attention for slot in layers))


def _fill_up(blueprint: Blueprint, level: int, count: int, channels: Sequence[int]) -> Block:
    """Layers of an up block in what diffusers builds, each where its channels are the same."""
    block = f"up{len(channels) - 1 - level}"
    width, before = channels[level], channels[min(level + 1, len(channels) - 1)]
    built = [(width, width)] * (count + 1)  # what a layer takes from its input and by its skip
    built[0] = (before, width)
    built[-1] = (built[-1][0], channels[max(level - 1, 0)])
    layers = _list_layers(blueprint, block)
    slots = [Slot()] * len(built)
    place = 0
    for layer in layers:
        assert layer.resnet is not None
        piece = layer.resnet
        wanted = (piece.unit.channels[0] - piece.skip, piece.skip)
        if wanted not in built[place:]:
            raise LeansdError(
                f"{piece.at} takes {wanted[0]} channels and {wanted[1]} by its skip, and no layer "
                f"of {block} of the new net does; drop another layer of {get_block(piece.at)}"
            )
        place = built.index(wanted, place)
        slots[place] = layer
        place += 1
    return Block(block, tuple(slots), any(slot.attention for slot in layers))


def _fill_mid(blueprint: Blueprint) -> Block:
    slots = tuple(_list_layers(blueprint, "mid"))
    if len(slots) > 2:
        raise LeansdError(f"mid has {len(slots)} ResNets, diffusers builds one or two; drop mid.l1")
    return Block("mid", slots, len(slots) == 2)


def _find_level(blueprint: Blueprint, row: Piece) -> int:
    """The level that a row had in the net it comes from."""
    levels = len(blueprint.sources[row.origin.net].config["block_out_channels"])
    block = get_block(row.origin.at)
    if block == "mid":
        return levels - 1
    number = int(block[2:])
    return number if block.startswith("dn") else levels - 1 - number


def _find_entry(blueprint: Blueprint, name: str, level: int, levels: int) -> Any:
    """A level's value of a config entry, which all its attentions must agree on."""
    blocks = [f"dn{level}", f"up{levels - 1 - level}", *(["mid"] if level == levels - 1 else [])]
    rows = [row for block in blocks for row in blueprint.list_block(block)]
    attentions = [row for row in rows if row.unit.kind == "transformer"] or rows[:1]
    found: dict[str, Any] = {}
    for row in attentions:
        value = blueprint.sources[row.origin.net].config[name]
        is_scalar = not isinstance(value, list | tuple)
        found[row.at] = value if is_scalar else value[_find_level(blueprint, row)]
    first, *others = found
    for at in others:
        if found[at] != found[first]:
            raise LeansdError(
                f"{at} has {name} {found[at]}, {first} of the same level {found[first]}; "
                "diffusers has one value for a level"
            )
    return found[first]


def _find_type(blueprint: Blueprint, block: Block, way: str) -> str:
    rows = [row for slot in block.slots for row in slot if row is not None]
    donor = next((row for row in rows if row.unit.kind == "transformer"), rows[0])
    types = blueprint.sources[donor.origin.net].config[f"{way}_block_types"]
    level = _find_level(blueprint, donor)
    kind: str = types[level if way == "down" else len(types) - 1 - level]
    return kind if block.has_attention else WITHOUT_ATTENTION.get(kind, kind)


def _find_mid_type(blueprint: Blueprint, mid: Block) -> str | None:
    if not mid.slots:
        return None
    if not mid.has_attention:
        return MID
    assert mid.slots[0].resnet is not None
    donor = mid.slots[0].resnet.origin.net
    before = blueprint.sources[donor].config["mid_block_type"]
    return MID_ATTENTION if before == MID else before


def _list_missing_samplers(blueprint: Blueprint, levels: int) -> Iterator[str]:
    """Samplers that diffusers builds, for every block but the last of its way, and that are not."""
    there = {row.at for row in blueprint.pieces}
    for number in range(levels - 1):
        for at in (f"dn{number}.down", f"up{number}.up"):
            if at not in there:
                yield at


def _write_like(before: Any, values: Sequence[Any]) -> Any:
    """Values by level, as one where the entry was one and they are equal; unchanged if it can."""
    if isinstance(before, list | tuple):
        return before if list(before) == list(values) else type(before)(values)
    alike = all(value == values[0] for value in values)
    return values[0] if alike else list(values)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def choose_depths(
    down: Sequence[Block], mid: Block, up: Sequence[Block]
) -> tuple[list[int] | dict[str, Any], tuple[str, ...]]:
    """One number a level if that will do, else both config entries; and what they build too much.

    Args:
        down, up: by level, the shallowest first.
    """
    deepest = len(down) - 1
    flat: list[int] = []
    for level, (one, other) in enumerate(zip(down, up, strict=True)):
        middle = mid.depths if level == deepest else ()
        numbers = {*one.depths, *other.depths, *middle}
        if len(numbers) > 1:
            return _nest(down, mid, up)
        flat.append(numbers.pop() if numbers else 1)
    return flat, ()


def _nest(
    down: Sequence[Block], mid: Block, up: Sequence[Block]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    ways = [[each.all_depths for each in way] for way in (down, up)]
    extra: list[str] = []
    if mid.depths:
        # The middle block and the first layer of the last level share a number: the larger.
        wanted, last = mid.depths[0], ways[0][-1]
        if not last:
            last.append(wanted)
        shared = max(wanted, last[0])
        for at, count in ((f"{mid.at}.l0.attn", wanted), (f"{down[-1].at}.l0.attn", last[0])):
            extra += [f"{at}.t{number}" for number in range(count, shared)]
        last[0] = shared
    below, above = ([_shorten(counts) for counts in way] for way in ways)
    entries = {
        "transformer_layers_per_block": below,
        "reverse_transformer_layers_per_block": above[::-1],
    }
    return entries, tuple(extra)


def _shorten(counts: list[int]) -> int | list[int]:
    """One number where all are equal."""
    if not counts:
        return 1
    return counts[0] if len(set(counts)) == 1 else counts
