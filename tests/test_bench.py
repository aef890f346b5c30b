"""The benchmark: fronts and margins, rivals that leave nothing behind, resumption, Spectrum."""

import json
import math
import random
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import leansd
from leansd import LeansdError, Plan
from leansd.anatomy.reading import read_anatomy
from leansd.cli import main
from leansd.evaluation.bench import (
    OWN_SETTING,
    BenchSettings,
    PreparedContest,
    choose_plans,
    compare_contest,
    describe_contest,
    drop_done,
    fingerprint_contest,
    has_limit,
    hold,
    line_up,
    list_contests,
    list_records,
    list_settings,
    name_limit,
    name_own_front,
)
from leansd.evaluation.compare import CONVERGED, Case
from leansd.evaluation.pareto import find_front
from leansd.evaluation.records import load_records, put_records, stamp
from leansd.evaluation.rivals import (
    OURS,
    RIVALS,
    Contest,
    Rival,
    RivalContext,
    align_steps,
    apply_deepcache,
    apply_tgate,
    apply_tomesd,
    choose_rivals,
    make_case,
)
from leansd.evaluation.runs import FULL, CallSet, run_calls
from leansd.evaluation.standings import (
    PREDICTED,
    SHARED,
    SINGLE,
    BenchPoint,
    find_contest,
    find_margin,
    rate_point,
    read_front,
    read_points,
    read_shares,
    read_standings,
    tabulate_computing,
    tabulate_margins,
)
from leansd.plans.methods import Mix, chebyshev
from leansd.plans.plan import Tuned
from leansd.report.measurements import report_bench
from leansd.report.page import Chart
from leansd.runtime.clock import read_schedule
from leansd.runtime.samplers import make_scheduler
from leansd.tuning.front import Front, Point, read_plans
from loops import sample
from tiny import tiny_pipeline, tiny_scheduler, tiny_unet

PROMPTS = ["a red apple", "pizza"]
CONTEST = Contest("text-to-image", "ddim", 4, 3.0, is_long=True)
ANATOMY = read_anatomy(tiny_unet())


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def context(pipe):
    plan = Plan.every(2, cut="up3.l1", steps=4, name="lean")
    return RivalContext(CONTEST, pipe, leansd.dissect(pipe.unet), own=(plan,))


SETTINGS = BenchSettings(
    "tiny", PROMPTS, [], lambda contest, blocks: (), batch=1, spread_sets=0, converged_steps=8
)


def prepare(pipe, context, rivals=(), contest=CONTEST, **changes):
    cases, left_out = line_up(context, rivals, {"ddim": make_scheduler(pipe, "ddim")})
    return replace(PreparedContest(contest, pipe, cases, PROMPTS, 0, left_out), **changes)


# -- fronts ------------------------------------------------------------------------------------

FEWER = [BenchPoint("15", 2.0, 40.0), BenchPoint("10", 3.0, 30.0), BenchPoint("20", 1.5, 35.0)]


def test_a_front_leaves_out_who_is_beaten_in_both():
    assert [point.name for point in find_front(FEWER, rate_point)] == ["15", "10"]


def test_a_front_is_what_no_other_point_dominates():
    draw = random.Random(0)
    points = [(draw.randint(0, 9), draw.choice([1.0, 2.5, 3.0, math.inf])) for _ in range(60)]
    wanted = [
        (x, y)
        for x, y in dict.fromkeys(sorted(points))
        if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points)
    ]
    assert find_front(points, lambda point: point) == wanted
    assert find_front([], rate_point) == []


def test_between_two_points_a_front_is_a_line_over_the_logarithm_of_the_speed():
    reached = read_front(FEWER, math.sqrt(2.0 * 3.0))
    assert reached is not None
    assert math.isclose(reached.quality, 35.0)


@pytest.mark.parametrize(("speed", "quality"), [(1.0, 40.0), (2.0, 40.0), (3.0, 30.0)])
def test_a_point_counts_for_every_speed_up_to_its_own(speed, quality):
    reached = read_front(FEWER, speed)
    assert reached is not None
    assert reached.quality == quality


def test_nobody_is_read_beyond_the_fastest_point():
    assert read_front(FEWER, 3.1) is None
    assert read_points(FEWER, 3.1) is None


def test_speeds_that_no_clock_tells_apart_are_one():
    # Ten calls of thirty and twenty forecasts, beside ten steps.
    assert read_points([BenchPoint("ours", 2.995, 40.0)], 3.0).name == "ours"


