"""Tuning: the error model is what schedulers do, the search is the best there is, runs agree."""

import copy
import itertools
import json
import math
import random
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionControlNetPipeline,
)

import leansd
from conformance.models import tiny_controlnet
from leansd.anatomy.reading import fingerprint_module
from leansd.errors import LeansdError
from leansd.evaluation.cost import CostModel
from leansd.evaluation.fidelity import psnr
from leansd.evaluation.runs import CallSet, run_calls
from leansd.loading import as_image_to_image
from leansd.plans.anatomy import WHOLE, Anatomy
from leansd.plans.methods import METHODS, weigh
from leansd.plans.plan import Plan, Tuned
from leansd.plans.row import NO_CORRECTION, Correction
from leansd.runtime.clock import lay_out_run, read_schedule
from leansd.runtime.nets import match_nets
from leansd.tuning import Front, Point, error_model, tuner
from leansd.tuning.error_model import (
    DENOISED,
    HEAD_ACTIONS,
    LINE,
    REUSE,
    Action,
    Calibration,
    ErrorModel,
    Key,
    Keys,
    calibrate,
    find_best,
)
from leansd.tuning.host import PipelineHost, measure_course
from leansd.tuning.space import (
    DEEPEST,
    FULL,
    LINES,
    TICKS,
    Regime,
    Variant,
    _join,
    allows,
    list_noisy_regimes,
    list_regimes,
    list_variants,
    measure_deviation,
    space_evenly,
)
from leansd.tuning.trials import Journal, Trial, TrialRunner, polish, replay, try_plan
from tiny import shallow_unet, tiny_pipeline, tiny_scheduler
from watching import watch_before

STEPS = 8
PROMPTS = ("a boat", "a tree", "a cat", "a house")
SETTINGS = {"guidance_scale": 3.0}
PARABOLA = HEAD_ACTIONS[1]
SAMPLERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpm++2m": DPMSolverMultistepScheduler,
}


def make_scheduler(name: str):
    return SAMPLERS[name].from_config(tiny_scheduler().config)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(unet=shallow_unet())


@pytest.fixture(scope="module")
def cost(pipe) -> CostModel:
    return make_cost(leansd.dissect(pipe.unet))


def make_cost(anatomy: Anatomy) -> CostModel:
    """Made-up seconds: a loaded machine must not decide what can be reached."""
    return CostModel(
        subject="tiny",
        pictures=1,
        size=(32, 32),
        units={unit.at: {"whole": 14e-3, "half": 7e-3} for unit in anatomy},
        blocks={block: {"whole": 1e-4, "half": 1e-4} for block in anatomy.blocks},
        fixed={"whole": 1e-3, "half": 1e-3, "none": 1e-4},
        other=1e-2,
        per_step=1e-4,
    )


# -- dynamic programming ---------------------------------------------------------------------------


def list_all(count: int, longest: int, actions: Sequence[Action], variants: int):
    """Every set of key steps with every choice of actions, as `(key, end, action)` each segment.

    A segment without steps between has the first action, which does nothing there.
    """
    for size in range(1, count + 1):
        for others in itertools.combinations(range(1, count), size - 1):
            steps = (0, *others)
            ends = (*others, count)
            if any(end - step - 1 > longest for step, end in zip(steps, ends, strict=True)):
                continue
            choices = [
                actions if end - step > 1 else actions[:1]
                for step, end in zip(steps, ends, strict=True)
            ]
            for chosen in itertools.product(*choices):
                for run in itertools.product(range(variants), repeat=size):
                    keys = map(Key, steps, run)
                    yield tuple(zip(keys, ends, chosen, strict=True))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("longest", [3, 7])
@pytest.mark.parametrize("key_costs", [(5,), (5, 3)])
def test_dynamic_programming_equals_brute_force(
    seed: int, longest: int, key_costs: tuple[int, ...]
) -> None:
    count, costs = 7 if len(key_costs) == 1 else 5, {LINE: 1, PARABOLA: 2}
    draw = random.Random(seed)
    table: dict[tuple[Keys, int, Action], float] = {}

    def judge(keys: Keys, end: int, action: Action) -> float:
        if keys[0] == Key(0, 1):
            return float("inf")  # what may not be
        if end - keys[-1].step == 1 and not keys[-1].variant:
            return 0.0
        return table.setdefault((keys[-3:], end, action), draw.random())

    budgets = (6, 11, 14, 18, 23, 29, 35)
    least = dict.fromkeys(budgets, float("inf"))
    for segments in list_all(count, longest, list(costs), len(key_costs)):
        keys = tuple(key for key, _, _ in segments)
        ticks = sum(key_costs[k.variant] + (e - k.step - 1) * costs[a] for k, e, a in segments)
        error = sum(judge(keys[: i + 1][-3:], e, a) for i, (_, e, a) in enumerate(segments))
        for budget in budgets:
            if ticks <= budget:
                least[budget] = min(least[budget], error)
    found = find_best(count, judge, costs, key_costs, budgets, longest=longest)
    errors = [proposal.error if proposal else float("inf") for proposal in found]
    assert errors == pytest.approx(list(least.values()))
    assert find_best(count, judge, costs, key_costs, [-1], longest=longest) == [None]
    for budget, proposal in zip(budgets, found, strict=True):
        if proposal is None:
            continue
        parts = [(s.key, s.end, s.action) for s in proposal.segments]
        again = sum(judge(proposal.keys[: i + 1][-3:], e, a) for i, (_, e, a) in enumerate(parts))
        assert again == pytest.approx(proposal.error)
        ticks = sum(key_costs[k.variant] + (e - k.step - 1) * costs[a] for k, e, a in parts)
        assert ticks == proposal.ticks <= budget
        assert [k.step for k, _, _ in parts] == [0, *(e for _, e, _ in parts[:-1])]
        assert parts[-1][1] == count


