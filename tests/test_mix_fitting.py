"""Mixes fitted: a plan as a matrix is what a run does, and the fit brings it nearer."""

import math
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler

import leansd
from leansd.anatomy.builtin import open_builtin
from leansd.errors import LeansdError
from leansd.evaluation.cost import CostModel
from leansd.evaluation.runs import CallSet, run_calls
from leansd.plans.plan import Plan
from leansd.tuning import Front, mix_fitting, mixing, tuner
from leansd.tuning.host import PipelineHost
from leansd.tuning.mix_fitting import FitState, MixConfig, MixFit
from leansd.tuning.mixing import Nearness, PlanMixer, list_starts
from leansd.tuning.run_starts import record_starts
from leansd.tuning.sampler_map import PlanMap, explain_unfit, read_sampler
from leansd.tuning.trials import Journal
from test_tuning import SAMPLERS, make_cost, make_scheduler
from tiny import shallow_unet, tiny_pipeline, tiny_scheduler

STEPS = 8
PROMPTS = ("a boat", "a tree", "a cat", "a house")
PLAN = Plan.between([0, 1, 3, 6], cut="head", steps=STEPS, how="forecast2").correct(
    {3: (0.3, 0.1), 6: (-0.2, 0.2)}
)


@pytest.fixture(scope="module")
def cost() -> CostModel:
    """Made-up seconds: a loaded machine must not decide what can be reached."""
    anatomy = leansd.dissect(make_pipe().unet)
    return make_cost(anatomy)


@cache
def make_pipe(sampler: str = "dpm++2m") -> Any:
    return tiny_pipeline(unet=shallow_unet(), scheduler=make_scheduler(sampler))


def make_fit(sampler: str = "dpm++2m", scale: float = 3.0, **config: Any) -> MixFit:
    pipe = make_pipe(sampler)
    starts, _ = record_starts(
        pipe, CallSet(PROMPTS, seed=0, batch=4, settings={"guidance_scale": scale}), STEPS
    )
    plan = PlanMap.of(PLAN, read_sampler(pipe.scheduler, STEPS), leansd.dissect(pipe.unet))
    return MixFit(pipe.unet, plan, starts, config=MixConfig(**{"batch": 2, "rate": 0.05} | config))


def draw(sampler: str, plan: Plan, scale: float = 3.0) -> torch.Tensor:
    settings = {"guidance_scale": scale}
    return run_calls(make_pipe(sampler), CallSet(PROMPTS, settings=settings), STEPS, plan).latents


def take_through(fit: MixFit) -> torch.Tensor:
    """The last latents by the matrix."""
    fit.measure_spans()
    rows = fit._make_rows(torch.zeros(fit.size, dtype=torch.float64))
    with torch.no_grad():
        return fit.roll_out(fit._gather(range(len(PROMPTS))), rows)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_a_plan_is_its_matrix_and_its_mixes(sampler: str, scale: float) -> None:
    """Through the pipeline, as a matrix, and with the matrix's mixes instead of corrections."""
    expected = draw(sampler, PLAN, scale)
    fit = make_fit(sampler, scale)
    near = {"atol": 2e-4 * float(expected.abs().max())}
    assert torch.allclose(take_through(fit), expected, **near)
    mixed = fit.build_plan(FitState.begin(fit.size))
    assert len([row for row in mixed.rows if row.mix is not None]) == len(PLAN.keys)
    assert torch.allclose(draw(sampler, mixed, scale), expected, **near)


@pytest.mark.parametrize(("floor", "lanes"), [(0.0, True), (1e-3, True), (0.0, False)])
def test_a_fit_brings_the_last_latents_nearer(floor: float, lanes: bool) -> None:
    """On the pictures that it is fitted on, where the pipeline itself draws them."""
    full = draw("dpm++2m", Plan.full(STEPS))
    fit = make_fit(iterations=12, floor=floor, lanes=lanes)
    told: list[float] = []
    mixed = fit.run(watch=lambda state, error: told.append(error))
    assert len(told) == 12

    def miss(plan: Plan) -> float:
        errors = (draw("dpm++2m", plan) - full).square().mean(dim=(1, 2, 3))
        return float(errors.log().mean())

    assert miss(mixed) < miss(PLAN) - 0.5
    assert any(row.mix.difference for row in mixed.rows if row.mix is not None) == lanes


