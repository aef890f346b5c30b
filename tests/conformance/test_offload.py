"""Offloading puts hooks of its own around the same modules: before attaching, after, and anew."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules

import leansd
from conformance.cases import STEPS, build_sd, text
from conformance.reference import count_predicted, draw
from conformance.samplers import SAMPLERS
from leansd.anatomy import read_anatomy
from leansd.plans import Plan
from leansd.plans.compile import compile_plan
from loops import count_calls

PLANS = {
    "reuse": Plan.every(2, cut="up1.l1", steps=STEPS),
    # The stem is a convolution, which sequential offload hooks itself.
    "stem": Plan.every(2, cut="stem", steps=STEPS),
}


# The processor stands in for the device that models are moved to; the hooks are the same.
def offload_models(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def offload_sequentially(pipe: Any) -> None:
    cpu_offload(pipe.unet, torch.device("cpu"))


def offload_groups(pipe: Any) -> None:
    pipe.unet.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )


def remove_hooks(pipe: Any) -> None:
    pipe.remove_all_hooks()
    remove_hook_from_submodules(pipe.unet)


KINDS = {"model": offload_models, "sequential": offload_sequentially}


def check(pipe: Any, plan: Plan, expected: torch.Tensor) -> None:
    """Two calls, since a pipeline takes its hooks off and puts them on again after each."""
    anatomy = read_anatomy(pipe.unet)
    predicted = count_predicted(compile_plan(plan, anatomy).calls)
    for number in range(2):
        with count_calls(pipe.unet, anatomy) as counts:
            assert torch.equal(draw(pipe, text()), expected), f"call {number}"
        assert counts == predicted, f"call {number}"


def prepare(plan: Plan) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A pipeline, what it draws plainly and what by the plan, neither offloaded."""
    pipe = build_sd(SAMPLERS["ddim"].make())
    plain = draw(pipe, text())
    with leansd.inherit(pipe, plan):
        planned = draw(pipe, text())
    assert not torch.equal(plain, planned)
    return pipe, plain, planned


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("kind", KINDS)
def test_attached_to_an_offloaded_pipeline(kind: str, name: str) -> None:
    pipe, plain, planned = prepare(PLANS[name])
    KINDS[kind](pipe)
    for _ in range(2):
        with leansd.inherit(pipe, PLANS[name]):
            check(pipe, PLANS[name], planned)
        assert torch.equal(draw(pipe, text()), plain)
    remove_hooks(pipe)
    assert torch.equal(draw(pipe, text()), plain)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_while_attached(kind: str, name: str) -> None:
    pipe, plain, planned = prepare(PLANS[name])
    with leansd.inherit(pipe, PLANS[name]):
        KINDS[kind](pipe)
        check(pipe, PLANS[name], planned)
    assert torch.equal(draw(pipe, text()), plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [True, False])
def test_hooks_removed_while_attached(kind: str, first: bool) -> None:
    plan = PLANS["reuse"]
    pipe, plain, planned = prepare(plan)
    if first:
        KINDS[kind](pipe)
    with leansd.inherit(pipe, plan):
        if not first:
            KINDS[kind](pipe)
        check(pipe, plan, planned)
        remove_hooks(pipe)
        check(pipe, plan, planned)
    assert torch.equal(draw(pipe, text()), plain)


@pytest.mark.parametrize("first", [True, False])
def test_group_offload(first: bool) -> None:
    plan = PLANS["reuse"]
    pipe, plain, planned = prepare(plan)
    steps: list[Callable[[], Any]] = [lambda: offload_groups(pipe)]
    if first:
        steps.pop()()
    with leansd.inherit(pipe, plan):
        for step in steps:
            step()
        check(pipe, plan, planned)
    assert torch.equal(draw(pipe, text()), plain)
