"""Inherited denoised pictures: what samplers that add noise have of plans, and the search for them.

An output of such a run goes stale with every noise that is drawn; the picture that it shows does
not, and the rest of the present input is noise.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
)
from torch._dynamo.testing import CompileCounterWithBackend

import leansd
from leansd.core import Output, Player, lay_out_calls
from leansd.emoji.prompts import PROMPTS
from leansd.errors import LeansdError
from leansd.evaluation.fidelity import psnr
from leansd.evaluation.runs import CallSet, run_calls
from leansd.plans import Plan
from leansd.plans.methods import METHODS, NO_CORRECTION
from leansd.plans.resolve import PlanContext, resolve_plan
from leansd.runtime.clock import read_schedule
from leansd.runtime.context import describe_runs
from leansd.runtime.samplers import make_scheduler
from leansd.tuning.error_model import DENOISED, ErrorModel, Key, calibrate
from leansd.tuning.host import PipelineHost, keep_draws
from leansd.unets import predict_gain
from loops import sample
from tiny import tiny_pipeline, tiny_scheduler
from tiny_transformers import PIPELINES
from tiny_transformers import draw as draw_whole

STEPS = 6
KEYS = (0, 1, 3)
PLAN = Plan.between(KEYS, cut="head", steps=STEPS, how="denoised")
NOISY = {
    "euler-a": EulerAncestralDiscreteScheduler.from_config(tiny_scheduler().config),
    "dpm++sde": DPMSolverMultistepScheduler.from_config(
        tiny_scheduler().config, algorithm_type="sde-dpmsolver++"
    ),
    "ddim": DDIMScheduler.from_config(tiny_scheduler().config),
}


def draw(pipe: Any, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipe("a", num_inference_steps=STEPS, generator=generator, output_type="latent").images


# -- the picture -----------------------------------------------------------------------------------

SIGMAS = {"noise": [9.0, 2.0, 0.3], "flow": [0.95, 0.5, 0.1]}


@pytest.mark.parametrize("output", get_args(Output))
def test_input_and_output_show_the_picture(output: Output) -> None:
    prediction = "flow" if output == "flow_prediction" else "noise"
    sigmas = SIGMAS[prediction]
    schedule = lay_out_calls(sigmas, prediction, output=output)  # type: ignore[arg-type]
    picture, noise = torch.randn(2, 5, dtype=torch.float64)
    for call, sigma in enumerate(sigmas):
        size = math.sqrt(1 + sigma**2)
        unscaled = picture + sigma * noise
        given, gives = {
            "epsilon": (unscaled / size, noise),
            "v_prediction": (unscaled / size, (noise - sigma * picture) / size),
            "sample": (unscaled / size, picture),
            "noise": (unscaled, noise),
            "flow_prediction": ((1 - sigma) * picture + sigma * noise, noise - picture),
        }[output]
        own, lead = schedule.denoise(call)
        assert torch.allclose(own * given + lead * gives, picture, atol=1e-6)


@pytest.mark.parametrize("name", NOISY)
def test_every_call_between_key_steps_shows_the_last_computed_picture(name: str) -> None:
    pipe = tiny_pipeline(scheduler=NOISY[name])
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watch(latents: torch.Tensor, *args: Any, **options: Any) -> Any:
        output = forward(latents, *args, **options)
        seen.append((latents.clone(), output[0].clone()))
        return output

    with leansd.inherit(pipe, PLAN) as run:
        forward = pipe.unet.forward
        pipe.unet.forward = watch
        draw(pipe)
        pipe.unet.forward = forward
    assert run.report().full_calls == len(KEYS)
    shares = torch.tensor(
        [float(pipe.scheduler.alphas_cumprod[int(t)]) for t in pipe.scheduler.timesteps]
    )
    pictures = [
        (latents - (1 - share).sqrt() * output) / share.sqrt()
        for (latents, output), share in zip(seen, shares, strict=True)
    ]
    for step, picture in enumerate(pictures):
        last = max(key for key in KEYS if key <= step)
        assert torch.allclose(picture, pictures[last], rtol=2e-2, atol=2e-2 * picture.abs().max())


CORRECTED = PLAN.correct({3: (0.3, 0.4)})


def test_a_correction_moves_the_picture_on() -> None:
    """`D + line (D - the line through the two before) + last (D - the one before)`."""
    pipe = tiny_pipeline(scheduler=NOISY["ddim"])
    with leansd.inherit(pipe, CORRECTED):
        drawn = draw(pipe)
    embeds, blank = pipe.encode_prompt("a", torch.device("cpu"), 1, True)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(STEPS)
    latents = torch.randn(1, *tuple(drawn.shape[1:]), generator=torch.Generator().manual_seed(3))
    known: list[tuple[float, torch.Tensor]] = []
    for step, timestep in enumerate(scheduler.timesteps):
        share = scheduler.alphas_cumprod[timestep].double()
        level = float((share / (1 - share)).log())
        signal, noise = share.sqrt(), (1 - share).sqrt()
        if step in KEYS:
            with torch.no_grad():
                rest, cond = pipe.unet(
                    torch.cat([latents, latents]), timestep, torch.cat([blank, embeds])
                )[0].chunk(2)
            output = rest + pipe.guidance_scale * (cond - rest)
            picture = (latents - noise * output) / signal
            moved = picture
            if step == 3:
                (early, first), (late, second) = known
                ahead = first + (level - early) / (late - early) * (second - first)
                moved = picture + 0.3 * (picture - ahead) + 0.4 * (picture - second)
            known.append((level, picture))
        else:
            moved = known[-1][1]
        output = ((latents - signal * moved) / noise).float()
        latents = scheduler.step(output, timestep, latents.float())[0]
    assert torch.allclose(latents, drawn, rtol=1e-3, atol=1e-3)


def test_a_player_corrects_as_the_runtime_does() -> None:
    scheduler = NOISY["ddim"]
    pipe = tiny_pipeline(scheduler=scheduler)
    with leansd.inherit(pipe, CORRECTED):
        expected = draw(pipe)
    scheduler.set_timesteps(STEPS)
    player, calls = Player(CORRECTED, read_schedule(scheduler)), itertools.count()
    forward = pipe.unet.forward

    def play(latents: torch.Tensor, timestep: Any, *args: Any, **options: Any) -> Any:
        compute = lambda: forward(latents, timestep, *args, **options)[0]  # noqa: E731
        return (player.play(next(calls), latents, compute, ("rest", "cond")),)

    pipe.unet.forward = play
    assert torch.equal(draw(pipe), expected)
    assert player.stats.computed == set(KEYS)


@pytest.mark.parametrize("name", NOISY)
def test_compiled_calls_have_the_same_bits(name: str) -> None:
    pipe, counter = tiny_pipeline(scheduler=NOISY[name]), CompileCounterWithBackend("eager")
    with leansd.inherit(pipe, CORRECTED):
        expected = draw(pipe)
    with leansd.inherit(pipe, CORRECTED, compile={"backend": counter}):
        assert torch.equal(draw(pipe), expected)
    assert counter.frame_count == 2


def test_exported_graphs_have_the_same_pictures(tmp_path: Path) -> None:
    pipe = tiny_pipeline(scheduler=NOISY["euler-a"])
    with leansd.inherit(pipe, PLAN):
        expected = draw(pipe)
    leansd.export(pipe, tmp_path, to="onnx", plan=PLAN)
    pipe.unet = leansd.load_onnx(tmp_path, pipe)  # type: ignore[assignment]
    assert torch.allclose(draw(pipe), expected, atol=1e-3)


@pytest.mark.parametrize("name", ["sd3", "flux", "z-image"])
def test_transformers_that_predict_a_flow(name: str) -> None:
    make, arguments = PIPELINES[name]
    pipe = make()
    whole = draw_whole(pipe, arguments, STEPS)
    with leansd.inherit(pipe, PLAN) as run:
        drawn = draw_whole(pipe, arguments, STEPS)
    assert run.report().full_calls == len(KEYS)
    assert not run.report().forced
    assert drawn.isfinite().all()
    assert not torch.equal(drawn, whole)


def test_a_loop_that_does_not_say_what_its_unet_predicts_is_computed() -> None:
    unet = tiny_pipeline().unet
    expected = sample(unet, STEPS)
    with leansd.inherit(unet, PLAN) as run, pytest.warns(UserWarning, match="predicts"):
        assert torch.equal(sample(unet, STEPS), expected)
    assert any("predicts" in note for note in run.report().notes)
    player = Player(PLAN, lay_out_calls([14.0, 9.0, 5.0, 2.0, 1.0, 0.2, 0.0]))
    assert "predicts" in player.reason


def test_only_the_whole_unet_shows_a_picture() -> None:
    plan = Plan.every(2, cut="mid", steps=STEPS, how="denoised")
    with pytest.raises(LeansdError, match="shows no denoised picture"):
        leansd.inherit(tiny_pipeline(), plan).__enter__()


# -- the search for plans --------------------------------------------------------------------------


def test_what_would_be_drawn_is_drawn_again() -> None:
    generator = torch.Generator().manual_seed(1)
    with keep_draws([generator, None]):
        first = torch.randn(3, generator=generator)
    assert torch.equal(torch.randn(3, generator=generator), first)


@pytest.mark.parametrize("name", ["euler-a", "dpm++sde"])
def test_the_error_model_foresees_what_a_segment_does_to_the_latents(name: str) -> None:
    """For a UNet that does not answer: its outputs are those of the full run, whatever it is
    given. Then the model is no model but what happens."""
    pipe = tiny_pipeline(scheduler=NOISY[name])
    host = PipelineHost(pipe, settings={"guidance_scale": 1.0}, sampler=name)
    calibration = calibrate(host, ["a"], STEPS, seed=0)
    assert calibration.adds_noise
    (run,) = calibration.runs
    own, lead = calibration.denoising.T
    keys, end = (Key(0), Key(1)), 4
    pictures = [
        own[index] * seen.sample + lead[index] * seen.output for index, seen in enumerate(run)
    ]
    judged = ErrorModel.of(calibration).judge(keys, end, DENOISED)
    assert judged.correct == NO_CORRECTION

    def steer(_: int, index: int, seen: Any, __: Any) -> torch.Tensor:
        between = keys[-1].step < index < end
        made = (pictures[1] - own[index] * seen.sample) / lead[index]
        return made if between else run[index].output

    _, (steered,) = host.draw(["a"], STEPS, seed=0, steer=steer)
    moved = (steered[end].previous - run[end].previous).double().square().mean()
    assert judged.error / calibration.error_gain[end + 1] == pytest.approx(float(moved), rel=1e-3)


def test_a_sampler_that_adds_noise_is_tuned_for(tmp_path: Path) -> None:
    pipe = tiny_pipeline(scheduler=NOISY["euler-a"])
    front = leansd.tune(
        pipe, ["a", "b", "c", "d"], steps=10, speeds=(2.0,), tries=1, sampler="euler-a",
        journal=tmp_path / "journal",
    )  # fmt: skip
    plan = next(each.plan for each in (*front.points, *front.dominated) if not each.is_plain)
    assert plan.steps == 10
    assert {row.inherit["head"] for row in plan.rows if not row.is_key} <= {"denoised", "reuse"}
    assert any(any(row.correction) for row in plan.rows)
    assert plan.tuned is not None
    assert plan.tuned.sampler == "euler-a"


@pytest.mark.parametrize("name", ["euler-a", "dpm++sde"])
def test_pictures_stay_nearer_than_with_inherited_outputs_or_fewer_steps(name: str) -> None:
    pipe: Any = leansd.load("emoji")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_scheduler(pipe, name)
    steps, keys = 12, (0, 1, 2, 4, 6, 8, 10)

    def paint(plan: Plan | None, steps: int = steps) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
        with leansd.inherit(pipe, plan or Plan.full(steps)):
            return pipe(
                list(PROMPTS[:4]), num_inference_steps=steps, guidance_scale=4.0,
                generator=generators, output_type="pt",
            ).images  # fmt: skip

    full = paint(None)
    kept, reused, forecast = (
        float(psnr(paint(Plan.between(keys, cut="head", steps=steps, how=how)), full).mean())
        for how in ("denoised", "reuse", "forecast")
    )
    fewer = float(psnr(paint(None, len(keys)), full).mean())
    assert kept > max(reused, forecast, fewer) + 2.0


def test_where_noise_is_drawn_a_deep_cut_beats_kept_pictures_at_the_same_cost() -> None:
    pipe: Any = leansd.load("emoji")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_scheduler(pipe, "euler-a")
    anatomy, steps = leansd.dissect(pipe.unet), 24

    def draw(plan: Plan) -> torch.Tensor:
        calls = CallSet(PROMPTS[:4], 0, 4, {"guidance_scale": 4.0})
        return run_calls(pipe, calls, steps, plan).pictures

    keys = [*range(8), *range(8, steps, 2)]
    kept = Plan.between(keys, cut="head", steps=steps, how="denoised")
    deep = Plan.between([0, 3, 5, 8, 10, 13, 15, 18, 20, 22], cut="up2.l1", steps=steps)
    assert predict_gain(deep, anatomy) > predict_gain(kept, anatomy)
    full = draw(Plan.full(steps))
    near, nearer = (float(psnr(draw(plan), full).mean()) for plan in (kept, deep))
    assert nearer > near + 2.0


def test_the_way_is_in_the_table_with_what_it_keeps() -> None:
    assert METHODS["denoised"].of == "denoised"
    assert METHODS["denoised"].takes_input
    assert not METHODS["reuse"].takes_input
    assert np.isclose(sum(METHODS["denoised"].weights(0.0, (0.0,), 1)), 1.0)


def test_a_sampler_that_no_plan_is_tuned_for_follows_those_of_euler_a_and_it_is_said_once() -> None:
    pipe: Any = tiny_pipeline(scheduler=DDPMScheduler.from_config(tiny_scheduler().config))
    context = describe_runs(pipe, PlanContext(12))
    resolved = resolve_plan("balanced", context)
    assert resolved.plan.fingerprint == leansd.preset("balanced", 12, sampler="euler-a").fingerprint
    assert resolved.notes == (
        "balanced is not tuned for ddpm: it is as for euler-a; tune a plan of your own",
    )
    assert not resolve_plan(resolved.plan, context).notes
    # So it is where only the sampler's name is known: for commands without a model, in Python.
    named = resolve_plan("balanced", PlanContext(12, "ddpm"))
    assert (named.plan.fingerprint, named.notes) == (resolved.plan.fingerprint, resolved.notes)
    assert leansd.preset("balanced", 12, sampler="ddpm").fingerprint == resolved.plan.fingerprint