# -- what a scheduler does -------------------------------------------------------------------------


def follow(scheduler, outputs: torch.Tensor, sample: torch.Tensor) -> list[torch.Tensor]:
    """The sample before every call and after the last, for outputs [n, ...] given whatever comes.

    Starts from `sample` [...], which is not scaled.
    """
    samples = [sample]
    for timestep, output in zip(scheduler.timesteps, outputs, strict=True):
        samples.append(scheduler.step(output, timestep, samples[-1], return_dict=False)[0])
    return samples


def measure_response(name: str) -> np.ndarray:
    scheduler = make_scheduler(name)
    return measure_course(scheduler, read_schedule(lay_out_run(scheduler, STEPS))).response


@pytest.mark.parametrize("name", SAMPLERS)
def test_response_is_what_the_scheduler_does(name: str) -> None:
    torch.manual_seed(0)
    outputs = torch.randn(STEPS, 1, 4, 3, 3, dtype=torch.float64)
    start = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    response = torch.from_numpy(measure_response(name))
    runs = []
    for given in (outputs, torch.zeros_like(outputs)):
        scheduler = make_scheduler(name)
        scheduler.set_timesteps(STEPS)
        runs.append(torch.stack(follow(scheduler, given, start)))
    whole, unmoved = runs
    predicted = torch.tensordot(response, outputs, 1) + unmoved
    assert torch.allclose(whole.double(), predicted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(whole.double(), unmoved, rtol=1e-2)


def make_calibration(name: str) -> Calibration:
    """What would be seen of a full run, were the UNet not to answer; without its outputs."""
    scheduler = make_scheduler(name)
    scheduler.set_timesteps(STEPS)
    return Calibration(
        steps=STEPS,
        log_snr=np.array(read_schedule(scheduler).log_snr),
        response=measure_response(name),
        error_gain=np.ones(STEPS + 1),
        runs=(),
        finals=None,  # pyright: ignore[reportArgumentType]
    )


def make_model(name: str, outputs: torch.Tensor) -> ErrorModel:
    """The error model of a full run with these outputs [n, ...]."""
    flat = outputs.reshape(STEPS, -1)
    return ErrorModel(make_calibration(name), (flat @ flat.T / flat.shape[1]).numpy())


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("action", [*HEAD_ACTIONS, REUSE])
def test_the_error_of_a_stretch_is_what_the_scheduler_makes_of_forecasts(
    name: str, action: Action
) -> None:
    torch.manual_seed(1)
    outputs = torch.randn(STEPS, 1, 4, 3, 3, dtype=torch.float64)
    model = make_model(name, outputs)
    log_snr = model.calibration.log_snr.tolist()
    keys, end = (0, 1, 3), 6
    known = keys[-METHODS[action.how].depth :]

    def forecast(step: int, known: Sequence[int] = known) -> torch.Tensor:
        points = [log_snr[key] for key in known]
        weights = [weigh(log_snr[step], point, points) for point in points]
        return torch.tensordot(torch.tensor(weights).double(), outputs[list(known)], 1)

    def run(correct: Correction | None) -> torch.Tensor:
        """The sample after the key step, the outputs of the segment being forecast."""
        given = outputs.clone()
        if correct is not None:
            given[4], given[5] = forecast(4), forecast(5)
            given[end] += correct.line * (outputs[end] - forecast(end, keys[-2:]))
            given[end] += correct.last * (outputs[end] - outputs[keys[-1]])
        scheduler = make_scheduler(name)
        scheduler.set_timesteps(STEPS)
        return follow(scheduler, given, torch.zeros_like(outputs[0]))[end + 1].double()

    def miss(correct: Correction) -> float:
        return float((run(correct) - run(None)).square().mean())

    judged = model.judge([Key(key) for key in keys], end, action)
    assert judged.error == pytest.approx(miss(judged.correct), rel=1e-4)
    line, last = judged.correct
    for nudge in (-0.1, -0.01, 0.01, 0.1):
        assert miss(judged.correct) < miss(Correction(line + nudge, last))
        assert miss(judged.correct) < miss(Correction(line, last + nudge))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("end", [4, 6])
def test_the_error_of_a_key_step_that_is_not_full_counts_with_its_stretch(
    name: str, end: int
) -> None:
    torch.manual_seed(2)
    outputs = torch.randn(STEPS, 1, 4, 3, 3, dtype=torch.float64)
    wrong = 0.1 * torch.randn(STEPS, 1, 4, 3, 3, dtype=torch.float64)
    calibration = make_calibration(name)
    basis = torch.cat([outputs, wrong]).reshape(2 * STEPS, -1)
    model = ErrorModel(calibration, (basis @ basis.T / basis.shape[1]).numpy())
    keys = (Key(0), Key(2, 1), Key(3, 1))
    judged = model.judge(keys, end, LINE)
    log_snr = calibration.log_snr.tolist()
    known = [outputs[2] + wrong[2], outputs[3] + wrong[3]]

    def forecast(step: int) -> torch.Tensor:
        weights = [weigh(log_snr[step], point, log_snr[2:4]) for point in log_snr[2:4]]
        return weights[0] * known[0] + weights[1] * known[1]

    given = outputs.clone()
    given[3] = known[1]
    for step in range(4, end):
        given[step] = forecast(step)
    if end > 4:
        given[end] += judged.correct.line * (outputs[end] - forecast(end))
        given[end] += judged.correct.last * (outputs[end] - known[1])
    samples = []
    for each in (given, outputs):
        scheduler = make_scheduler(name)
        scheduler.set_timesteps(STEPS)
        samples.append(follow(scheduler, each, torch.zeros_like(outputs[0]))[end + 1].double())
    assert judged.error == pytest.approx(float((samples[0] - samples[1]).square().mean()), rel=1e-4)


def test_what_is_forecast_is_the_more_wrong_the_longer_ago_it_was_computed() -> None:
    torch.manual_seed(3)
    outputs = torch.randn(STEPS, 1, 4, 3, 3, dtype=torch.float64)
    left_out = torch.randn(STEPS, 1, 4, 3, 3, dtype=torch.float64).cumsum(0)
    calibration = make_calibration("ddim")
    basis = torch.cat([outputs, left_out]).reshape(2 * STEPS, -1)
    products = (basis @ basis.T / basis.shape[1]).numpy()
    model = ErrorModel(calibration, products, forecasts=frozenset([1]))
    log_snr = calibration.log_snr.tolist()
    response = calibration.response
    for keys in ((0, 1, 2), (0, 2, 5)):
        judged = model.judge([Key(keys[0]), Key(keys[1]), Key(keys[2], 1)], keys[2] + 1, LINE)
        points = [log_snr[key] for key in keys[:2]]
        weights = [weigh(log_snr[keys[2]], point, points) for point in points]
        made_good = sum(w * left_out[key] for w, key in zip(weights, keys, strict=False))
        wrong = float((left_out[keys[2]] - made_good).square().mean())
        after = keys[2] + 2
        expected = (
            wrong * float(response[after, keys[2]]) ** 2 * float(calibration.error_gain[after])
        )
        assert judged.error == pytest.approx(expected, rel=1e-6)


def test_a_stretch_without_steps_between_costs_nothing() -> None:
    model = make_model("ddim", torch.randn(STEPS, 5, dtype=torch.float64))
    assert model.judge((Key(0), Key(1)), 2, LINE)[:2] == (0.0, NO_CORRECTION)


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        (HeunDiscreteScheduler, "more than once"),
    ],
)
def test_samplers_that_cannot_be_tuned_for_are_refused_before_anything_runs(
    cost: CostModel, monkeypatch: pytest.MonkeyPatch, scheduler: type, said: str
) -> None:
    pipe = tiny_pipeline(scheduler=scheduler.from_config(tiny_scheduler().config))
    monkeypatch.setattr(pipe.unet, "forward", lambda *_, **__: pytest.fail("the UNet ran"))
    with pytest.raises(LeansdError, match=said):
        leansd.tune(pipe, PROMPTS, steps=STEPS, cost=cost)


