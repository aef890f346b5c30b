"""What users do to a pipeline while it is attached, and how they call its UNet themselves."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel, UNetMotionModel

import leansd
from conformance.cases import STEPS, Call, build_controlnet, build_sd, build_xl, text
from conformance.models import draw_picture, load_ip_adapter, make_pipeline, tiny_lora
from conformance.reference import (
    count_predicted,
    draw,
    is_empty,
    is_plain,
    overwrite,
    predict,
    watch_ends,
    watch_stores,
)
from conformance.samplers import SAMPLERS
from leansd.anatomy import read_anatomy
from leansd.errors import LeansdError
from leansd.plans import Anatomy, Plan
from leansd.plans.compile import compile_plan
from leansd.plans.methods import Mix
from loops import count_calls
from tiny import TOKENS, WIDTH

DDIM = SAMPLERS["ddim"]
PLAN = Plan.every(2, cut="up1.l1", steps=STEPS)


@pytest.fixture
def pipe() -> Any:
    return build_sd(DDIM.make())


def draw_by_force(pipe: Any, plan: Plan, anatomy: Anatomy, call: Call | None = None) -> Any:
    """What the plan has to give, by brute force and without the engine."""
    call = call or text()
    pipe.scheduler.set_timesteps(plan.steps)
    calls = predict(plan, anatomy, DDIM, call, pipe.scheduler.timesteps.tolist())
    with overwrite(pipe, anatomy, calls):
        return draw(pipe, call)


# -- weights that come and go ----------------------------------------------------------------


@pytest.mark.parametrize("cut", ["up1.l1", "*.attn", "stem"])
def test_lora_loaded_scaled_fused_and_unloaded_while_attached(pipe: Any, cut: str) -> None:
    plain, anatomy = draw(pipe, text()), read_anatomy(pipe.unet)
    plan = Plan.every(2, cut=cut, steps=STEPS)
    expected = draw_by_force(pipe, plan, anatomy)
    state = tiny_lora(pipe.unet, "to_q", "to_v", "conv1", "proj_in")
    counts = []

    def check() -> torch.Tensor:
        """Bit-equal to brute force by the weights of now, at the predicted cost."""
        forced.append(draw_by_force(twin, plan, anatomy))
        with count_calls(pipe.unet, anatomy) as count:
            latents = draw(pipe, text())
        counts.append(count)
        assert torch.equal(latents, forced[-1])
        return latents

    twin, forced = build_sd(DDIM.make()), []
    with leansd.inherit(pipe, plan):
        assert torch.equal(check(), expected)
        for each in (pipe, twin):
            each.load_lora_weights(state, adapter_name="one")
        assert not torch.equal(check(), expected)
        for each in (pipe, twin):
            each.set_adapters("one", 0.5)
        assert not torch.equal(check(), forced[-2])
        for each in (pipe, twin):
            each.fuse_lora()
        check()
        for each in (pipe, twin):
            each.unfuse_lora()
            each.unload_lora_weights()
        check()
        for each in (pipe, twin):
            each.load_lora_weights(state, adapter_name="two")
        check()
    assert all(count == counts[0] for count in counts)
    pipe.unload_lora_weights()
    assert is_plain(pipe.unet)
    # Fusing and unfusing costs the last bits.
    assert torch.allclose(draw(pipe, text()), plain, rtol=1e-3, atol=1e-4)


def test_ip_adapter_loaded_and_unloaded_while_attached(pipe: Any) -> None:
    anatomy = read_anatomy(pipe.unet)
    plain, expected = draw(pipe, text()), draw_by_force(pipe, PLAN, anatomy)
    with_image = text(ip_adapter_image_embeds=[torch.ones(2, 1, WIDTH)])
    twin = load_ip_adapter(build_sd(DDIM.make()))
    with leansd.inherit(pipe, PLAN):
        assert torch.equal(draw(pipe, text()), expected)
        load_ip_adapter(pipe)
        assert torch.equal(draw(pipe, with_image), draw_by_force(twin, PLAN, anatomy, with_image))
        pipe.unload_ip_adapter()
        assert torch.equal(draw(pipe, text()), expected)
    assert torch.equal(draw(pipe, text()), plain)


def test_freeu_switched_while_attached(pipe: Any) -> None:
    anatomy = read_anatomy(pipe.unet)
    expected = draw_by_force(pipe, PLAN, anatomy)
    with leansd.inherit(pipe, PLAN):
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=1.4)
        assert not torch.equal(draw(pipe, text()), expected)
        pipe.disable_freeu()
        assert torch.equal(draw(pipe, text()), expected)


def test_dtype_changed_while_attached(pipe: Any) -> None:
    with leansd.inherit(pipe, PLAN):
        single = draw(pipe, text())
        assert draw(pipe.to(torch.bfloat16), text()).dtype == torch.bfloat16
        assert draw(pipe.to(torch.float32), text()).dtype == single.dtype


@pytest.mark.parametrize("cut", ["stem", "dn*"])
def test_lora_on_the_ends_loaded_and_unloaded_while_attached(pipe: Any, cut: str) -> None:
    """Peft puts another module in the place of a hooked one; that one follows the plan, too."""
    anatomy, twin = read_anatomy(pipe.unet), build_sd(DDIM.make())
    plan = Plan.every(2, cut=cut, steps=STEPS).inherit("stem", at=[1, 3])
    state = tiny_lora(pipe.unet, "conv_in", "conv_out")
    expected = draw_by_force(twin, plan, anatomy)
    twin.load_lora_weights(state)
    with_lora = draw_by_force(twin, plan, anatomy)
    for _ in range(2):
        with leansd.inherit(pipe, plan):
            assert torch.equal(draw(pipe, text()), expected)
            pipe.load_lora_weights(state)
            with count_calls(pipe.unet, anatomy) as counts:
                assert torch.equal(draw(pipe, text()), with_lora)
            assert counts == count_predicted(compile_plan(plan, anatomy).calls)
        assert is_plain(pipe.unet)
        # Now it is attached with the LoRA, and that goes.
        with leansd.inherit(pipe, plan):
            assert torch.equal(draw(pipe, text()), with_lora)
            pipe.unload_lora_weights()
            assert torch.equal(draw(pipe, text()), expected)
        assert is_plain(pipe.unet)


def test_lora_loaded_on_the_ends_in_the_midst_of_a_run(pipe: Any) -> None:
    state = tiny_lora(pipe.unet, "conv_in", "conv_out")
    plan = Plan.every(2, cut="stem", steps=STEPS).inherit("up1.l1", at=4)

    def load(pipe: Any, step: int, moment: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe.load_lora_weights(state)
        return inputs

    with leansd.inherit(pipe, plan):
        assert draw(pipe, text(callback_on_step_end=load)).isfinite().all()
    assert is_plain(pipe.unet)


# -- copies and files ------------------------------------------------------------------------


def test_copy_made_while_attached_is_plain_and_stays(pipe: Any) -> None:
    plain = draw(pipe, text())
    with leansd.inherit(pipe, PLAN):
        planned = draw(pipe, text())
        twin = make_pipeline("StableDiffusionPipeline", copy.deepcopy(pipe.unet), DDIM.make())
        assert torch.equal(draw(twin, text()), plain)
        assert torch.equal(draw(pipe, text()), planned)
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.zero_()
    assert torch.equal(draw(twin, text()), plain)
    with leansd.inherit(twin, PLAN):
        assert torch.equal(draw(twin, text()), planned)
    assert torch.equal(draw(twin, text()), plain)


def test_saved_while_attached_loads_as_it_was(pipe: Any, tmp_path: Path) -> None:
    plain, before = draw(pipe, text()), dict(pipe.unet.state_dict())
    with leansd.inherit(pipe, PLAN):
        draw(pipe, text())
        assert list(pipe.unet.state_dict()) == list(before)
        pipe.save_pretrained(tmp_path)
        read = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
        read.set_progress_bar_config(disable=True)
        assert torch.equal(draw(read, text()), plain)
        pipe.unet.load_state_dict(before)
    loaded = read.unet.state_dict()
    assert list(loaded) == list(before)
    assert all(torch.equal(loaded[key], value) for key, value in before.items())


# -- attaching and failing -------------------------------------------------------------------


def test_attached_twice_is_refused_and_does_no_harm(pipe: Any) -> None:
    with leansd.inherit(pipe, PLAN):
        planned = draw(pipe, text())
        with pytest.raises(LeansdError, match="already attached"), leansd.inherit(pipe, PLAN):
            pass
        with pytest.raises(LeansdError, match="already attached"):
            leansd.inherit_(pipe, "deepcache")
        assert torch.equal(draw(pipe, text()), planned)
    assert is_plain(pipe.unet)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_exception_midway_leaves_a_working_pipeline(pipe: Any, stage: int) -> None:
    plain = draw(pipe, text())

    def fail(pipe: Any, step: int, moment: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        if step == stage:
            raise KeyboardInterrupt
        return inputs

    with leansd.inherit(pipe, PLAN), watch_stores() as stores:
        planned = draw(pipe, text())
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, text(callback_on_step_end=fail))
        assert torch.equal(draw(pipe, text()), planned)
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, text(callback_on_step_end=fail))
    # A run that is broken off between two calls of the UNet is dropped when its plan is left.
    assert is_plain(pipe.unet)
    assert stores
    assert torch.equal(draw(pipe, text()), plain)


def test_interrupted_run_keeps_nothing(pipe: Any) -> None:
    def interrupt(pipe: Any, step: int, moment: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 2
        return inputs

    with leansd.inherit(pipe, PLAN), watch_stores() as stores, watch_ends() as left:
        planned = draw(pipe, text())
        draw(pipe, text(callback_on_step_end=interrupt))
        assert left[0] == 0
        assert left[1] > 0
        assert stores
        assert all(map(is_empty, stores))
        assert torch.equal(draw(pipe, text()), planned)
    assert is_plain(pipe.unet)


def test_interrupted_controlnet_keeps_nothing() -> None:
    pipe = build_controlnet(DDIM.make())
    plan = Plan.every(STEPS, cut="mid", steps=STEPS).inherit("dn*", at=[1, 2, 3])

    def interrupt(pipe: Any, step: int, moment: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return inputs

    hint = {"image": draw_picture()}
    with leansd.inherit(pipe, plan) as run, watch_ends() as left:
        draw(pipe, text(callback_on_step_end=interrupt, **hint))
        assert left[0] > 0
        assert run._follower.run is None


def test_call_within_a_call_does_not_end_it(pipe: Any) -> None:
    """A preview drawn on the same UNet in a callback leaves the run as it is."""
    other = make_pipeline("StableDiffusionPipeline", pipe.unet, DDIM.make())
    with leansd.inherit(pipe, PLAN):
        planned = draw(pipe, text())

    def preview(pipe: Any, step: int, moment: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        draw(other, text())
        return inputs

    with leansd.inherit(pipe, PLAN):
        assert torch.equal(draw(pipe, text(callback_on_step_end=preview)), planned)
        with leansd.inherit(other, Plan.every(3, cut="mid", steps=STEPS)):
            assert torch.equal(draw(pipe, text(callback_on_step_end=preview)), planned)


PREVIEWED = {
    "parts": PLAN,
    "guidance": Plan.full(STEPS).guide("inherit", at=[1, 3]),
    "guarded": PLAN.guard("sample", threshold=1e9),
    "mixed": Plan.between([0, 2], cut="head", steps=STEPS, how="forecast").mix(
        {2: Mix(0.1, (0.0, 0.9), (0.0, 0.2))}
    ),
}


@pytest.mark.parametrize("name", PREVIEWED)
def test_a_preview_by_a_pipeline_of_the_same_parts_leaves_the_run_as_it_is(
    pipe: Any, name: str
) -> None:
    """It has the scheduler in common, and is not attached."""
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    plain, previews = draw(pipe, text()), list[torch.Tensor]()

    def preview(pipe: Any, step: int, moment: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        previews.append(draw(other, text()))
        return inputs

    with leansd.inherit(pipe, PREVIEWED[name]):
        planned = draw(pipe, text())
        assert torch.equal(draw(pipe, text(callback_on_step_end=preview)), planned)
    assert all(torch.equal(each, plain) for each in previews)


@pytest.mark.parametrize("name", PREVIEWED)
def test_a_preview_by_the_same_pipeline_leaves_the_run_as_it_is(pipe: Any, name: str) -> None:
    """Each of the runs within one another follows the plan, also beside one that fails."""
    plan, previews = PREVIEWED[name], list[torch.Tensor]()
    anatomy = read_anatomy(pipe.unet)

    def preview(pipe: Any, step: int, moment: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        if step in (0, 2):
            previews.append(draw(pipe, text()))
        else:
            with pytest.raises(KeyboardInterrupt):
                draw(pipe, text(callback_on_step_end=fail))
        return inputs

    def fail(pipe: Any, step: int, moment: Any, inputs: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with leansd.inherit(pipe, plan) as run, watch_stores() as stores:
        with count_calls(pipe.unet, anatomy) as once:
            planned = draw(pipe, text())
        with count_calls(pipe.unet, anatomy) as counts:
            assert torch.equal(draw(pipe, text(callback_on_step_end=preview)), planned)
        assert all(torch.equal(each, planned) for each in previews)
        # One run, two previews, and a step of each of the others.
        assert all(counts[at] == 3 * once[at] + STEPS - 2 for at in counts)
        assert run.report().calls == STEPS
        assert all(map(is_empty, stores))
    assert is_plain(pipe.unet)


def test_end_of_call_is_handed_on_to_whoever_was_there_before(pipe: Any) -> None:
    ends: list[str] = []
    pipe.unet._reset_stateful_cache = lambda: ends.append("end")
    with leansd.inherit(pipe, PLAN):
        draw(pipe, text())
        twin = make_pipeline("StableDiffusionPipeline", copy.deepcopy(pipe.unet), DDIM.make())
        with leansd.inherit(twin, PLAN):
            draw(twin, text())
    draw(pipe, text())
    assert ends == ["end"] * 3


# -- other kinds of calls --------------------------------------------------------------------


def make_inputs(batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(batch, 4, 8, 8, generator=generator)
    return start, torch.randn(batch, TOKENS, WIDTH, generator=generator)


def call_by_keywords(unet: UNet2DConditionModel, start: Any, t: Any, words: Any) -> Any:
    return unet(sample=start, timestep=t, encoder_hidden_states=words).sample


def call_with_integers(unet: UNet2DConditionModel, start: Any, t: Any, words: Any) -> Any:
    return unet(start, int(t), words, return_dict=False)[0]


def call_with_floats(unet: UNet2DConditionModel, start: Any, t: Any, words: Any) -> Any:
    return unet(start, timestep=float(t), encoder_hidden_states=words).sample


def call_with_a_batch_of_steps(unet: UNet2DConditionModel, start: Any, t: Any, words: Any) -> Any:
    return unet(start, t.expand(start.shape[0]), words).sample


CALLS = (call_by_keywords, call_with_integers, call_with_floats, call_with_a_batch_of_steps)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("bare", [False, True])
def test_raw_loops(pipe: Any, call: Any, bare: bool) -> None:
    """A loop of one's own, attached to the pipeline or to the bare UNet, twice."""
    anatomy = read_anatomy(pipe.unet)
    start, words = make_inputs(2)

    def run() -> torch.Tensor:
        pipe.scheduler.set_timesteps(STEPS)
        latents = start
        for t in pipe.scheduler.timesteps:
            noise = call(pipe.unet, latents, t, words)
            latents = pipe.scheduler.step(noise, t, latents).prev_sample
        return latents

    with torch.no_grad():
        plain = run()
        calls = compile_plan(PLAN, anatomy).calls
        with overwrite(pipe, anatomy, calls):
            expected = run()
        with leansd.inherit(pipe.unet if bare else pipe, PLAN), watch_stores() as stores:
            with count_calls(pipe.unet, anatomy) as counts:
                assert torch.equal(run(), expected)
            assert counts == count_predicted(calls)
            assert torch.equal(run(), expected)
            assert stores
            assert all(map(is_empty, stores))
        assert torch.equal(run(), plain)