def test_two_share_the_pictures_by_the_time_they_take():
    # Half of them in 1/1.5 of the time and half in 1/3 is half of the time for all.
    slow, fast = BenchPoint("20", 1.5, 36.0), BenchPoint("10", 3.0, 30.0)
    shared = read_shares([fast, slow], 2.0)
    assert shared == BenchPoint("20 and 10", 2.0, 33.0)
    assert read_shares([fast, slow, BenchPoint("15", 2.0, 34.0)], 2.0).name == "15"
    assert read_shares([fast, slow], 1.5) == slow
    assert read_shares([fast, slow], 3.1) is None


def test_ours_share_only_where_rivals_do():
    ours = [BenchPoint("quality", 1.6, 50.0), BenchPoint("fast", 2.5, 38.0)]
    rivals = {"fewer": [BenchPoint("20", 1.6, 40.0), BenchPoint("12", 2.5, 30.0)]}
    alone, together = (find_margin(ours, rivals, 2.0, each) for each in (SINGLE, SHARED))
    assert alone.ours == ours[1]
    # 5 of 9 pictures by the faster one: 1/1.6 and 1/2.5 of the time are 1/2 in the mean.
    assert math.isclose(together.ours.quality, 50 - 12 * 5 / 9)
    assert math.isclose(together.rival.quality, 40 - 10 * 5 / 9)
    assert (alone.family, together.family) == ("fewer", "fewer")


def test_any_two_rivals_may_share():
    rivals = {"fewer": [BenchPoint("20", 1.5, 36.0)], "samplers": [BenchPoint("10", 3.0, 30.0)]}
    margin = find_margin([BenchPoint("mine", 2.0, 40.0)], rivals, 2.0, SHARED)
    assert (margin.family, margin.rival.quality) == ("fewer + samplers", 33.0)
    assert find_margin([], rivals, 4.0, SHARED).value is None


def test_ours_is_only_what_was_measured():
    ours = [BenchPoint("quality", 1.6, 50.0), BenchPoint("fast", 2.5, 38.0)]
    margin = find_margin(ours, {"fewer": FEWER, "slow": [BenchPoint("s", 1.1, 90.0)]}, 2.0)
    assert margin.ours == ours[1]
    assert margin.family == "fewer"
    assert margin.value == 38.0 - 40.0
    assert find_margin(ours, {"fewer": FEWER}, 2.6).value is None


def test_of_image_to_image_the_last_steps_are_counted(context):
    halves = replace(CONTEST, task="image-to-image", strength=0.5)
    early, late = (Plan.full(4).inherit("head", at=step) for step in (1, 3))
    costs = [
        make_case(replace(context, contest=halves), each, "", OURS).cost for each in (early, late)
    ]
    assert costs[0] == 1
    assert 0.5 < costs[1] < 0.6


# -- Spectrum ----------------------------------------------------------------------------------


def reference_weights(call, places, calls, degree=4, ridge=0.1):
    """By numpy's own Chebyshev basis and least squares on rows extended by the ridge."""
    basis = np.polynomial.chebyshev.chebvander(np.array(places) * 2 / calls - 1, degree)
    target = np.polynomial.chebyshev.chebvander(np.array([call]) * 2 / calls - 1, degree)[0]
    rows = np.vstack([basis, np.sqrt(ridge) * np.eye(degree + 1)])
    values = np.vstack([np.eye(len(places)), np.zeros((degree + 1, len(places)))])
    return target @ np.linalg.lstsq(rows, values, rcond=None)[0]


@pytest.mark.parametrize("places", [(0,), (3, 1, 0), (4, 3, 2, 1, 0), (20, 15, 11, 8, 6, 4, 2, 0)])
def test_weights_are_those_of_a_ridge_regression(places):
    for call in (places[0] + 1, places[0] + 4):
        expected = reference_weights(call, places, 30)
        assert np.allclose(chebyshev(call, places, 30), expected, atol=1e-12)