@pytest.mark.parametrize(("action", "last"), [(REUSE, STEPS - 2), (LINE, STEPS - 1)])
@pytest.mark.parametrize("calls", [2, 3, 5, 7, 8])
def test_even_steps_are_as_many_as_asked_for(calls: int, action: Action, last: int) -> None:
    """Lines have the last two steps computed, what is kept as it is ends before the last."""
    model = make_model("ddim", torch.randn(STEPS, 5, dtype=torch.float64))
    candidate = space_evenly(model, calls, Regime({action: 0}))
    plan = candidate.build()
    assert len(plan.keys) == calls
    assert plan.keys[-1] == max(last, calls - 1)
    gaps = [after - before for before, after in itertools.pairwise(plan.keys)]
    if action == LINE and calls > 2:
        assert gaps.pop() == 1
        assert gaps == sorted(gaps)
    assert max(gaps) - min(gaps) <= 1
    assert {row.inherit["head"] for row in plan.rows if not row.is_key} <= {action.how}
    assert math.isfinite(candidate.error)


def test_errors_of_lines_are_added_with_their_signs_and_no_correction_is_counted_on() -> None:
    """Were the UNet to give what it gave, the last latents would be known."""
    outputs = torch.randn(STEPS, 40, dtype=torch.float64)
    model = make_model("ddim", outputs)
    response = model.calibration.response
    gains = [*((response[-1, 0] / response[1:, 0]) ** 2)]
    model = replace(model, calibration=replace(model.calibration, error_gain=np.array([1, *gains])))
    keys = (0, 1, 3, 6)
    candidate = space_evenly(model, 4, LINES)
    made, place = outputs.clone(), model.calibration.log_snr
    for step in set(range(STEPS)) - set(keys):
        first, last = [key for key in keys if key < step][-2:]
        slope = (outputs[last] - outputs[first]) / (place[last] - place[first])
        made[step] = outputs[last] + slope * (place[step] - place[last])
    ends = torch.from_numpy(response[-1]) @ (made - outputs)
    moved = candidate.move(_join([Key(key) for key in keys], [LINE] * 4, STEPS))
    assert moved.error == pytest.approx(float(ends.square().mean()))