def test_refiner_goes_on_where_the_base_has_stopped() -> None:
    """SDXL's base and refiner share a run: each follows the plan over its own part of it."""
    base = build_xl(SAMPLERS["ddim"].make())
    refiner = make_pipeline("StableDiffusionXLImg2ImgPipeline", base.unet, SAMPLERS["ddim"].make())
    steps = 8
    plan = Plan.every(2, cut="up2.l1", steps=steps)
    anatomy = read_anatomy(base.unet)

    def run() -> torch.Tensor:
        latents = draw(base, text(denoising_end=0.5), steps)
        return draw(refiner, text(image=latents, denoising_start=0.5), steps)

    plain = run()
    with leansd.inherit(base, plan), leansd.inherit(refiner, plan):
        with count_calls(base.unet, anatomy) as counts:
            planned = run()
        assert counts["mid.l0.res"] == 4
        assert counts["head"] == steps
        assert torch.equal(run(), planned)
    assert not torch.equal(plain, planned)
    assert torch.equal(run(), plain)
    assert is_plain(base.unet)


def test_custom_time_steps_after_a_run_of_one_step_less() -> None:
    """DDPM keeps its old step count when it is given a list; PNDM's five calls are four steps."""
    pipe = build_sd(SAMPLERS["ddpm"].make())
    draw(pipe, text(), 4)
    call = text(timesteps=[900, 700, 400, 200, 20])
    anatomy = read_anatomy(pipe.unet)
    with leansd.inherit(pipe, PLAN), count_calls(pipe.unet, anatomy) as counts:
        draw(pipe, call)
    assert counts == count_predicted(compile_plan(PLAN, anatomy).calls)