@pytest.mark.parametrize("how", ["chebyshev", "chebyshev-line"])
def test_a_run_forecasts_by_these_weights_through_all_computed_outputs(how):
    steps, keys = 8, (0, 1, 2, 4, 7)
    unet, scheduler = tiny_unet(), tiny_scheduler()
    scheduler.set_timesteps(steps)
    assert len(read_schedule(scheduler).rows) == steps
    outputs = []

    class Replayed:
        config = unet.config
        calls = 0

        def __call__(self, latents, t, **inputs):
            step, self.calls = self.calls, self.calls + 1
            if step in keys:
                outputs.append((step, unet(latents, t, **inputs)[0].double()))
                return (outputs[-1][1].float(),)
            places, values = zip(*outputs, strict=True)
            weights = reference_weights(step, places, steps)
            if how == "chebyshev-line":
                line = np.zeros(len(places))
                last, before = places[-1], places[-2]
                line[-1] = (step - before) / (last - before)
                line[-2] = 1 - line[-1]
                weights = (weights + line) / 2
            return (sum(w * v for w, v in zip(weights, values, strict=True)).float(),)

        def __getattr__(self, name):
            return getattr(unet, name)

    expected = sample(Replayed(), steps, scheduler=tiny_scheduler())
    with leansd.inherit(unet, Plan.between(keys, cut="head", steps=steps, how=how)):
        drawn = sample(unet, steps)
    assert torch.allclose(drawn, expected, atol=1e-4)
    assert not torch.allclose(drawn, sample(unet, steps), atol=1e-2)


def test_the_window_of_spectrum_grows_with_every_computed_step():
    plan = leansd.preset("spectrum", 30)
    assert plan.keys == (0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25)
    assert leansd.preset("spectrum", 3).keys == (0, 1, 2)
    with pytest.raises(LeansdError, match="1 or more"):
        leansd.preset("spectrum", 30, window=0)


# -- rivals ------------------------------------------------------------------------------------


@contextmanager
def compose(pipe):
    with apply_tomesd(pipe) as called, apply_deepcache(2, 1)(called) as both:
        yield both


PACKAGES = {"DeepCache": apply_deepcache(2, 0), "tgate": apply_tgate(2), "tomesd": compose}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_changes_the_run_and_leaves_nothing_behind(package):
    pytest.importorskip(package)
    pipe = tiny_pipeline()
    before = run_calls(pipe, CallSet(PROMPTS), 6)
    parts = {name: (type(part), sorted(vars(part))) for name, part in pipe.unet.named_modules()}
    with PACKAGES[package](pipe) as called:
        assert not torch.equal(run_calls(called, CallSet(PROMPTS), 6).latents, before.latents)
    assert torch.equal(run_calls(pipe, CallSet(PROMPTS), 6).latents, before.latents)
    after = {name: (type(part), sorted(vars(part))) for name, part in pipe.unet.named_modules()}
    assert after == parts


def test_a_rival_that_is_not_there_is_left_out_and_said(pipe, context):
    rival = Rival("ghost", lambda context: [], "ghost_sd")
    prepared = prepare(pipe, replace(context, own=()), [rival, RIVALS["fewer"]])
    assert prepared.left_out == {"ghost": "ghost_sd is not installed (pip install ghost_sd)"}
    assert [each.name for each in prepared.cases] == ["full", "3 steps", "2 steps", "1 steps"]


def test_rivals_by_name():
    assert [rival.name for rival in choose_rivals("deepcache, fewer")] == ["deepcache", "fewer"]
    assert len(choose_rivals("all")) == len(RIVALS)
    with pytest.raises(LeansdError, match="no rival 'nobody'"):
        choose_rivals("fewer,nobody")


# -- contests ----------------------------------------------------------------------------------


def hold_one(prepared):
    comparison = compare_contest(prepared, SETTINGS)
    fields = {**stamp(), "settings": fingerprint_contest(prepared, SETTINGS, "w")}
    return comparison, list_records(prepared, SETTINGS, comparison, fields)


def test_pictures_are_those_of_the_pipeline_alone_and_times_are_of_every_round(pipe, context):
    prepared = prepare(pipe, context, [RIVALS["fewer"]])
    comparison, records = hold_one(prepared)
    for name, steps, plan in ((FULL, 4, None), ("lean", 4, context.own[0]), ("2 steps", 2, None)):
        alone = run_calls(
            pipe,
            CallSet(PROMPTS, batch=1, settings={"guidance_scale": 3.0}),
            steps,
            plan,
            scheduler=make_scheduler(pipe, "ddim"),
        )
        assert torch.equal(comparison[name].pictures, alone.pictures.mul(255).round().byte())
        assert len(comparison[name].timing.seconds) == len(PROMPTS)
    (standing,) = read_standings(records)
    assert standing.names == ["full", "lean", "3 steps", "2 steps", "1 steps"]
    assert set(standing.list_points(FULL)) == {"ours", "fewer"}
    assert len(tabulate_margins(standing).rows) == 6
    assert standing.title == str(CONTEST)
    # What is computed, which no busy machine changes, decides a table of its own.
    assert [standing.find(f"{n} steps", PREDICTED).value for n in (3, 2, 1)] == [4 / 3, 2, 4]
    (margin,) = standing.find_margins(speeds=(2.0,), by=PREDICTED)
    assert (margin.rival.name, margin.ours) == ("2 steps", None)
    assert tabulate_computing(standing).rows[1][1].startswith(f"– / {margin.rival.quality:.1f} (")


