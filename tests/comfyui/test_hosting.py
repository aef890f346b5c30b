"""Tuning in ComfyUI's samplers: what they make of outputs, and plans found by running them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from integrations.comfyui.hosting import SamplerHost, TuneWish, tune_sampler

from comfyui.double import (
    CONST,
    Guider,
    Patcher,
    Sampler,
    cond,
    lay_out,
    sample_ancestral,
    sample_crooked,
    sample_euler,
    sample_heun,
    sample_pp,
)
from leansd.errors import LeansdError
from leansd.evaluation.cost import CostModel
from leansd.evaluation.fidelity import psnr
from leansd.plans import Plan

STEPS = 12


class TimedHost(SamplerHost):
    """One where a call takes so long, whatever the machine does."""

    def measure_cost(self, seed: int = 0) -> CostModel:
        measured = super().measure_cost(seed)
        units = {"head": {"whole": 0.1, "none": 0.0}}
        return replace(measured, units=units, fixed={"whole": 0.0, "none": 0.001})


def open_host(sampler: Any = sample_euler, noise: Any = None) -> tuple[SamplerHost, Patcher]:
    patcher = Patcher(noise=noise)
    most = 1.0 if noise is not None else 14.6

    def draw(model: Any, seed: int, sigmas: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        guider = Guider(model, [cond(0.4)], [cond(-0.3)])
        return guider.sample(noise, Sampler(sampler), sigmas, seed=seed)

    host = TimedHost(
        patcher, Sampler(sampler), lay_out(STEPS, most, 0.03), 4.0, draw, digest="0123456789abcdef",
        thin_out=lambda sigmas, steps: lay_out(steps, most, 0.03),
    )  # fmt: skip
    return host, patcher


@pytest.mark.parametrize("sampler", [sample_euler, sample_ancestral])
@pytest.mark.parametrize("noise", [None, CONST()])
def test_a_response_tells_the_latents_of_any_run(sampler: Any, noise: Any) -> None:
    """From the latents that a run began with and its outputs: those before every call follow."""
    host, _ = open_host(sampler, noise)
    course = host.respond(STEPS)
    _, (run,) = host.draw(["one"], STEPS, seed=3)
    other_plan = Plan.full(STEPS).inherit("head", at=[3, 5, 6, 9], how="forecast")
    _, (other,) = host.draw(["one"], STEPS, other_plan, seed=3)
    for index in range(STEPS):
        change = sum(
            float(course.response[index + 1][at]) * (other[at].output - run[at].output)
            for at in range(index + 1)
        )
        expected = run[index].previous + change
        assert torch.allclose(other[index].previous, expected, atol=2e-4)
    assert not torch.allclose(other[-1].previous, run[-1].previous, atol=1e-2)
    assert np.all(np.diff(course.log_snr) > 0)


def test_what_a_sampler_would_make_of_another_output_is_known_before() -> None:
    host, _ = open_host()
    _, (run,) = host.draw(["one"], STEPS, seed=3)
    foreseen: list[torch.Tensor] = []

    def steer(run: int, index: int, seen: Any, step: Any) -> torch.Tensor:
        other = seen.output * (1.1 if index == 4 else 1)
        foreseen.append(step(other))
        return other

    _, (steered,) = host.draw(["one"], STEPS, seed=3, steer=steer)
    for expected, seen in zip(foreseen, steered, strict=True):
        assert torch.allclose(expected, seen.previous, atol=2e-4)
    assert torch.allclose(steered[3].sample, run[3].sample, atol=1e-4)


@pytest.mark.parametrize(
    ("sampler", "why"),
    [
        (sample_heun, "one call a step"),
        (sample_crooked, "not linear"),
        (sample_pp, "unconditional part"),
    ],
)
def test_samplers_that_cannot_be_tuned_for_are_refused(sampler: Any, why: str) -> None:
    host, patcher = open_host(sampler)
    with pytest.raises(LeansdError, match=why):
        tune_sampler(host, TuneWish(), None, lambda text, share: None)
    assert patcher.denoiser.calls == 0


@pytest.mark.parametrize("sampler", [sample_euler, sample_ancestral])
def test_a_tuned_plan_is_nearer_than_untuned_ones_and_fewer_steps(
    sampler: Any, tmp_path: Path
) -> None:
    host, patcher = open_host(sampler)
    told: list[tuple[str, float]] = []
    wish = TuneWish(speed=2.0, seeds=6, tries=2)
    journal = tmp_path / "journal.jsonl"
    plan, _ = tune_sampler(host, wish, journal, lambda *each: told.append(each))
    assert plan.tuned == host.tuned
    assert 5 <= len(plan.keys) <= 7
    assert told[-1][1] == 1.0

    calls = ["one", "two", "three"]
    full, _ = host.draw(calls, STEPS, seed=500)

    def judge(plan: Plan, steps: int = STEPS) -> float:
        return float(
            psnr(host.draw(calls, steps, plan, seed=500)[0].pictures, full.pictures).mean()
        )

    computed = len(plan.keys)
    spread = sorted({round(place * (STEPS - 1) / (computed - 1)) for place in range(computed)})
    assert judge(plan) > judge(Plan.between(spread, cut="head", steps=STEPS, how="reuse")) + 3
    assert judge(plan) > judge(Plan.full(computed), computed)

    # Stopped and taken up again, nothing is tried twice.
    before = patcher.denoiser.calls
    again, _ = tune_sampler(host, wish, journal, lambda *each: None)
    assert again.steps == plan.steps
    assert patcher.denoiser.calls - before < 0.75 * before


def test_the_fastest_plan_that_keeps_so_many_db() -> None:
    host, _ = open_host()
    plan, front = tune_sampler(host, TuneWish(least_psnr=30.0, tries=0), None, lambda *_: None)
    point = next(each for each in front.points if each.plan == plan)
    assert point.psnr >= 30
    with pytest.raises(LeansdError, match="no tuned plan reaches 200 dB"):
        front.at(psnr=200.0)


def test_an_interruption_ends_a_tuning(tmp_path: Path) -> None:
    host, patcher = open_host()
    patcher.denoiser.fails_at = 100
    with pytest.raises(torch.OutOfMemoryError):
        tune_sampler(host, TuneWish(tries=0), tmp_path / "journal.jsonl", lambda *_: None)
