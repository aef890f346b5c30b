"""Plans that know their noise levels: the same levels, others, and other step counts."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionImg2ImgPipeline

import leansd
from conformance.models import draw_picture
from leansd.errors import LeansdError
from leansd.plans import Plan
from leansd.plans.methods import Mix
from leansd.plans.plan import Tuned
from leansd.plans.resolve import PlanContext, carry_over, find_source, resolve_plan
from leansd.runtime.clock import read_schedule
from test_mixing import KEYS, STEPS, draw, list_identities, make_pipe

FRAME = Plan.between(KEYS, cut="head", steps=STEPS, how="forecast").correct({3: (0.3, 0.1)})
THEN = (-5.0, -3.0, -1.5, 0.0, 1.5, 3.0, 5.0)
NOW = (-5.0, -4.9, -3.2, -1.4, -0.1, 2.9, 4.0)
"""Of the old key steps 0, 1, 3 and 5 the nearest are 0, 2, 4 and 5."""


def tune(plan: Plan, levels: tuple[float, ...] = THEN, sampler: str = "dpm++2m") -> Plan:
    return replace(plan, tuned=Tuned(sampler, "", 3.0, levels))


def test_key_steps_go_along_with_their_noise_levels() -> None:
    moved = carry_over(tune(FRAME), THEN, NOW)
    assert moved.keys == (0, 2, 4, 5)
    assert moved.rows[4].correct == (0.3, 0.1)
    assert carry_over(FRAME, THEN, THEN) == FRAME
    assert carry_over(FRAME, THEN, [-5.0, -4.9]).keys == (0, 1)
    with pytest.raises(LeansdError, match="other noise levels"):
        carry_over(FRAME.correct({3: 0.0}).mix(list_identities(KEYS, lanes=True)), THEN, NOW)


@pytest.mark.parametrize(
    ("levels", "keys", "says"),
    [(THEN, KEYS, ""), (NOW, (0, 2, 4, 5), "moved to the nearest"), ((), KEYS, "")],
)
def test_a_plan_is_resolved_at_the_levels_of_the_run(
    levels: tuple[float, ...], keys: tuple[int, ...], says: str
) -> None:
    context = PlanContext(STEPS, sampler="dpm++2m", log_snr=levels)
    resolved = resolve_plan(tune(FRAME), context)
    assert resolved.plan.keys == keys
    assert says in " ".join(resolved.notes)
    assert bool(resolved.notes) == bool(says)


def test_a_mixed_plan_is_for_its_sampler() -> None:
    mixed = tune(Plan.full(2).mix({1: Mix(0.0, (0.5, 0.5))}), (0.0, 1.0))
    with pytest.raises(LeansdError, match="fitted to sampler"):
        resolve_plan(mixed, PlanContext(2, sampler="ddim"))
    assert resolve_plan(mixed, PlanContext(2, sampler="dpm++2m")).plan is mixed


def test_a_pipeline_whose_sampler_spaces_its_steps_otherwise_is_told() -> None:
    """As set the plan is followed without a word; with other spacing its key steps move."""
    pipe = make_pipe("dpm++2m", use="spacing")
    pipe.scheduler.set_timesteps(STEPS)
    plan = tune(FRAME, tuple(read_schedule(pipe.scheduler).log_snr))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with leansd.inherit(pipe, plan):
            assert torch.isfinite(draw(pipe)).all()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="leading"
    )
    with pytest.warns(UserWarning, match="moved to the nearest"), leansd.inherit(pipe, plan):
        draw(pipe)


def test_levels_survive_a_file(tmp_path: Path) -> None:
    plan = tune(FRAME)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.fingerprint == FRAME.fingerprint


# -- guidance scales and strengths -----------------------------------------------------------------


def tune_at(
    guidance: float | None, strength: float | None = None, name: str = "own", levels: bool = True
) -> Plan:
    tuned = Tuned("ddim", "", guidance, THEN if levels else (), strength)
    return replace(FRAME.rename(name), tuned=tuned)


@pytest.mark.parametrize(
    ("plan", "guidance", "strength", "says"),
    [
        (tune_at(4.0), 4.0, 1.0, ""),
        (tune_at(4.0), 7.5, 1.0, "own was tuned at guidance 4, not 7.5"),
        (tune_at(4.0), 4.0, 0.6, "own was tuned at strength 1, not 0.6"),
        (tune_at(4.0), 7.5, 0.6, "guidance 4, not 7.5 plan own was tuned at strength 1, not 0.6"),
        (tune_at(4.0, 0.6), 4.0, 0.6, ""),
        (tune_at(4.0, 0.6), 4.0, 4 / STEPS, ""),  # as many steps
        (tune_at(4.0, 0.6), 4.0, 1.0, "own was tuned at strength 0.6, not 1"),
        (tune_at(None, levels=False), 4.0, 0.6, ""),  # it was not noted
        (tune_at(4.0), None, None, ""),
    ],
)
def test_what_a_plan_was_tuned_at_is_told(
    plan: Plan, guidance: float | None, strength: float | None, says: str, tmp_path: Path
) -> None:
    context = PlanContext(STEPS, guidance=guidance, strength=strength)
    plan.save(tmp_path / "plan.json")
    for source in (plan, tmp_path / "plan.json"):
        told = " ".join(resolve_plan(source, context).notes)
        assert told.endswith(says)
        assert bool(told) == bool(says)


@pytest.mark.parametrize(
    ("guidance", "strength", "expected"),
    [(4.0, 1.0, "a"), (5.0, 1.0, "a"), (7.5, 1.0, "b"), (7.5, 0.6, "c"), (None, None, "a")],
)
def test_of_several_plans_the_nearest_is_followed(
    guidance: float | None, strength: float | None, expected: str, tmp_path: Path
) -> None:
    plans = [tune_at(4.0, name="a"), tune_at(8.0, name="b"), tune_at(4.0, 0.5, name="c")]
    for plan in plans:
        plan.save(tmp_path / f"{plan.name}.json")
    files = [tmp_path / f"{name}.json" for name in "abc"]
    context = PlanContext(STEPS, guidance=guidance, strength=strength)
    for source in (plans, files, ",".join(map(str, files))):
        assert resolve_plan(source, context).plan.name == expected
    with pytest.raises(LeansdError, match="choice by guidance"):
        find_source([plans[0], "balanced"])
    with pytest.raises(LeansdError, match="one number of steps"):
        find_source([plans[0], plans[1].fit(9)])


def test_a_run_warns_once_and_its_report_says_the_same() -> None:
    pipe = make_pipe("ddim", use="scales")
    plans = [tune_at(2.0, name="a", levels=False), tune_at(8.0, name="b", levels=False)]
    with leansd.inherit(pipe, plans) as run:
        for _ in range(2):  # as of every note of a preset, once a run
            with pytest.warns(UserWarning, match="plan a was tuned at guidance 2, not 3") as told:
                draw(pipe)
            assert len(told) == 1
            assert "plan a was tuned at guidance 2, not 3" in str(run.report())
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            drawn = draw(pipe, guidance_scale=8.0)
        assert run.report().plan.name == "b"
        assert not run.report().notes
    assert torch.equal(drawn, draw(pipe, plans[1], guidance_scale=8.0))
    with pytest.raises(LeansdError, match="give one plan"):
        leansd.inherit(pipe.unet, plans)


def test_image_to_image_at_another_strength_is_told() -> None:
    pipe = StableDiffusionImg2ImgPipeline(**make_pipe(use="strength").components)
    pipe.set_progress_bar_config(disable=True)
    with leansd.inherit(pipe, tune_at(None, 1.0, levels=False)) as run:
        with pytest.warns(UserWarning, match="tuned at strength 1, not 0.571"):
            draw(pipe, image=draw_picture(), strength=0.6)
        assert run.report().notes
