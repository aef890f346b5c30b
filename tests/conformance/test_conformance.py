"""Every case, sampler and plan: the same bits, the predicted work, nothing left behind."""

from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch

import leansd
from conformance.cases import CASES, STEPS, Case, build_sd, text
from conformance.reference import (
    FORECASTS,
    PLANS,
    count_control,
    count_predicted,
    draw,
    is_empty,
    is_plain,
    overwrite,
    predict,
    runs_control,
    watch_ends,
    watch_stores,
)
from conformance.samplers import SAMPLERS
from leansd.anatomy import read_anatomy
from loops import count_calls

TIMESTEPS = [981, 700, 421, 180, 20]
CUSTOM = Case("custom-timesteps", build_sd, (text(), text(timesteps=TIMESTEPS)))
SWEEP = Case("samplers", build_sd, (text(),))
TABLE = {case.name: case for case in (*CASES.values(), SWEEP, CUSTOM)}

BRIEF = 2
"""Steps that show whether a pipeline is left as it was."""


class Ready(NamedTuple):
    pipe: Any
    expected: list[torch.Tensor]
    moments: list[list[float]]
    """Time steps of each call's run."""
    brief: list[torch.Tensor]
    """What each call draws in `BRIEF` steps."""


@lru_cache(maxsize=1)
def prepare(case: str, sampler: str) -> Ready:
    """A case's pipeline and what it draws without a plan."""
    pipe = TABLE[case].build(SAMPLERS[sampler].make(**TABLE[case].schedule))
    ready = Ready(pipe, [], [], [])
    for call in TABLE[case].calls:
        ready.expected.append(draw(pipe, call))
        ready.moments.append(pipe.scheduler.timesteps.tolist())
        ready.brief.append(draw(pipe, call, BRIEF))
    return ready


def make_cell(case: Case, sampler: str, plan: str) -> Any:
    return pytest.param(case.name, sampler, plan, id=f"{case.name}-{sampler}-{plan}")


PLANS_OF_TIME = ("reuse", "forecast")
WHOLE = ("ddim", "heun", "pndm")
"""A sampler of each way to map calls to steps: samplers differ in nothing else that plans see."""


def list_cells() -> list[Any]:
    cells = [
        make_cell(case, sampler, plan)
        for case in CASES.values()
        for sampler in case.samplers
        for plan in case.plans
    ]
    for sampler in SAMPLERS.values():
        # What follows from the order of calls, and what from the times of the sampler's own.
        plans = ("full", "reuse", "forecast", "gate") if sampler.name in WHOLE else PLANS_OF_TIME
        cells += [make_cell(SWEEP, sampler.name, plan) for plan in plans]
        if sampler.custom:
            cells.append(make_cell(CUSTOM, sampler.name, "reuse"))
    return cells


@pytest.mark.parametrize(("case_name", "sampler_name", "plan_name"), list_cells())
def test_conformance(case_name: str, sampler_name: str, plan_name: str) -> None:
    case, sampler = TABLE[case_name], SAMPLERS[sampler_name]
    pipe, plain, moments, brief = prepare(case_name, sampler_name)
    anatomy = read_anatomy(pipe.unet)
    plan = PLANS[plan_name](anatomy.up_blocks)
    predicted = [
        predict(plan, anatomy, sampler, call, each)
        for call, each in zip(case.calls, moments, strict=True)
    ]
    expected = plain
    if plan_name != "full":
        expected = []
        for call, calls in zip(case.calls, predicted, strict=True):
            with overwrite(pipe, anatomy, calls):
                expected.append(draw(pipe, call))

    first = []
    with leansd.inherit(pipe, plan), watch_stores() as stores, watch_ends() as left:
        for number, call in enumerate(case.calls):
            with count_calls(pipe.unet, anatomy) as counts, count_control(pipe) as control:
                first.append(draw(pipe, call))
            assert counts == count_predicted(predicted[number]), f"call {number}"
            if hasattr(pipe, "controlnet"):
                due = case.controls or sum(map(runs_control, predicted[number]))
                assert len(control) == (len(predicted[number]) if plan_name == "full" else due)
        again = draw(pipe, case.calls[0])
        assert bool(stores) == (plan_name != "full")
        assert all(map(is_empty, stores))
        # SDXL's inpainting gives latents away before the end of a call that diffusers tells of.
        assert left in ([0] * (len(case.calls) + 1), [])

    for number, latents in enumerate(first):
        assert latents.isfinite().all()
        if plan_name in FORECASTS:
            # The reference finds the weights of its line by another library's interpolation.
            assert torch.allclose(latents, expected[number], rtol=1e-3, atol=1e-4), f"call {number}"
        else:
            assert torch.equal(latents, expected[number]), f"call {number}"
        departs = not all(call.is_full for call in predicted[number])
        assert torch.equal(latents, plain[number]) != departs, f"call {number}"
    assert torch.equal(again, first[0])
    assert is_plain(pipe.unet)
    assert "forward" not in vars(getattr(pipe, "controlnet", pipe.unet))
    for call, latents in zip(case.calls, brief, strict=True):
        assert torch.equal(draw(pipe, call, BRIEF), latents), "after leaving"


def test_every_sampler_takes_five_steps() -> None:
    """The table's own claims about how many UNet calls a sampler makes."""
    for sampler in SAMPLERS.values():
        scheduler = sampler.make()
        scheduler.set_timesteps(STEPS)
        assert len(scheduler.timesteps) == len(sampler.rows(STEPS)), sampler.name