@pytest.mark.parametrize("calls", [2, 4, 6])
def test_settled_steps_are_best_of_all_that_one_move_leads_to(calls: int) -> None:
    torch.manual_seed(calls)
    model = make_model("ddim", torch.randn(STEPS, 40, dtype=torch.float64).cumsum(0))
    begun = space_evenly(model, calls, LINES)
    settled = begun.settle()
    steps = {key.step for key in settled.proposal.keys}
    assert settled.error <= begun.error
    assert (len(steps), min(steps)) == (calls, 0)
    for gone, new in itertools.product(steps - {0}, set(range(STEPS)) - steps):
        keys = [Key(step) for step in sorted(steps - {gone} | {new})]
        assert settled.move(_join(keys, [LINE] * calls, STEPS)).error >= settled.error


# -- runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_trial_is_a_run_of_the_plan_that_it_fits(pipe, name: str) -> None:
    other = tiny_pipeline(**{**pipe.components, "scheduler": make_scheduler(name)})
    host = PipelineHost(other, settings=SETTINGS)
    seen_full = calibrate(host, PROMPTS[:2], STEPS, seed=0)
    bench = TrialRunner(host, PROMPTS[:2], 0, goals=seen_full.finals)
    plan = Plan.between([0, 1, 2, 5], cut="head", steps=STEPS, how="forecast")
    seen = []
    run, score = bench.run, bench.score
    object.__setattr__(bench, "run", lambda *args: seen.append(run(*args)) or seen[-1])
    trial = try_plan(plan, bench, seen_full)
    assert all(trial.plan.rows[5].correct)
    again = run(STEPS, trial.plan)
    assert torch.allclose(again.latents, seen[0].latents, rtol=1e-3, atol=1e-3)
    assert trial.psnr == pytest.approx(score(again), abs=0.1)
    plain = run(STEPS, plan).latents
    goal = seen_full.finals.latents
    assert (again.latents - goal).square().mean() < (plain - goal).square().mean()