def test_a_stopped_fit_goes_on_to_the_same_end_in_whatever_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A saved state goes on as if never stopped; computing twice gives the same gradients."""
    whole = make_fit(iterations=4).run()
    states: list[dict[str, Any]] = []
    first = make_fit(iterations=4)
    first.run(watch=lambda state, error: states.append(state.encode()))
    need = first.plan_memory()
    monkeypatch.setattr(mix_fitting, "find_free_memory", lambda device: need.bytes * 0.4)
    rest = make_fit(iterations=4)
    assert rest.plan_memory().recomputes
    rest.measure_spans()
    again = rest.run(FitState.decode(states[1]))
    for one, other in zip(whole.rows, again.rows, strict=True):
        assert one.correct.numbers == pytest.approx(other.correct.numbers, rel=1e-3, abs=1e-4)
    monkeypatch.setattr(mix_fitting, "find_free_memory", lambda device: 10)
    with pytest.raises(LeansdError, match="memory does not suffice"):
        make_fit().plan_memory()
    assert all(each.requires_grad for each in make_pipe().unet.parameters())


@pytest.mark.parametrize(
    ("scheduler", "why"),
    [
        (DDIMScheduler.from_config(tiny_scheduler().config, clip_sample=True), "not linear"),
        (EulerAncestralDiscreteScheduler.from_config(tiny_scheduler().config), "adds noise"),
        (HeunDiscreteScheduler.from_config(tiny_scheduler().config), "more than once"),
    ],
)
def test_samplers_that_are_no_sum_are_refused(scheduler: Any, why: str) -> None:
    with pytest.raises(LeansdError, match=why):
        read_sampler(scheduler, STEPS)


def test_plans_that_do_more_than_forecast_whole_steps_are_left_as_they_are() -> None:
    assert not explain_unfit(PLAN)
    for plan in (
        Plan.every(2, cut="up0", steps=STEPS),
        Plan.every(2, cut="head", steps=STEPS, how="residual"),
        PLAN.guide("inherit", at=1),
        PLAN.guard("sample", threshold=0.1),
        PLAN.switch("light", at=2),
    ):
        assert explain_unfit(plan)


def test_a_full_run_that_is_no_number_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline(unet=shallow_unet())
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(np.nan)
    with pytest.raises(LeansdError, match="NaN"):
        record_starts(pipe, CallSet(PROMPTS[:1], seed=0, batch=1, settings={}), 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gigabytes", "extra"),
    [("sd15", 8, {}), ("sdxl", 16, {"text_embeds": (2, 1280), "time_ids": (2, 6)})],
)
def test_published_unets_are_fitted_in_the_memory_of_common_cards(
    name: str, gigabytes: float, extra: dict[str, tuple[int, int]]
) -> None:
    """A dry run in half precision: weights, and what the gradient of a call keeps."""
    unet = open_builtin(name).half().requires_grad_(False)
    config: Any = unet.config
    with torch.device("meta"):
        sample = torch.zeros(2, 4, config.sample_size, config.sample_size, dtype=torch.half)
        text = torch.zeros(2, 77, config.cross_attention_dim, dtype=torch.half)
        added = {key: torch.zeros(*size, dtype=torch.half) for key, size in extra.items()}
        step = torch.tensor(5)
    sample.requires_grad_()
    free = gigabytes * 1e9 - sum(each.nbytes for each in unet.parameters())
    spending = mix_fitting.choose_spending(
        unet,
        lambda: unet(sample, step, text, added_cond_kwargs=added, return_dict=False),
        8,
        10,
        free * mix_fitting.RESERVE,
    )
    assert spending.pictures == 1
    assert spending.recomputes
    assert not unet.is_gradient_checkpointing


# -- as part of tuning -----------------------------------------------------------------------------

MANY = tuple(
    f"a {thing}" for thing in ["boat", "tree", "cat", "house", "key", "cup", "moon", "road"]
)


def tune_with_mixes(cost: CostModel, **options: Any) -> Front:
    arguments: dict[str, Any] = {
        "steps": STEPS,
        "settings": {"guidance_scale": 3.0},
        "speeds": [2.0],
        "tries": 0,
        "grids": (1.0,),
        "batch": 4,
        "mixes": MANY * 3,
    }
    return leansd.tune(make_pipe(), MANY[:4], cost=cost, **(arguments | options))


def test_tuning_fits_mixes_and_goes_on_where_it_was_stopped(
    cost: CostModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What helps on calls that had no part in it is a point of its own; it says how long it is."""
    quick = partial(MixConfig, iterations=10, rate=0.05, batch=4)
    monkeypatch.setattr(tuner, "MixConfig", quick)
    journal = tmp_path / "journal.jsonl"
    told: list[str] = []

    def stop(text: str, share: float) -> None:
        told.append(text)
        if ": 7 of 10" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_with_mixes(cost, tell=stop, journal=journal)
    before = len(told)
    front = tune_with_mixes(cost, tell=lambda text, share: told.append(text), journal=journal)
    after = [text for text in told[before:] if "min left" in text]
    assert after[0].startswith("mixes of tuned 2x: 6 of 10")
    assert any("GiB" in text for text in told)
    mixed = [point for point in (*front.points, *front.dominated) if point.plan.mixes]
    helped = "mixes of tuned 2x help" in told
    assert len(mixed) == helped
    assert all(point.plan.tuned is not None for point in mixed)
    again: list[str] = []
    tune_with_mixes(cost, tell=lambda text, share: again.append(text), journal=journal)
    assert not any("min left" in text for text in again)