def test_a_package_that_fails_is_left_out_but_ours_must_not_fail(pipe, context):
    def fail(pipe):
        raise RuntimeError("sizes must match\nat line 3")

    broken = Case("broken", 4, enter=fail, family="deepcache")
    prepared = prepare(pipe, context, [Rival("broken", lambda context: [broken])])
    comparison, records = hold_one(prepared)
    assert comparison.left_out == {"broken": "failed here: RuntimeError: sizes must match"}
    assert {record.plan for record in records} == {"full", "lean"}
    assert "broken: failed here" in next(r.left_out for r in records if r.metric == "seconds")
    with pytest.raises(RuntimeError):
        hold_one(replace(prepared, cases=(prepared.cases[0], replace(broken, family=OURS))))


def test_records_of_a_contest_take_the_place_of_older_ones(pipe, context, tmp_path):
    path = tmp_path / "bench.jsonl"
    prepared = prepare(pipe, context)
    prepared = replace(prepared, fingerprint=fingerprint_contest(prepared, SETTINGS, "w"))
    assert drop_done([prepared], path) == [prepared]
    _, records = hold_one(prepared)
    other = [record.model_copy(update={"subject": "other"}) for record in records]
    for each in (other, records, records):
        put_records(path, each, find_contest)
    assert len(load_records(path)) == 2 * len(records)
    assert drop_done([prepared], path) == []


def test_what_a_contest_follows_from_changes_its_fingerprint(pipe, context):
    first = fingerprint_contest(prepare(pipe, context), SETTINGS, "w")
    assert first == fingerprint_contest(prepare(pipe, context), SETTINGS, "w")
    loud = replace(CONTEST, guidance=8.0)
    others = [
        fingerprint_contest(prepare(pipe, context), SETTINGS, "v"),
        fingerprint_contest(prepare(pipe, context), replace(SETTINGS, seed=7), "w"),
        fingerprint_contest(prepare(pipe, context, contest=loud), SETTINGS, "w"),
        fingerprint_contest(prepare(pipe, context, [RIVALS["fewer"]]), SETTINGS, "w"),
    ]
    assert len({first, *others}) == 5


def test_all_samplers_and_step_counts_the_papers_setting_and_image_to_image():
    contests = list_contests(["dpm++2m", "ddim"], [20, 30], 4.0)
    assert len(contests) == 8
    assert sum(contest.is_long for contest in contests) == 1
    others = [(c.sampler, c.steps, c.guidance) for c in contests if c.guidance != 4.0]
    assert others == [("dpm++2m", 30, 7.5), ("dpm++2m", 30, 8.0)]
    drawn = [c for c in contests if c.task == "image-to-image"]
    assert [list_settings(c)["strength"] for c in drawn] == [0.6, 0.8]
    assert len({name_own_front(c) for c in drawn}) == len({name_limit(c) for c in drawn}) == 2
    assert all(OWN_SETTING.fullmatch(name_own_front(c).removeprefix("dpm++2m-30")) for c in drawn)
    # What is on record of the first strength stays that.
    assert ["strength" in describe_contest(c) for c in drawn] == [False, True]


def test_further_hosts_are_held_at_one_step_count():
    contests = list_contests(["ddim"], [20, 30], 4.0, hosts=["unipc", "dpm++sde"])
    hosts = [c for c in contests if c.sampler != "ddim"]
    assert [(c.sampler, c.steps) for c in hosts] == [("unipc", 30), ("dpm++sde", 30)]
    assert [has_limit(c) for c in hosts] == [True, False]


