"""Forecasts of the UNet's output by a line or a parabola, and their correction at key steps."""

from pathlib import Path
from typing import Any

import pytest
import torch

import leansd
from leansd.errors import LeansdError
from leansd.plans import Plan
from leansd.plans.anatomy import HEAD
from leansd.plans.compile import compile_plan
from leansd.plans.liveness import Kept
from leansd.runtime.clock import read_schedule
from loops import sample
from tiny import shallow_unet, tiny_pipeline, tiny_scheduler
from watching import watch_before

STEPS = 8
KEYS = (0, 1, 2, 4, 7)
WEIGHTS = {4: (0.3, 0.1), 7: (-0.2, 0.25)}
PLAN = Plan.between(KEYS, cut="head", steps=STEPS, how="forecast").correct(WEIGHTS)
CURVED = Plan.between(KEYS, cut="head", steps=STEPS, how="forecast2").correct(WEIGHTS)


def sample_by_reference(unet: Any, points: int) -> torch.Tensor:
    """The plans above written out: a polynomial through the last outputs, and the corrector."""
    scheduler = tiny_scheduler()
    scheduler.set_timesteps(STEPS)
    over = read_schedule(scheduler).log_snr
    outputs: list[tuple[float, torch.Tensor]] = []

    def extrapolate(at: float, points: int) -> torch.Tensor:
        known = outputs[-points:]
        total = torch.zeros_like(known[0][1], dtype=torch.float64)
        for here, value in known:
            weight = 1.0
            for there, _ in known:
                weight *= 1.0 if there == here else (at - there) / (here - there)
            total += weight * value.double()
        return total

    class Replayed:
        config = unet.config
        calls = 0

        def __call__(self, latents: torch.Tensor, t: Any, **inputs: Any) -> Any:
            step, self.calls = self.calls, self.calls + 1
            if step not in KEYS:
                return (extrapolate(over[step], points).float(),)
            noise = unet(latents, t, **inputs)[0]
            corrected = noise
            if step in WEIGHTS:
                line, last = WEIGHTS[step]
                corrected = noise + line * (noise - extrapolate(over[step], 2).float())
                corrected = corrected + last * (noise - outputs[-1][1])
            outputs.append((over[step], noise))
            return (corrected,)

        def __getattr__(self, name: str) -> Any:
            return getattr(unet, name)

    return sample(Replayed(), STEPS, scheduler=scheduler)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("plan", "points"), [(PLAN, 2), (CURVED, 3)])
def test_forecast_and_correction_are_what_they_say(plan: Plan, points: int) -> None:
    unet = shallow_unet()
    expected = sample_by_reference(unet, points)
    with leansd.inherit(unet, plan):
        drawn = sample(unet, STEPS)
    assert torch.allclose(drawn, expected, atol=1e-4)
    assert not torch.allclose(drawn, sample(unet, STEPS), atol=1e-2)


def test_a_correction_by_nothing_is_no_correction() -> None:
    unet = shallow_unet()
    with leansd.inherit(unet, Plan.between(KEYS, cut="head", steps=STEPS, how="forecast")):
        plain = sample(unet, STEPS)
    with leansd.inherit(unet, PLAN.correct(dict.fromkeys(WEIGHTS, 0.0))):
        assert torch.equal(sample(unet, STEPS), plain)


def test_without_a_forecast_before_there_is_nothing_to_correct() -> None:
    unet = shallow_unet()
    with leansd.inherit(unet, Plan.full(STEPS).correct({3: 0.5})):
        drawn = sample(unet, STEPS)
    assert torch.equal(drawn, sample(unet, STEPS))


def test_a_call_that_computes_nothing_does_not_enter_the_unet() -> None:
    unet = shallow_unet()
    entered = 0

    def count(*_: Any) -> None:
        nonlocal entered
        entered += 1

    handle = watch_before(unet.time_embedding, count)
    with leansd.inherit(unet, PLAN):
        sample(unet, STEPS)
    handle.remove()
    assert entered == len(KEYS)


def test_what_a_correction_reads_is_kept_as_long_as_needed() -> None:
    calls = compile_plan(PLAN, leansd.dissect(shallow_unet())).calls
    assert calls[4].correct == (0.3, 0.1)
    assert calls[4].corrects == ((Kept(HEAD, 2, "output"), Kept(HEAD, 1, "output")),)
    assert Kept(HEAD, 1, "output") in calls[4].releases
    assert Kept(HEAD, 2, "output") in calls[7].releases
    assert not calls[2].corrects


def test_guided_pipeline_with_half_batches_between() -> None:
    """Where some calls run one lane only, a correction still moves both lanes."""
    pipe = tiny_pipeline(unet=shallow_unet())
    plan = PLAN.guide("forecast", at=2)
    arguments: dict[str, Any] = {
        "prompt": "a cat",
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
        "output_type": "latent",
    }

    def draw(chosen: Plan) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        with leansd.inherit(pipe, chosen):
            return pipe(**arguments, generator=generator).images

    drawn = draw(plan)
    assert torch.isfinite(drawn).all()
    assert not torch.equal(drawn, draw(plan.correct(dict.fromkeys(WEIGHTS, 0.0))))


def test_corrections_survive_a_file(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN
    assert PLAN.fingerprint != PLAN.correct(dict.fromkeys(WEIGHTS, 0.0)).fingerprint


def test_senseless_corrections_are_refused() -> None:
    with pytest.raises(LeansdError, match="step 3 inherits head"):
        PLAN.correct({3: 0.1}).resolve(leansd.dissect(shallow_unet()))
    with pytest.raises(LeansdError, match="both halves"):
        PLAN.guide("inherit", at=4)
    with pytest.raises(LeansdError, match="give numbers"):
        PLAN.correct({4: float("nan")})