def test_a_fit_begins_with_lines_where_steps_lie_close_and_with_plain_ones_where_they_do_not():
    tuned = {calls: Plan.between(range(calls), cut="head", steps=30) for calls in (5, 8, 10, 15)}
    starts = {calls: list_starts(plan, 30) for calls, plan in tuned.items()}
    assert all(starts[calls][0] is plan for calls, plan in tuned.items())
    assert [(plan.steps, plan.keys) for plan in starts[5][1:]] == [(5, tuple(range(5)))]
    assert starts[8][1:] == []
    assert [plan.keys for plan in starts[10][1:]] == [
        (0, 3, 6, 9, 12, 16, 20, 24, 28, 29),
        (0, 3, 6, 9, 12, 15, 18, 21, 24, 28),
    ]
    already = Plan.between(range(15), cut="head", steps=30, how="forecast")
    assert list_starts(already, 30) == [already]
    ends = [29, 28]
    for lines, end in zip(starts[15][1:], ends, strict=True):
        assert (lines.steps, len(lines.keys), lines.keys[-1]) == (30, 15, end)
        assert {row.inherit["head"] for row in lines.rows if not row.is_key} == {"forecast"}


def test_what_ends_with_an_output_of_no_weight_is_left_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the last noise level is the one before it, DDIM's last output does nothing."""
    scheduler = DDIMScheduler.from_config(
        tiny_scheduler().config, set_alpha_to_one=False, timestep_spacing="linspace"
    )
    pipe = tiny_pipeline(unet=shallow_unet(), scheduler=scheduler)
    host = PipelineHost(pipe, 4, {}, {}, "ddim")
    mixer = PlanMixer(host, MANY * 3, 0, 10, Journal(None, ""))
    assert read_sampler(pipe.scheduler, 10).weighed == 9
    begun: list[Plan] = []
    monkeypatch.setattr(mixer, "_mix", lambda start, say: begun.append(start) or start)
    monkeypatch.setattr(mixer, "_measure", lambda plan: Nearness(40, 35))
    for keys in ([0, 1, 2, 5, 9], [0, 1, 2, 5, 8], [0, 9]):
        plan = Plan.between(keys, cut="head", steps=10)
        assert mixer.improve(plan, lambda text, share: None) is None
    lines = [(0, 2, 4, 7, 8), (0, 1, 3, 5, 7)]
    assert [plan.keys for plan in begun] == [*lines, (0, 1, 2, 5, 8), *lines]
    late = PlanMap.of(
        Plan.between([0, 9], cut="head", steps=10), read_sampler(scheduler, 10), host.anatomy
    )
    with pytest.raises(LeansdError, match="gives the output of step 9 no weight"):
        MixFit(pipe.unet, late, ())


