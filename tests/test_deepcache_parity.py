"""The published DeepCache helper against its schedule as a plan: the same bits."""

import pytest
import torch
from DeepCache import DeepCacheSDHelper

import leansd
from test_inheritance import UNETS, Loop

STEPS = 7


@pytest.mark.parametrize("branch", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("interval", [2, 3, 5])
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
