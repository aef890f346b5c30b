"""An anatomy as data: the units of a UNet in running order, and what each of them reads.

`leansd.dissect` makes one from a UNet; everything that plans, draws, predicts or operates needs
only this table, no module and no weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

from leansd.errors import LeansdError
from leansd.plans import address

STEM, HEAD = "stem", "head"


@dataclass(frozen=True, slots=True)
class Unit:
    """One row of an anatomy: a unit that a plan may inherit and a surgery may drop."""

    at: str
    """Address, `dn0.l1.attn`."""
    kind: str
    """`resnet`, `transformer`, `attention`, `downsampler`, `upsampler` or `conv`."""
    path: str
    """Where the module lies in the UNet, `down_blocks.0.attentions.1`."""
    channels: tuple[int, int]
    """Channels in (skip included) and out."""
    scale: int
    """Latent pixels per pixel of the output, a side: 1 at full size, 2 after one downsampler."""
    params: int
    reads: tuple[str, ...]
    """The units whose outputs this one takes: its input first, then the skip."""
    macs: int = 0
    """Multiply-accumulates of one call on one sample; 0 where they were not counted."""


class Selection(tuple[Unit, ...]):
    """Units picked by an address or glob, in running order."""

    def expect(self, count: int) -> Selection:
        """The selection itself, if it holds exactly `count` units; a `LeansdError` otherwise."""
        if len(self) != count:
            found = " ".join(unit.at for unit in self)
            raise LeansdError(f"expected {count} units, selected {len(self)}: {found}")
        return self

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(unit.at for unit in self)

    @property
    def params(self) -> int:
        return sum(unit.params for unit in self)

    @property
    def macs(self) -> int:
        return sum(unit.macs for unit in self)


@dataclass(frozen=True)
class Anatomy:
    """The units of one UNet in running order; with `reads`, also its graph."""

    units: tuple[Unit, ...]
    parts: tuple[Unit, ...] = ()
    """What transformers are made of, `dn0.l1.attn.t0.sa` (self-attention), `.ca` (cross-attention),
    `.ff` (feed-forward); each reads the unit that it lies in."""
    name: str = "UNet"
    params: int = 0
    """All parameters of the UNet, those outside the units (time embedding, norms) included."""
    macs: int = 0
    """All multiply-accumulates of one forward on one sample; 0 where they were not counted."""
    size: tuple[int, int] | None = None
    """Latent (height, width) that the MACs were counted at."""
    tokens: int | None = None
    """Text tokens that the MACs were counted at."""
    uncounted: str = field(default="", compare=False)
    """Why the MACs could not be counted, "not counted, because ..."; empty where they could."""
    by_address: dict[str, Unit] = field(init=False, repr=False, compare=False)
    """Units, and then their parts."""

    def __post_init__(self) -> None:
        rows = {unit.at: unit for unit in (*self.units, *self.parts)}
        object.__setattr__(self, "by_address", rows)

    def __iter__(self) -> Iterator[Unit]:
        return iter(self.units)

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, at: str) -> Unit:
        return self.select(at).expect(1)[0]

    @cached_property
    def addresses(self) -> tuple[str, ...]:
        return tuple(unit.at for unit in self.units)

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """Addresses of the blocks in running order, the two ends left out."""
        names = dict.fromkeys(address.get_block(at) for at in self.addresses)
        return tuple(name for name in names if name not in (STEM, HEAD))

    @cached_property
    def up_blocks(self) -> int:
        """How many up blocks there are: 4 in SD 1.x and 2.x, 3 in SDXL."""
        return sum(block.startswith("up") for block in self.blocks)

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hex digits of the shape of the graph: equal for UNets that take the same plans."""
        from hashlib import sha256  # here, since it opens OpenSSL

        rows = repr([(unit.at, unit.kind, unit.channels, unit.reads) for unit in self.units])
        return sha256(rows.encode()).hexdigest()[:12]

    def select(self, pattern: str) -> Selection:
        """The units under an address or glob; the parts, where it is too deep for units.

        Raises:
            LeansdError: it matches nothing.
        """
        every = self.addresses
        if not any(address.covers(pattern, at) for at in every):
            every = tuple(self.by_address)
        return Selection(self.by_address[at] for at in address.select(pattern, every))

    def __str__(self) -> str:
        return _draw_tree(self)


WHOLE = Anatomy((Unit(HEAD, "conv", "", (0, 0), 1, 0, (), macs=1),), name="denoiser", macs=1)
"""A denoiser of which only the output is known: what plans of whole steps need. A call costs 1."""


def _draw_tree(anatomy: Anatomy) -> str:
    """An anatomy as a tree of blocks, layers and units with parameters and multiply-accumulates."""
    lines = [
        _describe(anatomy),
        f"{'address':<18}{'kind':<13}{'channels':>12}{'scale':>7}{'params':>11}",
    ]
    if anatomy.macs:
        lines[-1] += f"{'MACs':>10}{'share':>8}"
    for block, members in groupby(anatomy.units, key=lambda unit: address.get_block(unit.at)):
        units = list(members)
        if len(units) > 1 or units[0].at != block:
            lines.append(_row(block, "", "", "", units, anatomy))
        for layer, parts in groupby(units, key=lambda unit: address.get_layer(unit.at)):
            rows = list(parts)
            indent = "" if layer == block else "  "
            if len(rows) > 1:
                lines.append(_row(indent + layer, "", "", "", rows, anatomy))
                indent += "  "
            for unit in rows:
                channels = f"{unit.channels[0]}>{unit.channels[1]}"
                lines.append(
                    _row(indent + unit.at, unit.kind, channels, f"1/{unit.scale}", [unit], anatomy)
                )
    return "\n".join(lines)


def _describe(anatomy: Anatomy) -> str:
    units = f"{anatomy.name}: {len(anatomy) - 2} units and 2 ends"
    params = f"{anatomy.params / 1e6:,.2f} M parameters"
    if not anatomy.macs or not anatomy.size:
        return "\n".join(filter(None, (f"{units}, {params}", anatomy.uncounted)))
    height, width = anatomy.size
    macs = f"{anatomy.macs / 1e9:,.3f} GMAC at {height}x{width} latents, {anatomy.tokens} tokens"
    return f"{units}, {params}\n{macs}"


def _row(
    name: str, kind: str, channels: str, scale: str, units: list[Unit], anatomy: Anatomy
) -> str:
    params = sum(unit.params for unit in units)
    text = f"{name:<18}{kind:<13}{channels:>12}{scale:>7}{params / 1e6:>9,.3f} M"
    if anatomy.macs:
        macs = sum(unit.macs for unit in units)
        text += f"{macs / 1e9:>8,.3f} G{macs / anatomy.macs:>8.1%}"
    return text