@pytest.mark.parametrize(
    ("by_plan", "by_lines", "chosen"),
    [
        ((41, 36), (42, 36), 1),
        ((42, 36), (41, 36), 0),
        ((43, 34), (41, 36), 1),
        ((43, 34), (39, 37), None),
    ],
)
def test_of_mixes_that_gain_by_both_means_the_nearer_are_kept(
    monkeypatch: pytest.MonkeyPatch, by_plan: Any, by_lines: Any, chosen: int | None
) -> None:
    plan = Plan.between([0, 1, 2, 5, 9], cut="head", steps=10, name="tuned")
    mixed = [plan.rename("by plan"), plan.rename("by lines"), plan]
    near = {"tuned": Nearness(40, 35), "by plan": Nearness(*by_plan)}
    near["by lines"] = Nearness(*by_lines)
    host = PipelineHost(make_pipe(), 4, {}, {}, "dpm++2m")
    mixer = PlanMixer(host, MANY * 3, 0, 10, Journal(None, ""))
    rest = iter(mixed)
    monkeypatch.setattr(mixer, "_mix", lambda start, say: next(rest))
    monkeypatch.setattr(mixer, "_soften", lambda start, mixed: [mixed])
    monkeypatch.setattr(mixer, "_measure", lambda plan: near[plan.name])
    found = mixer.improve(plan, lambda text, share: None)
    assert found is (None if chosen is None else mixed[chosen])


def test_less_of_a_fit_is_taken_where_all_of_it_loses_the_hard_pictures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between two plans whose errors point different ways there is one that beats both."""
    fit = make_fit(iterations=10)
    host = PipelineHost(make_pipe(), 4, {"guidance_scale": 3.0}, {}, "dpm++2m")
    mixer = PlanMixer(host, PROMPTS, 0, STEPS, Journal(None, ""))
    mixed = fit.run()
    every = list(mixer._soften(PLAN, mixed))
    assert every[0] is mixed
    begun, ended = draw("dpm++2m", PLAN), draw("dpm++2m", mixed)
    away = [float((draw("dpm++2m", each) - begun).norm()) for each in every]
    assert away == sorted(away, reverse=True)
    assert math.isclose(away[2], float((ended - begun).norm()) / 2, rel_tol=0.1)
    bars = iter([Nearness(40, 35), Nearness(44, 34), Nearness(43, 35), Nearness(42, 36)])
    monkeypatch.setattr(mixer, "_mix", lambda start, say: mixed)
    monkeypatch.setattr(mixer, "_measure", lambda plan: next(bars))
    monkeypatch.setattr(mixing, "list_starts", lambda plan, weighed: [plan])
    assert mixer.improve(PLAN, lambda text, share: None) == every[2]


@pytest.mark.parametrize(
    ("mixes", "why"),
    [(5, "5 calls are too few"), (40, "repeat 3 prompts"), (MANY[:7] * 4, "repeat 7 prompts")],
)
def test_too_few_calls_are_told_before_anything_runs(cost: CostModel, mixes: Any, why: str) -> None:
    with pytest.raises(LeansdError, match=why):
        tune_with_mixes(cost, mixes=mixes)