@pytest.mark.parametrize("how", ["forecast", "forecast2", "reuse"])
def test_a_replay_ends_where_the_plan_does_and_computes_only_its_end(pipe, how) -> None:
    host = PipelineHost(pipe, settings=SETTINGS)
    seen = calibrate(host, PROMPTS[:2], STEPS, seed=0)
    bench = TrialRunner(host, PROMPTS[:2], 0, goals=seen.finals)
    plan = Plan.between([0, 1, 3, 5, 7], cut="head", steps=STEPS, how=how)
    plan = plan.correct({3: (0.3, 0.1), 5: (-0.2, 0.2)})
    whole, past = replay(plan, bench, seen)
    goal = bench.run(STEPS, plan).latents.double().flatten()
    assert torch.allclose(whole, goal, rtol=1e-3, atol=1e-3)
    moved = plan.correct({5: (0.6, -0.1)})
    entered = []
    handle = watch_before(pipe.unet.time_embedding, lambda *_: entered.append(1))
    ended, _ = replay(moved, bench, seen, since=5, past=past)
    handle.remove()
    assert len(entered) == 3  # the first, which every run computes, and two key steps
    goal = bench.run(STEPS, moved).latents.double().flatten()
    assert torch.allclose(ended, goal, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(ended, whole, rtol=1e-2, atol=1e-2)


def test_polishing_leads_nearer_to_the_full_run(pipe) -> None:
    host = PipelineHost(pipe, settings=SETTINGS)
    seen = calibrate(host, PROMPTS[:2], STEPS, seed=0)
    bench = TrialRunner(host, PROMPTS[:2], 0, goals=seen.finals)
    plan = Plan.between([0, 1, 3, 6], cut="head", steps=STEPS, how="forecast")
    plan = plan.correct({3: 0.9, 6: -0.9})
    trial = Trial(plan, bench.score(bench.run(STEPS, plan)))
    polished = polish(trial, bench, seen)
    assert polished.psnr > trial.psnr + 0.1
    assert polished.psnr == pytest.approx(bench.score(bench.run(STEPS, polished.plan)))


def test_regimes_are_those_that_save_time_here(pipe, cost) -> None:
    anatomy = leansd.dissect(pipe.unet)
    heads, reuse, lines, cheaper, cut = list_regimes(
        cost, anatomy, [FULL, Variant("half", 9, guidance="forecast")]
    )
    assert set(heads.actions) == set(cheaper.actions) == set(HEAD_ACTIONS)
    assert set(reuse.actions) == {REUSE}
    assert set(lines.actions) == {LINE}
    assert [each.coherent for each in (heads, reuse, lines, cheaper, cut)] == [0, 0, 1, 0, 0]
    assert heads.key_costs == reuse.key_costs == (TICKS,)
    assert cheaper.key_costs == (TICKS, 9)
    (action,) = cut.actions
    assert action.cut == f"up{anatomy.up_blocks - 1}.l1"
    assert 0 < cut.actions[action] < TICKS / 2
    assert cut.key_costs == (TICKS,)


def test_with_noise_cuts_are_sought_that_save_enough_of_a_step(pipe, cost) -> None:
    kept, reused, *cuts = list_noisy_regimes(cost, leansd.dissect(pipe.unet))
    assert (set(kept.actions), set(reused.actions)) == ({DENOISED}, {REUSE})
    (costs,) = zip(*(regime.actions.values() for regime in cuts), strict=True)
    assert len(cuts) > 1
    assert list(costs) == sorted(costs)
    assert 0 < costs[0] < costs[-1] <= DEEPEST * TICKS
    assert list_noisy_regimes(cost, WHOLE) == [kept, reused]


# -- what key steps run ----------------------------------------------------------------------------


def make_light_cost(cost: CostModel) -> CostModel:
    """Half of everything."""
    units = {at: {batch: t / 2 for batch, t in times.items()} for at, times in cost.units.items()}
    return replace(cost, units=units)


def test_variants_are_those_that_save_time_here(pipe, cost) -> None:
    anatomy = leansd.dissect(pipe.unet)
    nets = match_nets(pipe.unet, {"light": shallow_unet(seed=1)}).nets
    priced = replace(cost, nets={"light": make_light_cost(cost)})
    full, light, half = list_variants(priced, anatomy, nets)
    assert full == FULL
    assert (light.net, half.guidance) == ("light", "forecast")
    assert light.ticks == pytest.approx(TICKS / 2, abs=1)
    assert 0.5 * TICKS <= half.ticks < 0.9 * TICKS
    dear = {at: dict.fromkeys(("whole", "half"), 1e-3) for at in cost.units}
    assert list_variants(replace(cost, units=dear), anatomy, {}) == (FULL,)
    variants = (full, half)
    assert not allows(variants, [Key(0), Key(1, 1)])
    assert allows(variants, [Key(0), Key(1), Key(2, 1)])
    assert not allows(variants, [Key(1), Key(2, 1), Key(3, 1)])
    plan = half.dress(light.dress(Plan.full(4), 3), 2)
    assert [row.net for row in plan.rows] == ["", "", "", "light"]
    assert plan.rows[2].guidance == "forecast"


def test_a_deviation_is_what_a_variant_gives_on_the_full_runs_latents(pipe) -> None:
    seen = calibrate(PipelineHost(pipe, settings=SETTINGS), PROMPTS[:2], STEPS, seed=0)
    twin, other = copy.deepcopy(pipe.unet), copy.deepcopy(pipe.unet)
    with torch.no_grad():
        other.conv_out.weight.mul_(1.5)
        other.conv_out.bias.mul_(1.5)
    host = PipelineHost(pipe, settings=SETTINGS, unets={"twin": twin, "other": other})
    bench = TrialRunner(host, PROMPTS[:2], 0)
    assert not measure_deviation(Variant(net="twin"), bench, seen).any()
    wrong = measure_deviation(Variant(net="other"), bench, seen)
    assert np.allclose(wrong, 0.5 * seen.outputs, rtol=1e-3, atol=1e-5)
    half = measure_deviation(Variant(guidance="forecast"), bench, seen)
    assert np.array_equal(half[0], half[1])
    assert all(row.any() for row in half)


def test_nets_are_tuned_with_all_else(pipe, cost) -> None:
    """A net as good as the pipeline's own at half the cost draws every key step."""
    priced = replace(cost, nets={"light": make_light_cost(cost)})
    front = leansd.tune(
        pipe, PROMPTS, steps=STEPS, held_out=PROMPTS, settings=SETTINGS, speeds=[1.6], grids=[1.0],
        tries=0, cost=priced, nets={"light": copy.deepcopy(pipe.unet)},
    )  # fmt: skip
    best = max(front.points, key=lambda point: point.psnr)
    assert {row.net for row in best.plan.rows if row.is_key} >= {"light"}
    assert best.psnr > 60
    alone = leansd.tune(
        pipe, PROMPTS, steps=STEPS, held_out=PROMPTS, settings=SETTINGS, speeds=[1.6], grids=[1.0],
        tries=0, cost=cost,
    )  # fmt: skip
    assert best.psnr > max(point.psnr for point in alone.points) + 3


def give_profile(monkeypatch, cost: CostModel) -> list[dict]:
    """Let nothing be timed; gives the calls that would have been."""
    profiled: list[dict] = []

    def profile(_, call, **__) -> CostModel:
        profiled.append(call)
        return cost

    monkeypatch.setattr(tuner, "profile", profile)
    return profiled


@pytest.mark.slow
def test_image_to_image_is_tuned_for_the_steps_that_it_takes(
    quick, pipe, cost, monkeypatch
) -> None:
    pictures = torch.rand(4, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    calls = [
        {"prompt": prompt, "image": picture}
        for prompt, picture in zip(PROMPTS, pictures, strict=True)
    ]
    other = as_image_to_image(pipe)
    other.scheduler = make_scheduler("dpm++2m")
    settings = {**SETTINGS, "strength": 0.6}
    profiled = give_profile(monkeypatch, cost)
    front = leansd.tune(
        other, calls, steps=10, held_out=calls, settings=settings, tries=0, seed=5, grids=(1.0,),
        speeds=(1.5,),
    )  # fmt: skip
    assert [set(call) for call in profiled] == [{"prompt", "image", *settings}]
    whole = cost.predict_full_run(6)
    points = [*front.points, *front.dominated]
    assert {point.is_plain for point in points} == {True, False}
    full = run_calls(other, CallSet(calls, seed=10_005, settings=settings), 10).pictures
    for point in points:
        assert point.speedup * point.milliseconds == pytest.approx(1000 * whole)
        steps = point.plan.steps
        ours = run_calls(
            other, CallSet(calls, seed=10_005, settings=settings), steps, point.plan
        ).pictures
        assert point.psnr == pytest.approx(float(psnr(ours, full).mean()), abs=0.01)
        with leansd.inherit(other, point.plan) as run:
            other(**calls[0], num_inference_steps=steps, **settings)
        plain = 1000 * cost.predict_full_run(run.report().calls)
        assert point.milliseconds == pytest.approx(plain) or not point.is_plain


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer full runs."""
    monkeypatch.setattr(error_model, "PROBES", (0.5,))


def tune(pipe, cost, **changes) -> Front:
    options = {
        "steps": STEPS, "settings": SETTINGS, "cost": cost, "tries": 1, "speeds": (1.5,),
        "grids": (1.0,),
    }  # fmt: skip
    return leansd.tune(pipe, PROMPTS, **{**options, **changes})


def count_runs(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that tunings try from here on; key steps measured along the full run are none."""
    ran: list[Plan] = []
    own = TrialRunner.run

    def run(self: TrialRunner, steps: int, plan: Plan | None = None, steer: Any = None):
        if plan is not None and len(plan.keys) < steps:
            ran.append(plan)
        return own(self, steps, plan, steer)

    monkeypatch.setattr(TrialRunner, "run", run)
    return ran


@pytest.mark.slow
def test_a_stopped_tuning_goes_on_and_ends_the_same(
    quick, pipe, cost, tmp_path, monkeypatch
) -> None:
    journal = tmp_path / "journal.jsonl"
    whole = tune(pipe, cost)
    ran = count_runs(monkeypatch)

    def stop(text: str, share: float) -> None:
        if text.startswith("held out"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(pipe, cost, journal=journal, tell=stop)
    before = len(ran)
    journal.write_text(journal.read_text() + '{"case": "cut of')
    shares: list[float] = []
    first = tune(pipe, cost, journal=journal, tell=lambda text, share: shares.append(share))
    assert len(ran) - before > 0
    assert shares == sorted(shares)
    assert shares[-1] == 1
    ran.clear()
    second = tune(pipe, cost, journal=journal)
    assert ran == []
    assert whole == first == second  # also: the same seed, the same front


@pytest.mark.slow
def test_the_journal_keeps_the_profile(quick, pipe, cost, tmp_path, monkeypatch) -> None:
    journal = tmp_path / "journal.jsonl"
    monkeypatch.setattr(tuner, "profile", lambda *_, **__: cost)
    first = tune(pipe, None, tries=0, journal=journal)
    monkeypatch.setattr(tuner, "profile", lambda *_, **__: pytest.fail("profiled again"))
    assert tune(pipe, None, tries=0, journal=journal) == first


def test_journals_of_other_calls_are_passed_over(tmp_path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal.open(path, {"calls": ["a"]}).note(Plan.full(2), Trial(Plan.full(2), 30.0))
    assert Journal.open(path, {"calls": ["a"]}).find(Plan.full(2)) == Trial(Plan.full(2), 30.0)
    assert Journal.open(path, {"calls": ["b"]}).find(Plan.full(2)) is None


@pytest.mark.slow
def test_tuned_plans_run_and_say_what_they_were_tuned_for(
    quick, pipe, cost, tmp_path, monkeypatch
) -> None:
    calls = [*PROMPTS[:3], {"prompt": PROMPTS[3]}]
    ran = count_runs(monkeypatch)
    front = leansd.tune(
        pipe, calls, steps=STEPS, settings=SETTINGS, cost=cost, tries=0, grids=(1.0, 0.7),
        speeds=(1.5,), speedup=1.7,
    )  # fmt: skip
    points = [*front.points, *front.dominated]
    tuned = [point.plan for point in points if not point.is_plain]
    assert len(tuned) >= 1
    assert any(plan.guides for plan in ran)
    assert any("up0.l1" in row.inherit for plan in ran for row in plan.rows)
    for plan in tuned:
        assert plan.tuned is not None
        assert len(plan.tuned.log_snr) == plan.steps
        told = replace(plan.tuned, log_snr=())
        assert told == Tuned("DDIMScheduler", front.subject, 3.0)
        with leansd.inherit(pipe, plan) as run:
            pipe("a boat", num_inference_steps=plan.steps, **SETTINGS)
        assert run.report()
        plan.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json") == plan
    front.save(tmp_path / "front.json")
    assert Front.load(tmp_path / "front.json").points[0].plan == front.points[0].plan


def test_too_few_calls_and_impossible_wishes_are_refused(quick, pipe, cost, monkeypatch) -> None:
    with pytest.raises(LeansdError, match="2 calls are too few"):
        leansd.tune(pipe, PROMPTS[:2], steps=STEPS, cost=cost)
    with pytest.raises(LeansdError, match="held out"):
        leansd.tune(pipe, PROMPTS, steps=STEPS, cost=cost, held_out=[])
    with pytest.raises(LeansdError, match="no gain"):
        tune(pipe, cost, speedup=0.9)
    ran = count_runs(monkeypatch)
    with pytest.raises(LeansdError, match=r"100\.00x.* cannot be reached.*x$"):
        tune(pipe, cost, speedup=100.0)
    assert ran == []


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"ms": 0}, "a call of 0 ms"),
        ({"ms": -5.0}, "a call of -5 ms"),
        ({"ms": float("nan")}, "a call of nan ms"),
        ({"speedup": 0}, "0 times as fast"),
        ({"speedup": -2.0}, "-2 times as fast"),
        ({"speeds": (2.0, 1.0)}, "1 times as fast"),
        ({"tries": -1}, "-1 tries"),
    ],
)
def test_wishes_that_mean_nothing_are_refused_before_anything_runs(wish: dict, said: str) -> None:
    with pytest.raises(LeansdError, match=said):
        leansd.tune(None, PROMPTS, **wish)


