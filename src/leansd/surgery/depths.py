"""How many transformer blocks each attention has, as diffusers' config entries.

`transformer_layers_per_block` has a number for each level, or where the layers of a level differ
one for each layer; then the way up has an entry of its own. The middle block has no entry: it
takes the first number of the last level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Depths(NamedTuple):
    """The numbers of transformer blocks of a block's attentions, in the order of its layers."""

    at: str
    counts: tuple[int | None, ...]
    """None for a layer that has none or is not there; empty for a block without attention."""

    @property
    def known(self) -> tuple[int, ...]:
        return tuple(count for count in self.counts if count is not None)

    @property
    def filled(self) -> list[int]:
        """A number for every layer; those of no account are as others."""
        spare = self.known[0] if self.known else 1
        return [spare if count is None else count for count in self.counts]


def choose_depths(
    down: Sequence[Depths], mid: Depths, up: Sequence[Depths]
) -> tuple[list[int] | dict[str, Any], tuple[str, ...]]:
    """One number a level if that will do, else both config entries; and what they build too much.

    Args:
        down, up: by level, the shallowest first.
    """
    deepest = len(down) - 1
    flat: list[int] = []
    for level, (one, other) in enumerate(zip(down, up, strict=True)):
        middle = mid.known if level == deepest else ()
        numbers = {*one.known, *other.known, *middle}
        if len(numbers) > 1:
            return _nest(down, mid, up)
        flat.append(numbers.pop() if numbers else 1)
    return flat, ()


def _nest(
    down: Sequence[Depths], mid: Depths, up: Sequence[Depths]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    ways = [[each.filled for each in way] for way in (down, up)]
    extra: list[str] = []
    if mid.known:
        # The middle block and the first layer of the last level share a number: the larger.
        wanted, last = mid.known[0], ways[0][-1]
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
