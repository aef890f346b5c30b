"""The knapsack against trying everything."""

import itertools
import random

import pytest

from leansd.tuning.removals import NOTHING, Choice, Either, Every, Item, Node, find_best


def list_all(node: Node) -> list[Choice]:
    """Every choice there is, by trying everything."""
    if isinstance(node, Item):
        return [NOTHING, Choice(node.ticks, node.error, (node.name,))]
    if isinstance(node, Either):
        return [choice for way in node.ways for choice in list_all(way)]
    assert isinstance(node, Every)
    return [
        Choice(
            sum(each.ticks for each in picked),
            sum(each.error for each in picked),
            tuple(name for each in picked for name in each.names),
        )
        for picked in itertools.product(*(list_all(part) for part in node.parts))
    ]


def make_item(draw: random.Random, name: str) -> Item:
    # Whole errors add up exactly, whatever the order; several items share one.
    return Item(name, float(draw.randint(0, 20)), draw.randint(0, 9))


def make_tree(draw: random.Random, name: str, depth: int) -> Node:
    """Items, every of them or either of them, nested."""
    if depth == 0:
        return make_item(draw, name)
    kind = draw.choice([Every, Either])
    return kind([make_tree(draw, f"{name}.{place}", draw.randrange(depth)) for place in range(2)])


@pytest.mark.parametrize("seed", range(12))
def test_the_front_is_what_trying_everything_finds(seed: int) -> None:
    draw = random.Random(seed)
    parts = [make_item(draw, f"item {place}") for place in range(4)]
    tree = Every([*parts, make_tree(draw, "tree", 2), make_tree(draw, "other", 2)])
    every = list_all(tree)
    front = tree.front
    most = max(choice.ticks for choice in every)
    for ticks in range(most + 2):
        able = [choice.error for choice in every if choice.ticks >= ticks]
        best = find_best(front, ticks)
        assert (best.error if best else None) == min(able, default=None)
    known = {(choice.ticks, choice.error, frozenset(choice.names)) for choice in every}
    assert all((each.ticks, each.error, frozenset(each.names)) in known for each in front)


def test_the_front_rises() -> None:
    draw = random.Random(0)
    front = Every([make_item(draw, str(place)) for place in range(60)]).front
    assert front[0] == NOTHING or front[0].error == 0
    for one, other in itertools.pairwise(front):
        assert one.ticks < other.ticks
        assert one.error < other.error


def test_only_one_of_two_ways_is_gone() -> None:
    pair = Every([Item("layer", 5.0, 10), Item("attention of what stays", 1.0, 2)])
    tree = Either([pair, Every([Item("attention", 1.0, 4), Item("other attention", 1.0, 4)])])
    assert find_best(tree.front, 8) == Choice(8, 2.0, ("attention", "other attention"))
    assert find_best(tree.front, 9) == Choice(10, 5.0, ("layer",))
    assert find_best(tree.front, 13) is None


def test_what_saves_nothing_is_never_taken() -> None:
    assert Item("free", 0.0, 0).front == (NOTHING,)
