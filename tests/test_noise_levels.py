"""Plans that know their noise levels: the same levels, others, and other step counts."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

import leansd
from leansd.errors import LeansdError
from leansd.plans import Plan
from leansd.plans.methods import Mix
from leansd.plans.noise_levels import carry_over
from leansd.plans.plan import Tuned
from leansd.plans.resolve import PlanContext, resolve_plan
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
