"""Addresses: one name for every place in a UNet, for plans, surgeries, records and error messages.

A full address names a unit, `dn0.l1.attn`; a shorter one means everything under it, `dn0.l1` or
`dn0`; a glob may replace any part, `up*.attn`. `*` spans dots.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import lru_cache

from leansd.errors import LeansdError

SEPARATOR = "."


def get_block(address: str) -> str:
    """The block that an address lies in: `dn0` of `dn0.l1.attn`."""
    return address.split(SEPARATOR, 1)[0]


def get_layer(address: str) -> str:
    """The layer that an address lies in: `dn0.l1` of `dn0.l1.attn`; a sampler is its own layer."""
    return SEPARATOR.join(address.split(SEPARATOR)[:2])


def covers(pattern: str, address: str) -> bool:
    """Whether `pattern`, an address or a glob, names `address` or something that it lies under."""
    return fnmatchcase(address, pattern) or fnmatchcase(address, pattern + SEPARATOR + "*")


def select(pattern: str, addresses: Sequence[str]) -> tuple[str, ...]:
    """All of `addresses` that `pattern` covers, in their own order.

    Raises:
        LeansdError: nothing is covered. The message offers what comes nearest.
    """
    return _select(pattern, tuple(addresses))


@lru_cache(maxsize=4096)
def _select(pattern: str, addresses: tuple[str, ...]) -> tuple[str, ...]:
    found = tuple(address for address in addresses if covers(pattern, address))
    if not found:
        raise LeansdError(
            f"address {pattern!r} matches nothing in this UNet{_offer(pattern, addresses)}"
        )
    return found


def _offer(pattern: str, addresses: Iterable[str]) -> str:
    """What to say after "matches nothing": the nearest names, or else the blocks there are."""
    names: dict[str, None] = {}
    for address in addresses:
        parts = address.split(SEPARATOR)
        for depth in range(1, len(parts) + 1):
            names[SEPARATOR.join(parts[:depth])] = None
    near = get_close_matches(pattern, names, n=3, cutoff=0.75)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    blocks = [name for name in names if SEPARATOR not in name]
    return f"; its blocks are {' '.join(blocks)}"
