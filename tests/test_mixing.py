"""Mixed outputs: what the sampler gets is the sum that the plan says, or the run is refused."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from diffusers.guiders import ClassifierFreeGuidance

import leansd
from conformance.models import draw_mask, draw_picture
from conformance.test_modular import draw as draw_modular
from conformance.test_modular import make_modular
from leansd.errors import LeansdError
from leansd.plans import Plan
from leansd.plans.methods import Mix
from leansd.plans.plan import Tuned
from leansd.runtime.clock import read_schedule
from leansd.tuning.host import Seen, tap
from tiny import shallow_unet, tiny_pipeline, tiny_scheduler

STEPS = 7
SCALE = 3.0
KEYS = (0, 1, 3, 5)
FRAME = Plan.between(KEYS, cut="head", steps=STEPS, how="forecast")
BY_LANE = {
    0: Mix(0.05, (0.9,), (0.2,)),
    1: Mix(-0.1, (-0.4, 1.5), (0.1, -0.3)),
    3: Mix(0.02, (0.2, -0.5, 1.2), (0.0, 0.4, 0.2)),
    5: Mix(0.0, (0.0, 0.3, -0.6, 1.3), (-0.1, 0.0, 0.2, -0.2)),
}
PLAN = FRAME.mix(BY_LANE)
WITHOUT_LANES = FRAME.mix({step: row._replace(difference=()) for step, row in BY_LANE.items()})
SAMPLERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpm++2m": DPMSolverMultistepScheduler,
}


@cache
def make_pipe(sampler: str = "ddim", use: str = "all") -> Any:
    """A pipeline; what changes it has one of its own `use`."""
    scheduler = SAMPLERS[sampler].from_config(tiny_scheduler().config)
    return tiny_pipeline(unet=shallow_unet(), scheduler=scheduler)


def draw(pipe: Any, plan: Plan | None = None, **options: Any) -> torch.Tensor:
    arguments: dict[str, Any] = {
        "prompt": ["a cat", "a dog"],
        "num_inference_steps": STEPS,
        "guidance_scale": SCALE,
        "output_type": "latent",
        "generator": [torch.Generator().manual_seed(seed) for seed in (0, 1)],
    } | options
    if plan is None:
        return pipe(**arguments).images
    with leansd.inherit(pipe, plan):
        return pipe(**arguments).images


def write_out(pipe: Any, plan: Plan, scale: float) -> Callable[..., Any]:
    """A UNet's forward that does what the plan says, in the plainest words."""
    forward = pipe.unet.forward
    raws: list[tuple[float, torch.Tensor]] = []
    places: list[float] = []
    guided: list[tuple[torch.Tensor, torch.Tensor]] = []
    begun: list[torch.Tensor] = []

    def replay(latents: torch.Tensor, t: Any, **inputs: Any) -> tuple[torch.Tensor]:
        over = read_schedule(pipe.scheduler).log_snr
        step = len(places)
        places.append(over[step])
        begun.append(latents)
        row = plan.rows[step]
        if not row.is_key:
            (before, old), (last, new) = raws[-2:] if len(raws) > 1 else raws * 2
            share = 0.0 if last == before else (over[step] - last) / (last - before)
            return (new + share * (new - old),)
        raw = forward(latents, t, **inputs)[0]
        if row.guidance != "compute":
            gaps = [(place, each.chunk(2)[1] - each.chunk(2)[0]) for place, each in raws[-2:]]
            (before, old), (last, new) = gaps
            gap = new + (over[step] - last) / (last - before) * (new - old)
            raw = torch.cat([raw.chunk(2)[1] - gap, raw.chunk(2)[1]])
        raws.append((over[step], raw))
        rest, cond = raw.chunk(2) if scale > 1 else (raw, raw)
        guided.append((rest + scale * (cond - rest), cond - rest))
        if row.mix is None:
            return (raw,)
        mixed = row.mix.start * begun[0][-len(rest) :]
        for each, own in zip(guided, row.mix.guided, strict=True):
            mixed = mixed + own * each[0]
        for each, own in zip(guided, row.mix.difference, strict=False):
            mixed = mixed + own * each[1]
        return (torch.cat([mixed] * (len(raw) // len(mixed))),)

    return replay


@pytest.mark.parametrize(
    ("sampler", "plan", "scale"),
    [
        ("ddim", PLAN, SCALE),
        ("euler", PLAN, SCALE),
        ("dpm++2m", PLAN, SCALE),
        ("dpm++2m", WITHOUT_LANES, 1.0),
        ("ddim", PLAN.guide("forecast", at=5), SCALE),
        ("ddim", PLAN, 6.0),
    ],
    ids=["ddim", "euler", "dpm++2m", "unguided", "half a call", "another scale"],
)
def test_the_sampler_gets_the_sum(
    monkeypatch: pytest.MonkeyPatch, sampler: str, plan: Plan, scale: float
) -> None:
    pipe = make_pipe(sampler)
    drawn = draw(pipe, plan, guidance_scale=scale)
    plain = draw(pipe, guidance_scale=scale)
    assert "step" not in vars(pipe.scheduler)
    monkeypatch.setattr(pipe.unet, "forward", write_out(pipe, plan, scale))
    expected = draw(pipe, guidance_scale=scale)
    assert torch.allclose(drawn, expected, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(drawn, plain, atol=1e-2)


def list_identities(keys: tuple[int, ...], *, lanes: bool) -> dict[int, Mix]:
    rows = {}
    for count, step in enumerate(keys):
        nothing = (0.0,) * count
        rows[step] = Mix(0.0, (*nothing, 1.0), (*nothing, 0.0) if lanes else ())
    return rows


@pytest.mark.parametrize("scale", [SCALE, 1.0])
@pytest.mark.parametrize("plan", [Plan.full(STEPS), FRAME, FRAME.guide("inherit", at=3)])
def test_a_mix_of_the_output_alone_is_no_mix(plan: Plan, scale: float) -> None:
    pipe = make_pipe("dpm++2m")
    same = plan.mix(list_identities(plan.keys, lanes=scale > 1))
    drawn = draw(pipe, same, guidance_scale=scale)
    assert torch.equal(drawn, draw(pipe, plan, guidance_scale=scale))


def test_half_precision_is_weighed_in_single() -> None:
    """In half precision the sum is rounded once, so that it differs as little as the output."""
    pipe = make_pipe(use="half").to(torch.bfloat16)
    same = FRAME.mix(list_identities(KEYS, lanes=True))
    drawn, plain = draw(pipe, same), draw(pipe, FRAME)
    assert drawn.dtype == torch.bfloat16
    assert torch.allclose(drawn, plain, atol=0.02 * float(plain.abs().max()))


def test_compiled_calls_are_mixed_as_eager_ones() -> None:
    pipe = make_pipe()
    drawn = draw(pipe, PLAN)
    with leansd.inherit(pipe, PLAN, compile={"backend": "eager"}):
        assert torch.equal(draw(pipe), drawn)


ADAMS = {
    step: Mix(0.0, (0.0,) * (step - 1) + ((-0.5, 1.5) if step else (1.0,))) for step in range(STEPS)
}
"""Adams and Bashforth's second order, whose first step is Euler's."""


@pytest.mark.parametrize("kind", ["one batch", "two calls", "two calls as first written"])
def test_a_known_solver_is_a_mix_of_the_host(kind: str) -> None:
    """Also where a pipeline calls the lanes apart, the conditional one first."""
    if kind == "one batch":
        pipe, draw_one = make_pipe(), draw
    else:
        first = "first" in kind
        guider = ClassifierFreeGuidance(
            guidance_scale=SCALE - first, use_original_formulation=first
        )
        pipe = make_modular(guider, "ddim")

        def draw_one(pipe: Any, plan: Plan | None = None) -> torch.Tensor:
            if plan is None:
                return draw_modular(pipe, num_inference_steps=STEPS)
            with leansd.inherit(pipe, plan):
                return draw_modular(pipe, num_inference_steps=STEPS)

    before: list[torch.Tensor] = []

    def steer(run: int, index: int, seen: Seen, step: Any) -> torch.Tensor:
        before.append(seen.output)
        return 1.5 * seen.output - 0.5 * before[-2] if index else seen.output

    with tap(pipe.scheduler, steer):
        expected = draw_one(pipe)
    drawn = draw_one(pipe, Plan.full(STEPS).mix(ADAMS))
    assert torch.allclose(drawn, expected, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(drawn, draw_one(pipe), atol=1e-3)


# -- where it cannot be followed -------------------------------------------------------------------


def as_image_to_image(pipe: Any) -> dict[str, Any]:
    return {"image": draw_picture(), "strength": 0.5}


def as_inpainting(pipe: Any) -> dict[str, Any]:
    return {"image": draw_picture(), "mask_image": draw_mask(), "strength": 1.0}


def edit_latents(pipe: Any, step: int, t: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    if step == 2:
        inputs["latents"] = inputs["latents"] * 1.01
    return inputs


def edit_in_place(pipe: Any, step: int, t: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    inputs["latents"].mul_(1.01)
    return inputs


def copy_latents(pipe: Any, step: int, t: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    return {"latents": inputs["latents"].clone()}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"callback_on_step_end": edit_latents}, "latents were changed"),
        ({"callback_on_step_end": edit_in_place}, "latents were changed"),
        ({"guidance_rescale": 0.5}, "guidance_rescale"),
        ({"guidance_scale": 1.0}, "no guidance"),
    ],
)
def test_runs_that_are_no_sum_since_their_start_are_refused(
    options: dict[str, Any], why: str
) -> None:
    pipe = make_pipe()
    with pytest.raises(LeansdError, match=why):
        draw(pipe, PLAN, **options)
    assert "step" not in vars(pipe.scheduler)
    assert torch.isfinite(draw(pipe, PLAN)).all()


@pytest.mark.parametrize(
    ("kind", "arguments", "why"),
    [
        (StableDiffusionImg2ImgPipeline, as_image_to_image, "begins at step"),
        (StableDiffusionInpaintPipeline, as_inpainting, "inpainting"),
    ],
)
def test_pipelines_that_start_from_pictures_are_refused(
    kind: Any, arguments: Callable[[Any], dict[str, Any]], why: str
) -> None:
    base = make_pipe()
    pipe = kind(**base.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(LeansdError, match=why):
        draw(pipe, PLAN, prompt="a cat", generator=None, **arguments(pipe))


def test_a_sampler_with_two_calls_a_step_and_a_bare_unet_are_refused() -> None:
    pipe = make_pipe(use="heun")
    pipe.scheduler = HeunDiscreteScheduler.from_config(tiny_scheduler().config)
    with pytest.raises(LeansdError, match="one call a step"):
        draw(pipe, PLAN)
    with pytest.raises(LeansdError, match="bare UNet"):
        leansd.inherit(pipe.unet, PLAN)


def test_a_callback_that_only_looks_changes_nothing() -> None:
    pipe = make_pipe()
    assert torch.equal(draw(pipe, PLAN, callback_on_step_end=copy_latents), draw(pipe, PLAN))


def test_a_run_that_starts_over_midway_mixes_no_more() -> None:
    """From a change on, what is computed is given as it is, and the report says why."""
    pipe = make_pipe()

    def change(pipe: Any, step: int, t: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            inputs["prompt_embeds"] = inputs["prompt_embeds"] * 1.5
        return inputs

    late = {step: row for step, row in BY_LANE.items() if step > 2}
    names = ["latents", "prompt_embeds"]
    options = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": names}
    identities = list_identities(KEYS, lanes=True)
    with leansd.inherit(pipe, FRAME.mix(identities | late)) as run:
        drawn = draw(pipe, **options)
    assert run.report().forced
    assert torch.equal(drawn, draw(pipe, FRAME, **options))


def test_it_warns_where_the_scale_is_not_the_fitted_one() -> None:
    pipe = make_pipe()
    plan = replace(PLAN, tuned=Tuned("ddim", "", SCALE))
    with pytest.warns(UserWarning, match="guidance 3, not 5"):
        draw(pipe, plan, guidance_scale=5.0)


# -- as data ---------------------------------------------------------------------------------------


def test_mixes_survive_a_file_that_older_readers_refuse_in_words(tmp_path: Path) -> None:
    for plan, version in ((PLAN, 2), (WITHOUT_LANES, 2), (FRAME.correct({3: 0.5}), 1)):
        plan.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json") == plan
        assert f'"version": {version}' in (tmp_path / "plan.json").read_text()
    assert len({each.fingerprint for each in (PLAN, WITHOUT_LANES, FRAME)}) == 3
    assert "4 mixed" in str(PLAN)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: PLAN.guard("sample", threshold=0.1), "drift"),
        (lambda: FRAME.correct({3: 0.5}).mix({5: BY_LANE[5]}), "step 3 corrects"),
        (lambda: FRAME.mix({5: Mix(float("nan"), (1.0,) * 4)}), "give numbers"),
        (lambda: FRAME.mix({5: Mix(0.0, (1.0,) * 4, (1.0,))}), "as many weights"),
        (lambda: PLAN.fit(12), "cannot be stretched"),
        (lambda: leansd.inherit(shallow_unet(), FRAME.mix({5: Mix(0.0, (1.0,) * 3)})), "mixes 3"),
        (lambda: FRAME.mix({4: BY_LANE[5]}).resolve(leansd.dissect(shallow_unet())), "inherits"),
        (lambda: Plan.from_dict({"steps": 1, "rows": [{"correct": {"guide": [1]}}]}), "guide"),
    ],
)
def test_mixes_that_mean_nothing_are_refused(make: Callable[[], Any], why: str) -> None:
    with pytest.raises(LeansdError, match=why):
        make()
