"""Guidance in ordinary pipelines: half the batch runs, and the pipeline does not notice."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPAGPipeline, StableDiffusionPipeline

import leansd
from conformance.models import small_unet
from conformance.reference import is_empty, watch_stores
from leansd.errors import LeansdError
from leansd.plans import Plan
from leansd.plans.compile import compile_plan
from leansd.runtime.clock import read_schedule
from tiny import tiny_pipeline, tiny_scheduler
from watching import watch_before

STEPS = 6
SCALE = 4.0


def draw(pipe: StableDiffusionPipeline, **options: Any) -> torch.Tensor:
    arguments: dict[str, Any] = {
        "prompt": "a cat",
        "num_inference_steps": STEPS,
        "guidance_scale": SCALE,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "latent",
    }
    return pipe(**(arguments | options)).images


def watch_batches(pipe: StableDiffusionPipeline) -> tuple[list[int], Callable[[], None]]:
    """The number of rows of every UNet call that really ran, and how to stop watching."""
    seen: list[int] = []
    handle = watch_before(
        pipe.unet.mid_block.resnets[0].norm1, lambda module, args: seen.append(args[0].shape[0])
    )
    return seen, handle.remove


def draw_by_reference(pipe: StableDiffusionPipeline, plan: Plan) -> torch.Tensor:
    """The same run with a UNet of its own for each lane, and guidance written out.

    The unconditional lane is a run of only those steps that compute guidance.
    """
    scheduler = tiny_scheduler()
    scheduler.set_timesteps(STEPS)
    over = read_schedule(scheduler).log_snr
    text, empty = pipe.encode_prompt("a cat", "cpu", 1, True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    features = Plan(tuple(type(row)(row.inherit) for row in plan.rows))
    of_rest = [index for index, row in enumerate(plan.rows) if row.guidance == "compute"]
    rest_plan = Plan(tuple(features.rows[index] for index in of_rest))
    cond_unet, rest_unet = copy.deepcopy(pipe.unet), copy.deepcopy(pipe.unet)
    differences: list[tuple[float, torch.Tensor]] = []
    with (
        torch.no_grad(),
        leansd.inherit(cond_unet, features),
        leansd.inherit(rest_unet, rest_plan),
    ):
        for index, t in enumerate(scheduler.timesteps):
            cond = cond_unet(latents, int(t), text).sample
            guidance = plan.rows[index].guidance
            if guidance == "compute":
                difference = cond - rest_unet(latents, int(t), empty).sample
                differences = [(over[index], difference), *differences[:1]]
            elif guidance == "inherit":
                difference = differences[0][1]
            elif guidance == "drop":
                difference = torch.zeros_like(cond)
            else:
                (here, latest), (there, before) = differences
                difference = latest + (latest - before) * (over[index] - here) / (here - there)
            noise = cond - difference + SCALE * difference
            latents = scheduler.step(noise, t, latents).prev_sample
    return latents


@pytest.mark.parametrize("guidance", ["inherit", "forecast", "drop"])
@pytest.mark.parametrize("cut", [None, "up1.l0", "up0"])
def test_guidance_and_features_together(guidance: Any, cut: str | None) -> None:
    pipe = tiny_pipeline(unet=small_unet())
    plan = Plan.full(STEPS).guide(guidance, at=[2, 3, 5])
    if cut is not None:
        plan = plan.inherit(cut, at=[1, 3, 4])
    expected = draw_by_reference(pipe, plan)
    seen, stop = watch_batches(pipe)
    with leansd.inherit(pipe, plan):
        result = draw(pipe)
    stop()
    computing = [index for index, row in enumerate(plan.rows) if not row.inherit]
    assert seen == [2 if plan.rows[index].guidance == "compute" else 1 for index in computing]
    assert torch.allclose(result, expected, atol=2e-4)
    assert not torch.allclose(result, draw(pipe), atol=2e-4)


def test_nothing_is_kept_afterwards_and_memory_is_the_bound() -> None:
    pipe = tiny_pipeline(unet=small_unet())
    plan = Plan.every(2, cut="up1.l0", steps=STEPS).guide("inherit", at=[2, 3])
    with leansd.inherit(pipe, plan) as run, watch_stores() as stores:
        first = draw(pipe)
        assert stores
        assert all(map(is_empty, stores))
        assert torch.equal(draw(pipe), first)
    program = compile_plan(plan, leansd.dissect(pipe.unet))
    lane, noise = 32 * 8 * 8 * 4, 4 * 8 * 8 * 4  # one lane of up1.l0's output, and of the UNet's
    sizes = []
    for call, before in zip(program.calls, (frozenset(), *program.alive), strict=False):
        held = before.union(*call.keeps.values())
        sizes.append(sum(noise if kept.what == "difference" else lane for kept in held))
    assert run.report().bytes_kept == max(sizes)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": ["a cat", "a dog"]},
        {"num_images_per_prompt": 2},
        {"guidance_rescale": 0.7},
        {"negative_prompt": "blue"},
    ],
)
def test_calls_that_users_make(options: dict[str, Any]) -> None:
    """Inheriting at no step is bit-equal; inheriting at some is close and takes half the batch."""
    pipe = tiny_pipeline(unet=small_unet())
    expected = draw(pipe, **options)
    with leansd.inherit(pipe, Plan.full(STEPS)):
        assert torch.equal(draw(pipe, **options), expected)
    seen, stop = watch_batches(pipe)
    with leansd.inherit(pipe, Plan.full(STEPS).guide("inherit", at=[3])):
        result = draw(pipe, **options)
    stop()
    assert result.shape == expected.shape
    assert seen[3] * 2 == seen[2]
    assert not torch.equal(result, expected)


def test_dropped_guidance_is_no_guidance() -> None:
    """After the gate the run is that of a pipeline whose guidance was switched off there."""
    pipe = tiny_pipeline(unet=small_unet())

    def cut_off(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            pipe._guidance_scale = 1.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"][-1:]
        return tensors

    options = {
        "callback_on_step_end": cut_off,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    expected = draw(pipe, **options)
    with leansd.inherit(pipe, Plan.full(STEPS).guide("drop", at=range(3, STEPS))):
        result = draw(pipe)
    assert torch.allclose(result, expected, atol=1e-4)


def test_guidance_off_makes_the_axis_mean_nothing() -> None:
    pipe = tiny_pipeline(unet=small_unet())
    expected = draw(pipe, guidance_scale=1.0)
    with leansd.inherit(pipe, Plan.full(STEPS).guide("inherit", at=[2, 3])):
        assert torch.equal(draw(pipe, guidance_scale=1.0), expected)


def test_three_way_batches_run_in_full() -> None:
    """Perturbed-attention guidance counts on all its parts being there."""
    pipe = StableDiffusionPAGPipeline(
        **tiny_pipeline(unet=small_unet()).components,
        requires_safety_checker=False,
        pag_applied_layers=["mid"],
    )
    pipe.set_progress_bar_config(disable=True)
    expected = draw(pipe, pag_scale=2.0)
    with leansd.inherit(pipe, Plan.full(STEPS).guide("inherit", at=[2, 3])):
        assert torch.equal(draw(pipe, pag_scale=2.0), expected)
    with leansd.inherit(pipe, Plan.every(2, cut="up1.l0", steps=STEPS)) as run:
        draw(pipe, pag_scale=2.0)
    assert run.report().full_calls == STEPS // 2


def test_first_step_must_compute_guidance() -> None:
    with pytest.raises(LeansdError, match="step 0 must compute guidance"):
        Plan.full(3).guide("inherit", at=0)
    with pytest.raises(LeansdError, match="step 1: unknown guidance 'none'; it can compute"):
        Plan.full(3).guide("none", at=1)  # type: ignore[arg-type]


def test_guidance_survives_a_file(tmp_path: Any) -> None:
    plan = Plan.full(4).guide("forecast", at=2).inherit("mid", at=3)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.fingerprint != Plan.full(4).inherit("mid", at=3).fingerprint