def test_every_argument_of_a_call_survives_profiling() -> None:
    pipe = tiny_pipeline(unet=shallow_unet())
    seen: list[int] = []
    given = {
        "latents": torch.randn(1, 4, 8, 8),
        "generator": torch.Generator().manual_seed(1),
        "negative_prompt": "blue",
        "guidance_scale": 3.0,
        "callback_on_step_end": lambda pipe, step, timestep, values: seen.append(step) or values,
        "output_type": "np",
        "timesteps": [900, 500, 100],
    }
    cost = leansd.profile(pipe, call=given, pictures=2, repeats=1)
    assert cost.pictures == 2
    assert seen
    assert given["latents"].shape[0] == 1
    assert given["generator"].initial_seed() == 1
    leansd.profile(pipe, call={"latents": given["latents"], "prompt": "a"}, repeats=1)


def test_a_plan_tuned_for_another_sampler_runs_with_a_warning() -> None:
    plan = Plan.between([0, 1, 3], cut="head", steps=4)
    pipe = tiny_pipeline()
    own = fingerprint_module(pipe.unet)
    for sampler in ("ddim", "DDIMScheduler"):
        with leansd.inherit(pipe, replace(plan, tuned=Tuned(sampler, own))):
            pipe("a cat", num_inference_steps=4)
    for tuned, said in (
        (Tuned("euler", own), "tuned for sampler euler, not ddim"),
        (Tuned("ddim", "another"), "tuned for a UNet with other weights"),
    ):
        with (
            pytest.warns(UserWarning, match=said),
            leansd.inherit(pipe, replace(plan, tuned=tuned)) as run,
        ):
            pipe("a cat", num_inference_steps=4)
        assert run.report().full_calls == 3