def test_a_sampler_that_draws_noise_is_held_against_the_full_run_alone(pipe, context, tmp_path):
    contest = replace(CONTEST, sampler="dpm++sde", is_long=False)
    there = {contest.sampler: make_scheduler(pipe, contest.sampler)}
    cases, left_out = line_up(replace(context, contest=contest), [RIVALS["fewer"]], there)
    entry = PreparedContest(contest, pipe, cases, PROMPTS, 0, left_out)
    hold([entry], SETTINGS, tmp_path / "bench.jsonl")
    (standing,) = read_standings(load_records(tmp_path / "bench.jsonl"))
    assert standing.find("lean", "psnr", FULL) is not None
    assert standing.references == [FULL]
    assert {row[1] for row in tabulate_margins(standing).rows} == {FULL}
    (chart,) = [each for each in report_bench([standing]).sections if isinstance(each, Chart)]
    assert len(chart.drawings) == 1


def test_long_contests_look_at_few_calls_one_by_one(pipe, context):
    contest = Contest("text-to-image", "dpm++2m", 30, 4.0, is_long=True)
    aligned = make_scheduler(pipe, "dpm++2m")
    context = replace(context, contest=contest, pipe=SimpleNamespace(scheduler=aligned))
    fewer = [case.steps for case in RIVALS["fewer"].give(context)]
    assert {5, 6, 7, 8, 9, 10, 12, 15} <= set(fewer)
    published = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    there = align_steps(10, 4, aligned.alphas_cumprod.tolist())
    assert max(abs(one - other) for one, other in zip(there, published, strict=True)) <= 2
    ten = next(case for case in RIVALS["aligned"].give(context) if case.steps == 10)
    with ten.enter(context.pipe):
        aligned.set_timesteps(10)
    assert aligned.timesteps.tolist() == there
    aligned.set_timesteps(10)
    assert aligned.timesteps.tolist() != there
    # DDIM takes no list of times, Karras's spacing none beside its own, pictures begin among them.
    assert not list(RIVALS["aligned"].give(replace(context, contest=CONTEST)))
    for other in (
        replace(contest, sampler="dpm++2m-karras"),
        replace(contest, task="image-to-image", strength=0.6),
    ):
        assert not list(RIVALS["aligned"].give(replace(context, contest=other)))


def test_plans_and_plain_runs_of_as_many_steps_cost_the_same(context):
    # Ours may have fewer steps than the full run, as a mix that begins with plain steps has.
    for strength in (1.0, 0.6):
        contest = Contest("image-to-image", "ddim", 30, 4.0, strength=strength)
        context = replace(context, contest=contest)
        plain = {case.steps: case.cost for case in RIVALS["fewer"].give(context)}
        # Of 13 steps at strength 0.6 diffusers runs 7, of 30 it runs 18.
        assert plain[13] == (13 / 30 if strength == 1 else 7 / 18)
        for steps, cost in plain.items():
            assert make_case(context, Plan.full(steps), "own", OURS).cost == cost


@pytest.mark.parametrize("steps", [20, 30, 50])
def test_every_contest_goes_down_to_a_sixth_of_the_calls(context, steps):
    contest = Contest("text-to-image", "ddim", steps, 4.0)
    context = replace(context, contest=contest, others=("unipc",))
    for family in ("fewer", "samplers"):
        assert min(case.cost for case in RIVALS[family].give(context)) <= 0.17


def test_own_plans_from_a_folder_are_those_of_the_sampler_and_step_count(tmp_path):
    for name in ("ddim-4-2x", "ddim-4-1.5x", "ddim-6-2x", "euler-4-2x"):
        Plan.full(int(name.split("-")[1])).save(tmp_path / f"{name}.json")
    plans = choose_plans(
        [str(tmp_path), "fast"], CONTEST, ANATOMY, read_front=read_plans, force=True
    )
    assert [plan.name for plan in plans] == ["1.5x", "2x", "fast"]
    plans = choose_plans([], CONTEST, ANATOMY, read_front=read_plans, force=True)
    assert [plan.name for plan in plans] == list(leansd.plans.presets.SPEED_PRESETS)
    told = []
    plans = choose_plans(
        [str(tmp_path), "fast"], CONTEST, ANATOMY, read_front=read_plans, tell=told.append
    )
    assert [plan.name for plan in plans] == ["1.5x", "2x"]  # in 4 steps fast means the full run
    assert "to follow fast all the same give --force" in told[0]