def test_controlnets_residuals_reach_a_skipped_encoder() -> None:
    """Other hints must show in the result, also where the units that they join are inherited."""
    pipe = build_controlnet(DDIM.make())
    plan = Plan.every(5, cut="mid", steps=STEPS).inherit("dn*", at=[1, 2, 3])
    with leansd.inherit(pipe, plan):
        results = [draw(pipe, text(image=draw_picture(seed))) for seed in (1, 2, 1)]
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])


def test_motion_unet_is_refused_by_name() -> None:
    torch.manual_seed(0)
    unet = UNetMotionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        num_attention_heads=4,
        motion_num_attention_heads=4,
        norm_num_groups=8,
    )
    with pytest.raises(LeansdError, match="UNetMotionModel"):
        leansd.inherit(unet, PLAN)
    assert not any("forward" in vars(module) for module in unet.modules())


def test_another_pipeline_of_the_same_parts_is_attached_apart(pipe: Any) -> None:
    """Two pipelines on one UNet, each with its own plan, used in turns in one thread."""
    other = make_pipeline(
        "StableDiffusionImg2ImgPipeline", pipe.unet, SAMPLERS["euler"].make(), vae=pipe.vae
    )
    call = Call({"prompt": "a cat", "image": draw_picture(), "strength": 0.8}, 0.8)
    plan = Plan.every(3, cut="mid", steps=STEPS)
    with leansd.inherit(pipe, PLAN):
        one = draw(pipe, text())
    with leansd.inherit(other, plan):
        two = draw(other, call)
    with leansd.inherit(pipe, PLAN), leansd.inherit(other, plan):
        for _ in range(2):
            assert torch.equal(draw(pipe, text()), one)
            assert torch.equal(draw(other, call), two)
    assert is_plain(pipe.unet)
