"""What can be taken out of a UNet and leaves one that runs: the tree of a knapsack, and solving it.

A down layer hands a skip to an up layer of its level, so the two go together; any pair will do
whose neighbours then fit. Transformers go alone, and so do the blocks of long ones, and the
attentions and feed-forwards in them. A level's pairs exclude one another and so does what lies in a
layer and the layer itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations, product
from typing import TypeAlias

import numpy as np

from leansd.errors import LeansdError
from leansd.evaluation.pareto import list_front
from leansd.plans.address import covers, get_block, get_layer
from leansd.plans.anatomy import Anatomy, Unit

# -- the knapsack ----------------------------------------------------------------------------------
# Solved exactly: what to take so that enough is saved at the least error.
#
# Costs are whole ticks, errors add up. What excludes one another is a tree: an item is taken or
# left, of every part it is decided for itself, of ways either one or another is gone. The answer is
# the whole front: for every saving the least error, so one solution serves all budgets.


@dataclass(frozen=True, slots=True)
class Choice:
    """Items that are taken together."""

    ticks: int
    """What they save."""
    error: float
    names: tuple[str, ...]


ChoiceFront: TypeAlias = tuple[Choice, ...]
"""Choices of rising savings and errors, each with the least error of all that save as much."""

NOTHING = Choice(0, 0.0, ())


def choose_item(name: str, error: float, ticks: int) -> ChoiceFront:
    """The front of what can be taken or left; errors are not negative."""
    return (NOTHING, Choice(ticks, error, (name,))) if ticks > 0 else (NOTHING,)


def choose_every(parts: Iterable[ChoiceFront]) -> ChoiceFront:
    """The front of parts that do not touch one another; each is decided for itself."""
    return reduce(_combine, parts, (NOTHING,))


def choose_either(ways: Iterable[ChoiceFront]) -> ChoiceFront:
    """The front of ways of which only one can be gone."""
    choices = [choice for way in ways for choice in way]
    return tuple(choices[place] for place in list_front(*_list_numbers(choices)))


def find_best(front: ChoiceFront, ticks: int) -> Choice | None:
    """The choice of least error that saves `ticks` or more; None where nothing saves as much."""
    return next((choice for choice in front if choice.ticks >= ticks), None)


def _combine(one: ChoiceFront, other: ChoiceFront) -> ChoiceFront:
    """All choices of one front with all of another; only the best are made."""
    (ticks, gains), (more_ticks, more_gains) = _list_numbers(one), _list_numbers(other)
    sums = np.add.outer(ticks, more_ticks).ravel(), np.add.outer(gains, more_gains).ravel()
    pairs = (divmod(place, len(other)) for place in list_front(*sums))
    both = ((one[left], other[right]) for left, right in pairs)
    return tuple(Choice(a.ticks + b.ticks, a.error + b.error, a.names + b.names) for a, b in both)


def _list_numbers(choices: Sequence[Choice]) -> tuple[np.ndarray, np.ndarray]:
    """What each saves, and its error as a loss; of both more is better."""
    ticks = np.array([choice.ticks for choice in choices])
    return ticks, -np.array([choice.error for choice in choices])


# -- what can go -----------------------------------------------------------------------------------

MID = "mid"


@dataclass(frozen=True)
class Removal:
    """Addresses that go together; a surgery drops them."""

    addresses: tuple[str, ...]
    inside: bool = False
    """Whether they lie in a transformer block that stays: nothing is put in their place."""

    @property
    def name(self) -> str:
        return " + ".join(self.addresses)

    def takes(self, at: str) -> bool:
        """Whether a unit or part goes with it."""
        return any(covers(address, at) for address in self.addresses)


Solve: TypeAlias = Callable[[Removal], ChoiceFront]
"""Gives the front of a removal by itself."""


@dataclass(frozen=True)
class Removals:
    """Everything that can go, and what excludes what."""

    levels: tuple[tuple[Thinning, ...], ...]
    """For every level, and the middle, the ways of which one is gone."""
    inner: tuple[tuple[Removal, int], ...]
    """Whole inner levels, each with the number of the outermost level that goes."""

    def __iter__(self) -> Iterator[Removal]:
        every = [
            removal
            for ways in self.levels
            for way in ways
            for removal in (way.layers, *(each for group in way.attentions for each in group.every))
            if removal is not None
        ]
        every += [removal for removal, _ in self.inner]
        return iter(dict.fromkeys(every))

    def solve(self, solve: Solve) -> ChoiceFront:
        thinnings = [way for ways in self.levels for way in ways]
        fronts = {each: each.solve(solve) for way in thinnings for each in way.attentions}

        def solve_way(way: Thinning) -> ChoiceFront:
            first = [solve(way.layers)] if way.layers is not None else []
            return choose_every([*first, *(fronts[each] for each in way.attentions)])

        *levels, middle = [choose_either(map(solve_way, ways)) for ways in self.levels]
        inner = [
            choose_every([solve(removal), *levels[:first], middle]) for removal, first in self.inner
        ]
        return choose_either([choose_every([*levels, middle]), *inner])


@dataclass(frozen=True)
class Thinning:
    """One way to thin a level: layers that go, and attentions of those that stay."""

    layers: Removal | None
    attentions: tuple[Attention, ...]


@dataclass(frozen=True)
class TransformerBlock:
    """A transformer block: it goes as a whole, or some of its parts do."""

    whole: Removal | None
    """None where there is no other in its transformer."""
    parts: tuple[Removal, ...]

    @property
    def every(self) -> tuple[Removal, ...]:
        return (*([self.whole] if self.whole is not None else []), *self.parts)

    def solve_parts(self, solve: Solve) -> ChoiceFront:
        """Any of its parts, never all of them: that is the block."""
        items = [solve(part) for part in self.parts]
        return choose_either(
            choose_every([*items[:kept], *items[kept + 1 :]]) for kept in range(len(items))
        )

    def solve(self, solve: Solve) -> ChoiceFront:
        whole = [] if self.whole is None else [solve(self.whole)]
        return choose_either([*whole, self.solve_parts(solve)])


@dataclass(frozen=True)
class Attention:
    """A transformer: it goes as a whole, or some of its blocks do, but never all of them."""

    whole: Removal
    blocks: tuple[TransformerBlock, ...]

    @property
    def every(self) -> tuple[Removal, ...]:
        return (self.whole, *(each for block in self.blocks for each in block.every))

    def solve(self, solve: Solve) -> ChoiceFront:
        fronts = [block.solve(solve) for block in self.blocks]
        ways = [
            choose_every([*fronts[:kept], block.solve_parts(solve), *fronts[kept + 1 :]])
            for kept, block in enumerate(self.blocks)
        ]
        return choose_either([solve(self.whole), *ways])


def list_removals(anatomy: Anatomy, check: Callable[[Sequence[str]], object]) -> Removals:
    """What can be taken out of a UNet.

    Args:
        check: raises a `LeansdError` for addresses without which the UNet does not fit together.
    """

    def is_legal(*addresses: str) -> bool:
        try:
            check(addresses)
        except LeansdError:
            return False
        return True

    attentions = {
        unit.at: _read_attention(unit, anatomy)
        for unit in anatomy
        if unit.kind == "transformer" and is_legal(unit.at)
    }
    levels: list[tuple[Thinning, ...]] = []
    for down, up in _list_levels(anatomy):
        layers = [_list_layers(anatomy, block) for block in (down, up)]
        pairs = [
            (*some, *others)
            for count in range(1, min(map(len, layers)))
            for some, others in product(*(combinations(each, count) for each in layers))
            if is_legal(*some, *others)
        ]
        levels.append(_list_thinnings([(), *pairs], [down, up], attentions))
    middle: list[tuple[str, ...]] = [()]
    if MID in anatomy.blocks:
        *inside, last = _list_layers(anatomy, MID)
        # What ends the middle block has to be a ResNet, so the last takes the attention before it.
        before = [at for at in attentions if get_layer(at) in inside[-1:]]
        wanted = [(MID,), *((layer,) for layer in inside), (*before, last)]
        middle += [way for way in wanted if is_legal(*way)]
    levels.append(_list_thinnings(middle, [MID], attentions))
    return Removals(tuple(levels), tuple(_list_inner(anatomy, is_legal)))


def _list_thinnings(
    ways: Sequence[tuple[str, ...]], blocks: Sequence[str], attentions: Mapping[str, Attention]
) -> tuple[Thinning, ...]:
    own = {at: each for at, each in attentions.items() if get_block(at) in blocks}
    return tuple(
        Thinning(
            Removal(gone) if gone else None,
            tuple(each for at, each in own.items() if not Removal(gone).takes(at)),
        )
        for gone in ways
    )


def _list_inner(anatomy: Anatomy, is_legal: Callable[..., bool]) -> Iterator[tuple[Removal, int]]:
    """The innermost levels, one or more, with the sampler that leads to them."""
    levels = _list_levels(anatomy)
    for first in range(1, len(levels)):
        gone = (f"{levels[first - 1][0]}.down", *(at for pair in levels[first:] for at in pair))
        if is_legal(*gone):
            yield Removal(gone), first


def _list_levels(anatomy: Anatomy) -> list[tuple[str, str]]:
    """The down and the up block of every level, the shallowest first."""
    downs = [block for block in anatomy.blocks if block.startswith("dn")]
    ups = [block for block in anatomy.blocks if block.startswith("up")]
    return list(zip(downs, reversed(ups), strict=True))


def _list_layers(anatomy: Anatomy, block: str) -> list[str]:
    layers = dict.fromkeys(get_layer(unit.at) for unit in anatomy.select(block))
    return [layer for layer in layers if f"{layer}.res" in anatomy.addresses]


def _read_attention(unit: Unit, anatomy: Anatomy) -> Attention:
    parts: dict[str, list[Removal]] = {}
    for part in anatomy.parts:
        if part.reads[0] == unit.at:
            parts.setdefault(part.at.rpartition(".")[0], []).append(
                Removal((part.at,), inside=True)
            )
    blocks = tuple(
        TransformerBlock(Removal((at,)) if len(parts) > 1 else None, tuple(inside))
        for at, inside in parts.items()
    )
    return Attention(Removal((unit.at,)), blocks)