# -- the front -------------------------------------------------------------------------------------


def make_front() -> Front:
    keep = {"a": [0, 2, 4, 6], "b": [0, 3, 6], "c": [0, 4]}
    plans = {n: Plan.between(k, cut="head", steps=STEPS, name=n) for n, k in keep.items()}
    points = [
        Point(plans["a"], 1.5, 200.0, 40.0),
        Point(plans["b"], 2.0, 150.0, 35.0),
        Point(Plan.full(4, name="4 steps"), 2.0, 150.0, 33.0),
        Point(Plan.full(3, name="3 steps"), 3.0, 100.0, 28.0),
        Point(plans["c"], 2.9, 103.0, 27.0),
    ]
    return Front.of("weights", "ddim", STEPS, points)


def test_a_front_keeps_what_nothing_beats() -> None:
    front = make_front()
    assert [point.plan.name for point in front.points] == ["a", "b", "3 steps"]
    assert [point.plan.name for point in front.dominated] == ["4 steps", "c"]
    rivals = [front.find_rival(point) for point in front.points]
    assert [rival and rival.plan.name for rival in rivals] == ["4 steps", "4 steps", None]


def test_a_front_meets_goals() -> None:
    front = make_front()
    assert front.at(speedup=1.8).name == "b"
    assert front.at(speedup=2.01).name == "b"  # no time is as true as that
    assert front.at(psnr=33).name == "b"
    assert front.at(ms=120).name == "3 steps"
    assert front.find(ms=120).is_plain
    assert not front.find(psnr=39).is_plain


