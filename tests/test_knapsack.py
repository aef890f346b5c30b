"""The knapsack against trying everything."""

import itertools
import random

import pytest

from leansd.tuning.removals import (
    NOTHING,
    Choice,
    ChoiceFront,
    choose_either,
    choose_every,
    choose_item,
    find_best,
)

Solved = tuple[ChoiceFront, list[Choice]]
"""The front of a part of the problem, and every choice there is, by trying everything."""


def make_item(draw: random.Random, name: str) -> Solved:
    # Whole errors add up exactly, whatever the order; several items share one.
    error, ticks = float(draw.randint(0, 20)), draw.randint(0, 9)
    return choose_item(name, error, ticks), [NOTHING, Choice(ticks, error, (name,))]


def join_every(parts: list[Solved]) -> Solved:
    choices = [
        Choice(
            sum(each.ticks for each in picked),
            sum(each.error for each in picked),
            tuple(name for each in picked for name in each.names),
        )
        for picked in itertools.product(*(every for _, every in parts))
    ]
    return choose_every(front for front, _ in parts), choices


def join_either(ways: list[Solved]) -> Solved:
    return choose_either(front for front, _ in ways), [c for _, every in ways for c in every]


def make_tree(draw: random.Random, name: str, depth: int) -> Solved:
    """Items, every of them or either of them, nested."""
    if depth == 0:
        return make_item(draw, name)
    join = draw.choice([join_every, join_either])
    return join([make_tree(draw, f"{name}.{place}", draw.randrange(depth)) for place in range(2)])


@pytest.mark.parametrize("seed", range(12))
def test_the_front_is_what_trying_everything_finds(seed: int) -> None:
    draw = random.Random(seed)
    parts = [make_item(draw, f"item {place}") for place in range(4)]
    trees = [make_tree(draw, name, 2) for name in ("tree", "other")]
    front, every = join_every([*parts, *trees])
    most = max(choice.ticks for choice in every)
    for ticks in range(most + 2):
        able = [choice.error for choice in every if choice.ticks >= ticks]
        best = find_best(front, ticks)
        assert (best.error if best else None) == min(able, default=None)
    known = {(choice.ticks, choice.error, frozenset(choice.names)) for choice in every}
    assert all((each.ticks, each.error, frozenset(each.names)) in known for each in front)


def test_the_front_rises() -> None:
    draw = random.Random(0)
    front = choose_every(make_item(draw, str(place))[0] for place in range(60))
    assert front[0] == NOTHING or front[0].error == 0
    for one, other in itertools.pairwise(front):
        assert one.ticks < other.ticks
        assert one.error < other.error


def test_only_one_of_two_ways_is_gone() -> None:
    pair = [("layer", 5.0, 10), ("attention of what stays", 1.0, 2)]
    others = [("attention", 1.0, 4), ("other attention", 1.0, 4)]
    ways = [choose_every(choose_item(*each) for each in items) for items in (pair, others)]
    front = choose_either(ways)
    assert find_best(front, 8) == Choice(8, 2.0, ("attention", "other attention"))
    assert find_best(front, 9) == Choice(10, 5.0, ("layer",))
    assert find_best(front, 13) is None


def test_what_saves_nothing_is_never_taken() -> None:
    assert choose_item("free", 0.0, 0) == (NOTHING,)
