"""The published DeepCache helper against its schedule as a plan: the same bits."""

import pytest
import torch
from DeepCache import DeepCacheSDHelper

import leansd
from test_inheritance import UNETS, Loop

STEPS = 7


# Which steps are full follows from the interval, what is kept from the branch: each with the other.
@pytest.mark.parametrize(
    ("interval", "branch"), [(2, 0), (3, 0), (5, 0), (3, 1), (3, 2), (2, 3), (5, 6)]
)
@pytest.mark.parametrize("kind", UNETS)
def test_preset_equals_the_package(kind: str, interval: int, branch: int) -> None:
    loop = Loop(UNETS[kind]())
    helper = DeepCacheSDHelper(pipe=loop)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    expected = loop(STEPS)
    helper.disable()
    plan = leansd.preset(
        "deepcache", interval=interval, branch=branch, steps=STEPS, blocks=len(loop.unet.up_blocks)
    )
    with leansd.inherit(loop, plan):
        result = loop(STEPS)
    assert torch.equal(result, expected)
    assert not torch.equal(result, loop(STEPS))
