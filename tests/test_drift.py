"""Drift: what is constant does not drift, and one-step errors are those of a real one step."""

import pytest
import torch

import leansd
from leansd.errors import LeansdError
from leansd.evaluation.records import Record
from leansd.evaluation.runs import CallSet, run_calls
from leansd.tuning.drift import measure_drift
from leansd.tuning.host import tap
from tiny import tiny_pipeline

STEPS = 5
CALLS = ("a boat", "a tree", "a cat")
PLAIN = {"guidance_scale": 1.0}


def find(records: list[Record], metric: str, **fields) -> dict[int, float]:
    """Values by step."""
    return {
        (record.__pydantic_extra__ or {})["step"]: record.value
        for record in records
        if record.metric == metric and fields.items() <= record.model_dump().items()
    }


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_pipeline()
    # A first layer that does not look at its input: its output is the same at every step.
    torch.nn.init.zeros_(pipe.unet.conv_in.weight)
    return pipe


@pytest.fixture(scope="module")
def records(pipe) -> list[Record]:
    return measure_drift(pipe, CallSet(CALLS, seed=3, batch=2), STEPS, cuts=["up2"], subject="tiny")


def test_a_constant_unit_does_not_drift_and_others_do(records) -> None:
    for lane in ("rest", "cond"):
        assert find(records, "unit_drift", at="stem", lane=lane) == dict.fromkeys(range(1, 5), 0.0)
        for at in ("dn0.l0.res", "mid.l0.attn", "up3.l2.attn", "head"):
            drift = find(records, "unit_drift", at=at, lane=lane)
            assert list(drift) == [1, 2, 3, 4]
            assert all(value > 0 for value in drift.values())
    assert all(value > 0 for value in find(records, "guidance_drift").values())


def test_every_unit_of_every_step_is_on_record(records, pipe) -> None:
    units = {record.at for record in records if record.metric == "unit_drift"}
    assert units == set(leansd.dissect(pipe.unet).addresses)
    assert list(find(records, "cut_error", at="up2", how="reuse", gap=3)) == [3, 4]
    assert list(find(records, "cut_error", at="up2", how="forecast", gap=2)) == [4]
    assert list(find(records, "cut_error", at="up2", how="forecast2", gap=1)) == [3, 4]


def test_the_error_of_repeating_the_output_is_that_of_the_scheduler_s_input() -> None:
    pipe = tiny_pipeline()
    drift = measure_drift(pipe, CallSet(CALLS, seed=3, batch=2, settings=PLAIN), STEPS)
    with tap(pipe.scheduler) as runs:
        run_calls(pipe, CallSet(CALLS, seed=3, batch=2, settings=PLAIN), STEPS)
    for gap in (1, 2, 3):
        found = find(drift, "cut_error", at="head", how="reuse", gap=gap)
        for step in range(gap, STEPS):
            now = torch.cat([run[step].output for run in runs]).double()
            then = torch.cat([run[step - gap].output for run in runs]).double()
            assert found[step] == pytest.approx(float((then - now).norm() / now.norm()), rel=1e-5)
    assert find(drift, "guidance_drift") == {}


@pytest.mark.parametrize("how", ["reuse", "forecast"])
def test_the_error_of_a_cut_is_that_of_a_plan_s_step(how) -> None:
    """Up to the step that inherits, a plan's run is the full one."""
    pipe = tiny_pipeline()
    drift = measure_drift(pipe, CallSet(CALLS, seed=3, settings=PLAIN), STEPS, cuts=["up1"])
    plan = leansd.Plan.full(STEPS).inherit("up1", at=3, how=how)
    outputs = []
    for each in (None, plan):
        with tap(pipe.scheduler) as runs:
            run_calls(pipe, CallSet(CALLS, seed=3, settings=PLAIN), STEPS, each)
        outputs.append(runs[0][3].output.double())
    full, cut = outputs
    error = float((cut - full).norm() / full.norm())
    assert error > 0
    found = find(drift, "cut_error", at="up1", how=how, gap=1)
    assert found[3] == pytest.approx(error, rel=1e-4)


def test_watchers_of_a_scheduler_nest_and_leave_in_any_order(pipe) -> None:
    before = run_calls(pipe, CallSet(CALLS[:1]), 2).latents
    outer = tap(pipe.scheduler)
    inner = tap(pipe.scheduler, lambda run, index, seen, step: seen.output)
    first, second = outer.__enter__(), inner.__enter__()
    assert torch.equal(run_calls(pipe, CallSet(CALLS[:1]), 2).latents, before)
    outer.__exit__(None, None, None)
    assert torch.equal(run_calls(pipe, CallSet(CALLS[:1]), 2).latents, before)
    inner.__exit__(None, None, None)
    assert [len(first), len(second)] == [1, 2]
    assert "step" not in vars(pipe.scheduler)
    assert torch.equal(run_calls(pipe, CallSet(CALLS[:1]), 2).latents, before)


def test_the_run_that_is_watched_is_the_full_run(pipe) -> None:
    before = run_calls(pipe, CallSet(CALLS[:1]), STEPS).latents
    forwards = [vars(module).get("forward") for module in pipe.unet.modules()]
    with tap(pipe.scheduler) as runs:
        measure_drift(pipe, CallSet(CALLS[:1]), STEPS)
    assert torch.equal(runs[0][-1].previous, before)
    assert [vars(module).get("forward") for module in pipe.unet.modules()] == forwards


def test_drift_under_a_plan_is_refused(pipe) -> None:
    with leansd.inherit(pipe, "balanced"), pytest.raises(LeansdError, match="full runs"):
        measure_drift(pipe, CallSet(CALLS), STEPS)