@pytest.mark.parametrize(
    ("goal", "said"),
    [
        ({"speedup": 4}, "fastest is 3.00x, 100 ms, at 28.0 dB"),
        ({"ms": 50}, "fastest is 3.00x, 100 ms, at 28.0 dB"),
        ({"psnr": 41}, "best is 40.0 dB at 1.50x"),
        ({}, "give one goal"),
        ({"psnr": 1, "ms": 1}, "give one goal"),
    ],
)
def test_a_front_says_the_best_where_a_goal_is_out_of_reach(goal: dict, said: str) -> None:
    with pytest.raises(LeansdError, match=said):
        make_front().at(**goal)


def test_an_empty_front_says_so() -> None:
    with pytest.raises(LeansdError, match="no plan at all"):
        Front.of("weights", "ddim", STEPS, []).at(psnr=30)


def test_fronts_are_files(tmp_path) -> None:
    path = tmp_path / "front.json"
    make_front().save(path)
    assert Front.load(path) == make_front()
    path.write_text(path.read_text().replace('"dominated"', '"beaten"'))  # as of earlier versions
    assert Front.load(path) == make_front()
    with pytest.warns(DeprecationWarning, match="is called dominated"):
        assert Front.load(path).beaten == make_front().dominated
    path.write_text("{}")
    with pytest.raises(LeansdError, match="not a front"):
        Front.load(path)
    with pytest.raises(LeansdError, match="cannot read"):
        Front.load(tmp_path / "none.json")


def test_what_a_plan_was_tuned_for_is_no_part_of_what_it_does(tmp_path) -> None:
    plain = Plan.full(3)
    plan = Plan(plain.rows, tuned=Tuned("ddim", "weights", 4.0))
    assert plan.fingerprint == plain.fingerprint
    plain.save(tmp_path / "plain.json")
    assert "tuned" not in json.loads((tmp_path / "plain.json").read_text())
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").tuned == plan.tuned


def test_nothing_warns_where_an_output_repeats() -> None:
    flat = torch.ones(STEPS, 5, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judged = make_model("ddim", flat).judge((Key(0), Key(1)), 4, LINE)
    assert judged.error == pytest.approx(0.0, abs=1e-12)


@pytest.mark.slow
def test_plans_are_tuned_under_a_controlnet(pipe, cost, monkeypatch) -> None:
    """What is promised of a plan holds for calls that bring their own control."""
    net = tiny_controlnet(pipe.unet, 0)
    parts = pipe.components | {"controlnet": net, "scheduler": make_scheduler("dpm++2m")}
    other = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    pictures = torch.rand(4, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    calls = [
        {"prompt": prompt, "image": picture}
        for prompt, picture in zip(PROMPTS, pictures, strict=True)
    ]
    profiled = give_profile(monkeypatch, cost)
    front = leansd.tune(
        other, calls, steps=STEPS, held_out=calls, settings=SETTINGS, tries=0, seed=5, grids=(1.0,),
        speeds=(1.5,),
    )  # fmt: skip
    assert [set(call) for call in profiled] == [{"prompt", "image", *SETTINGS}]
    assert front.points
    full = run_calls(other, CallSet(calls, seed=10_005, settings=SETTINGS), STEPS).pictures
    for point in front.points:
        ours = run_calls(
            other, CallSet(calls, seed=10_005, settings=SETTINGS), point.plan.steps, point.plan
        ).pictures
        assert point.psnr == pytest.approx(float(psnr(ours, full).mean()), abs=0.01)