def test_plans_with_mixes_sit_out_where_runs_begin_late(tmp_path):
    """One such plan in a folder must not end a benchmark of many contests."""
    plan = Plan.between([0, 2], cut="head", steps=4, name="mixed").mix({2: Mix(0.1, (0.5, 0.4))})
    plan.save(tmp_path / "ddim-4-mixed.json")
    pictures = replace(CONTEST, task="image-to-image", strength=0.6)
    told = []
    choose = partial(choose_plans, [str(tmp_path)], anatomy=ANATOMY, read_front=read_plans)
    assert [each.name for each in choose(contest=CONTEST)] == ["mixed"]
    assert choose(contest=pictures, tell=told.append) == ()
    assert told == ["mixed sits out in image-to-image: it mixes since the first step"]


def test_a_front_for_what_a_contest_draws_comes_before_one_for_anything(tmp_path):
    for suffix, guidance in (("", 3.0), ("-g8", 8.0), ("-image-to-image", 3.0)):
        tuned = Tuned("ddim", "", guidance=guidance)
        plan = replace(Plan.full(4, name=f"tuned{suffix}"), tuned=tuned).guide("drop", at=3)
        front = Front.of("unet", "ddim", 4, [Point(plan, 1.2, 1.0, 40.0)])
        front.save(tmp_path / f"ddim-4{suffix}.json")
    pictures = replace(CONTEST, task="image-to-image", strength=0.6)
    # Of no front for a guidance scale, the one tuned at the nearest is taken.
    contests = [replace(CONTEST, guidance=scale) for scale in (8.0, 6.0, 3.0, 4.0)] + [pictures]
    found = [
        choose_plans([str(tmp_path)], contest, ANATOMY, read_front=read_plans)
        for contest in contests
    ]
    assert [[plan.name for plan in plans] for plans in found] == [
        ["tuned-g8 of 4 steps"],
        ["tuned-g8 of 4 steps"],
        ["tuned of 4 steps"],
        ["tuned of 4 steps"],
        ["tuned-image-to-image of 4 steps"],
    ]


def test_what_plans_of_a_folder_were_tuned_for_is_told_as_everywhere(tmp_path):
    plan = replace(Plan.full(4), tuned=Tuned("euler", "", guidance=8.0)).guide("drop", at=3)
    plan.save(tmp_path / "ddim-4-2x.json")
    front = Front.of("unet", "ddim", 4, [Point(plan.rename("own"), 1.2, 1.0, 40.0)])
    front.save(tmp_path / "ddim-4.json")
    told = []
    choose_plans([str(tmp_path)], CONTEST, ANATOMY, read_front=read_plans, tell=told.append)
    for name in ("own of 4 steps", "2x"):
        elsewhere = f"plan {name} was tuned for sampler euler, not ddim: nothing says that it"
        assert any(note.startswith(elsewhere) for note in told)
        assert f"plan {name} was tuned at guidance 8, not {CONTEST.guidance:g}" in told


# -- the command -------------------------------------------------------------------------------


@pytest.mark.slow
def test_bench_of_the_embedded_model_and_its_resumption(tmp_path, capsys):
    out, report = tmp_path / "bench.jsonl", tmp_path / "report"
    command = [
        *("bench", "--count", "2", "--batch", "1", "--steps", "4", "--sampler", "dpm++2m"),
        *("--converged-steps", "8", "--seeds-for-spread", "1", "--plans", "fast"),
        *("--rivals", "fewer,spectrum", "--quick", "--force"),
        *("--out", str(out), "--report", str(report), "--device", "cpu", "--json"),
    ]
    assert main(command) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["held"] == 1
    (contest,) = said["contests"]
    assert [margin["reference"] for margin in contest["margins"]] == [FULL] * 3 + [CONVERGED] * 3
    assert [margin["shared"] for margin in contest["computing"]] == [False] * 3 + [True] * 3
    before = out.read_bytes()
    names = {record.plan for record in load_records(out)}
    assert {"full", "fast", "2 steps", "chebyshev-line 0"} <= names
    assert (report / "report.html").is_file()
    assert {path.suffix for path in report.iterdir()} == {".png", ".svg", ".html"}
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["held"] == 0
    assert all(len(line) <= 80 for line in lines if "dB" in line)
    assert out.read_bytes() == before


def test_bench_refuses_before_it_loads(tmp_path, capsys):
    for wrong, words in (
        (["--rivals", "nobody"], "no rival"),
        (["--plans", str(tmp_path)], "no plans in"),
        (["--sampler", "euler-b"], "no sampler"),
        (["--steps", "200"], "converged run"),
    ):
        assert main(["bench", *wrong]) == 2
        assert words in capsys.readouterr().err
