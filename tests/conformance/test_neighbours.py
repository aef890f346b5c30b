"""What else uses a UNet: other pipelines, other calls, changes on the way, whoever looks inside."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInstructPix2PixPipeline
from diffusers.models.attention_processor import AttnProcessor
from diffusers.pipelines.deprecated.stable_diffusion_attend_and_excite import (
    StableDiffusionAttendAndExcitePipeline,
)
from diffusers.pipelines.deprecated.stable_diffusion_panorama import StableDiffusionPanoramaPipeline
from diffusers.pipelines.deprecated.stable_diffusion_sag import StableDiffusionSAGPipeline
from torch import nn
from torch.nn.utils import prune

import leansd
from conformance.cases import STEPS, Call, build_controlnet, build_sd, text
from conformance.models import draw_picture, make_pipeline, small_unet, tiny_lora
from conformance.reference import draw, is_plain
from conformance.samplers import SAMPLERS
from leansd.plans import Plan
from tiny import TOKENS, WIDTH

REUSE = Plan.every(2, cut="up1.l1", steps=STEPS)
GATE = Plan.full(STEPS).inherit("*.ca", at=[1, 2, 3, 4])


@pytest.fixture
def pipe() -> Any:
    return build_sd(SAMPLERS["ddim"].make())


def as_kind(kind: Any, pipe: Any) -> Any:
    parts = {"requires_safety_checker": False} if kind is not StableDiffusionSAGPipeline else {}
    other = kind.from_pipe(pipe, vae=pipe.vae, **parts)
    other.set_progress_bar_config(disable=True)
    return other


# -- whose call it is --------------------------------------------------------------------------


def test_a_pipeline_that_shares_all_parts_is_not_touched(pipe: Any) -> None:
    """By `from_pipe` it has the same UNet and the same scheduler."""
    other = as_kind(StableDiffusionImg2ImgPipeline, pipe)
    call = Call(
        {"prompt": ["a cat", "a dog"], "image": draw_picture(), "strength": 0.8,
         "guidance_scale": 1.0}
    )  # fmt: skip
    plain, expected = draw(pipe, text()), draw(other, call, steps=8)
    with leansd.inherit(pipe, REUSE) as run:
        planned = draw(pipe, text())
        assert not torch.equal(planned, plain)
        # Another number of steps is none of the plan's business.
        assert torch.equal(draw(other, call, steps=8), expected)
        assert torch.equal(draw(pipe, text()), planned)
        assert run.report().calls == STEPS


def test_pipelines_that_share_all_parts_follow_a_plan_each(pipe: Any) -> None:
    other = as_kind(StableDiffusionImg2ImgPipeline, pipe)
    call = Call({"prompt": "a cat", "image": draw_picture(), "strength": 0.8})
    second = Plan.every(3, cut="mid", steps=STEPS)
    with leansd.inherit(pipe, REUSE):
        one = draw(pipe, text())
    with leansd.inherit(other, second):
        two = draw(other, call)
    with leansd.inherit(pipe, REUSE), leansd.inherit(other, second) as run:
        assert torch.equal(draw(other, call), two)
        assert torch.equal(draw(pipe, text()), one)
        assert run.report().calls == 4


def test_an_attached_unet_follows_for_all(pipe: Any) -> None:
    plain = draw(pipe, text())
    with leansd.inherit(pipe, REUSE):
        planned = draw(pipe, text())
    with leansd.inherit(pipe.unet, REUSE):
        assert torch.equal(draw(pipe, text()), planned)
    assert not torch.equal(planned, plain)


def test_release_after_the_unet_and_the_controlnet_were_exchanged() -> None:
    pipe = build_controlnet(SAMPLERS["ddim"].make())
    unet, control = pipe.unet, pipe.controlnet
    leansd.inherit_(pipe, REUSE)
    other = build_controlnet(SAMPLERS["ddim"].make())
    pipe.unet, pipe.controlnet = other.unet, other.controlnet
    leansd.release_(pipe)
    assert is_plain(unet)
    assert "forward" not in vars(control)


def make_call(batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(batch, 4, 8, 8, generator=generator)
    return sample, torch.randn(batch, TOKENS, WIDTH, generator=generator)


@torch.no_grad()
def test_a_raw_call_outside_a_run_is_computed(pipe: Any) -> None:
    sample, states = make_call()
    plain = pipe.unet(sample, 500, states).sample
    with leansd.inherit(pipe, REUSE) as run:
        for _ in range(3):
            assert torch.equal(pipe.unet(sample, 500, states).sample, plain)
        report = run.report()
        assert (report.calls, report.full_calls) == (3, 3)
        assert "time step" in str(report)
        draw(pipe, text())
        assert torch.equal(pipe.unet(sample, 500, states).sample, plain)
        assert run.report().calls == STEPS


@torch.no_grad()
def test_a_loop_over_copied_time_steps_says_what_ran(pipe: Any) -> None:
    sample, states = make_call()
    pipe.scheduler.set_timesteps(STEPS)
    steps = pipe.scheduler.timesteps.clone()
    with leansd.inherit(pipe, REUSE) as run:
        for t in steps:
            pipe.unet(sample, t, states)
    assert run.report().full_calls == STEPS


def test_the_tiles_of_a_panorama_inherit_each_from_itself(pipe: Any) -> None:
    panorama = as_kind(StableDiffusionPanoramaPipeline, pipe)
    side = {"height": 64, "width": 576, "view_batch_size": 1}
    call = text(**side)
    plain = draw(panorama, call)
    with leansd.inherit(panorama, Plan.full(STEPS)):
        assert torch.equal(draw(panorama, call), plain)
    with leansd.inherit(panorama, REUSE) as run:
        drawn = draw(panorama, call)
    report = run.report()
    assert drawn.isfinite().all()
    assert report.calls > STEPS
    assert report.full_calls < report.calls


# -- changes on the way ------------------------------------------------------------------------


def on_step(change: Callable[[Any, dict[str, Any]], None], at: int = 1) -> Call:
    def callback(pipe: Any, step: int, moment: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            change(pipe, inputs)
        return inputs

    return text(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def exchange_text(pipe: Any, inputs: dict[str, Any]) -> None:
    inputs["prompt_embeds"] = inputs["prompt_embeds"].flip(1)


def write_text(pipe: Any, inputs: dict[str, Any]) -> None:
    inputs["prompt_embeds"].mul_(-1)


def change_weights(pipe: Any, inputs: dict[str, Any]) -> None:
    with torch.no_grad():
        pipe.unet.up_blocks[-1].attentions[0].transformer_blocks[0].attn2.to_v.weight.mul_(-2)


def load_lora(pipe: Any, inputs: dict[str, Any]) -> None:
    pipe.load_lora_weights(tiny_lora(pipe.unet, "to_q", "to_v"))


def change_scale(pipe: Any, inputs: dict[str, Any]) -> None:
    pipe._cross_attention_kwargs = {"scale": 0.5}


def switch_freeu(pipe: Any, inputs: dict[str, Any]) -> None:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=1.4)


def change_guidance(pipe: Any, inputs: dict[str, Any]) -> None:
    pipe._guidance_scale = 9.0


DROP = GATE.guide("drop", at=[1, 2, 3, 4])
CHANGES = {
    "encoder_hidden_states": (GATE, (exchange_text, write_text)),
    "weights": (GATE, (change_weights, load_lora, switch_freeu)),
    "cross_attention_kwargs": (GATE, (change_scale,)),
    "the guidance scale": (DROP, (change_guidance,)),
}


@pytest.mark.parametrize(
    ("what", "plan", "change"),
    [(what, plan, each) for what, (plan, many) in CHANGES.items() for each in many],
)
def test_what_changes_on_the_way_makes_a_full_step(
    pipe: Any, what: str, plan: Plan, change: Any
) -> None:
    """After it everything is as if the steps before had been of another run."""
    with leansd.inherit(pipe, plan) as run:
        draw(pipe, on_step(change))
    report = run.report()
    assert report.full_calls == 2
    assert sum(report.forced.values()) == 1
    assert next(iter(report.forced)).startswith(what)


def test_equal_conditions_made_anew_at_every_step_change_nothing(pipe: Any) -> None:
    sample, states = make_call()
    pipe.scheduler.set_timesteps(STEPS)
    with torch.no_grad(), leansd.inherit(pipe, GATE) as run:
        for t in pipe.scheduler.timesteps:
            pipe.unet(sample, t, torch.cat([states]))
    assert run.report().full_calls == 1


def test_a_changed_text_reaches_the_units_that_a_controlnet_feeds() -> None:
    """The ControlNet had left out what the plan would not have read."""
    pipe = build_controlnet(SAMPLERS["ddim"].make())
    plan = Plan.every(5, cut="mid", steps=STEPS).inherit("dn*", at=[1, 2, 3, 4])
    for change in (exchange_text, change_scale, change_weights):
        call = on_step(change)
        with leansd.inherit(pipe, plan):
            drawn = draw(pipe, Call({**call.arguments, "image": draw_picture()}))
        assert drawn.isfinite().all(), change


# -- whose rows are whose ----------------------------------------------------------------------


@pytest.mark.parametrize("guidance", ["drop", "inherit"])
def test_three_way_batches_of_two_pictures_are_those_of_one(guidance: Any) -> None:
    """InstructPix2Pix: six rows could be taken for two halves."""
    unet = small_unet(in_channels=8)
    pipe: Any = make_pipeline(
        "StableDiffusionInstructPix2PixPipeline", unet, SAMPLERS["ddim"].make()
    )
    assert isinstance(pipe, StableDiffusionInstructPix2PixPipeline)
    plans = (
        Plan.full(STEPS).guide(guidance, at=[2, 3]),
        Plan.every(2, cut="up1.l1", steps=STEPS).guard("sample", threshold=0.5),
    )
    prompts, pictures = ["a cat", "a dog"], [draw_picture(1), draw_picture(2)]

    def run(places: list[int]) -> torch.Tensor:
        return pipe(
            prompt=[prompts[each] for each in places],
            image=[pictures[each] for each in places],
            num_inference_steps=STEPS,
            generator=[torch.Generator().manual_seed(each) for each in places],
            output_type="latent",
        ).images

    for plan in plans:
        with leansd.inherit(pipe, plan):
            both, apart = run([0, 1]), torch.cat([run([0]), run([1])])
        assert (both - apart).norm() < 0.01 * apart.norm()


def test_where_the_picture_comes_first_nothing_takes_it_for_the_latents() -> None:
    """As in Marigold: which channels are the latents is not known, so nothing inherits by them."""
    unet = small_unet(in_channels=8)
    pictured, noisy = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    states = torch.randn(1, TOKENS, WIDTH)
    plan = Plan.every(5, cut="up1.l1", steps=STEPS).guard("sample", threshold=0.01)
    with torch.no_grad(), leansd.inherit(unet, plan) as run:
        for step in range(STEPS):
            sample = torch.cat([pictured, noisy + step], 1)
            unet(sample, 900 - 100 * step, states)
    assert run.report().full_calls == STEPS
    assert "latents" in str(run.report())


# -- whoever looks inside ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the UNet has an attention processor")
@pytest.mark.filterwarnings("ignore:torch.meshgrid")
@pytest.mark.parametrize("name", ["sag", "attend"])
def test_pipelines_that_look_inside_draw_what_they_draw_plainly(pipe: Any, name: str) -> None:
    kinds = {
        "sag": (StableDiffusionSAGPipeline, {"sag_scale": 1.0}),
        "attend": (
            StableDiffusionAttendAndExcitePipeline,
            {
                "token_indices": [1],
                "max_iter_to_alter": 2,
                "thresholds": {},
                "height": 128,
                "width": 128,
            },
        ),
    }
    kind, options = kinds[name]
    other = as_kind(kind, pipe)
    call = text(**options)
    plain = draw(other, call)
    plan = Plan.every(3, cut="up1.l1", steps=STEPS)  # `mid` idles, which SAG watches
    with leansd.inherit(other, plan) as run:
        assert torch.equal(draw(other, call), plain)
    assert run.report().forced


@pytest.mark.filterwarnings("ignore:calls that want gradients")
def test_calls_that_want_gradients_get_those_of_the_plain_unet() -> None:
    unet = small_unet()
    sample, states = make_call()

    def learn() -> torch.Tensor:
        unet.zero_grad()
        for moment in (900, 700, 500):
            unet(sample, moment, states).sample.square().mean().backward()
        return unet.conv_in.weight.grad.clone()

    expected = learn()
    with leansd.inherit(unet, Plan.every(3, cut="mid", steps=3)) as run:
        assert torch.equal(learn(), expected)
        assert run.report().full_calls == 3
        with torch.no_grad():
            for moment in (900, 700, 500):
                unet(sample, moment, states)
        assert run.report().full_calls == 1


class SharedAttention(AttnProcessor):
    """Mixes the rows of a batch, as StyleAligned does."""

    __module__ = "somebody"

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        shared = hidden_states + hidden_states[:1]
        return super().__call__(attn, shared, *args, **kwargs)


def test_processors_that_mix_rows_are_left_whole(pipe: Any) -> None:
    pipe.unet.set_attn_processor(SharedAttention())
    plain = draw(pipe, text())
    plan = Plan.full(STEPS).guide("drop", at=[2, 3])
    with (
        pytest.warns(UserWarning, match="SharedAttention"),
        leansd.inherit(pipe, plan),
    ):
        assert torch.equal(draw(pipe, text()), plain)


WHOLE = Plan.every(2, cut="head", steps=STEPS)
HOOKED = {
    "a unit": (REUSE, "mid_block.attentions.0"),
    "a block": (REUSE, "mid_block"),
    "a block of which a part is idle": (REUSE, "down_blocks.1"),
    "what lies within a unit": (REUSE, "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"),
    "what lies within a part": (GATE, "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"),
    "what is of no unit": (WHOLE, "time_embedding"),
    "what would see half a batch": (Plan.full(STEPS).guide("inherit", at=[2, 3]), "conv_in"),
}


@pytest.mark.parametrize("name", HOOKED)
def test_what_others_have_hooked_is_computed(pipe: Any, name: str) -> None:
    plan, path = HOOKED[name]
    seen: list[torch.Tensor] = []

    def see(module: Any, given: Any, output: Any) -> None:
        seen.append((output if isinstance(output, torch.Tensor) else output[0]).clone())

    handle = pipe.unet.get_submodule(path).register_forward_hook(see)
    plain = draw(pipe, text())
    expected, seen[:] = list(seen), []
    with leansd.inherit(pipe, plan):
        assert torch.equal(draw(pipe, text()), plain)
    assert len(seen) == len(expected)
    assert all(map(torch.equal, seen, expected))
    handle.remove()
    with leansd.inherit(pipe, plan):
        assert not torch.equal(draw(pipe, text()), plain)


def test_a_hook_that_makes_weights_watches_nothing(pipe: Any) -> None:
    prune.l1_unstructured(pipe.unet.mid_block.resnets[0].conv1, "weight", amount=0.3)
    plain = draw(pipe, text())
    with leansd.inherit(pipe, REUSE):
        assert not torch.equal(draw(pipe, text()), plain)


# -- wrappers ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the UNet was compiled")
@pytest.mark.parametrize("how", ["torch.compile", "compile", "blocks"])
def test_a_compiled_unet_is_unwrapped(pipe: Any, how: str) -> None:
    with leansd.inherit(pipe, REUSE):
        expected = draw(pipe, text())
    unet = pipe.unet
    if how == "torch.compile":
        pipe.unet = torch.compile(unet, backend="eager", fullgraph=True)
    elif how == "compile":
        unet.compile(backend="eager")
    else:
        unet.compile_repeated_blocks(backend="eager", fullgraph=True)
    forward = vars(pipe.unet).get("forward")
    with leansd.inherit(pipe, REUSE):
        assert torch.equal(draw(pipe, text()), expected)
    assert vars(pipe.unet).get("forward") is forward
    assert is_plain(unet)
    compiled = [vars(each).get("_compiled_call_impl") for each in unet.modules()]
    assert any(compiled) == (how != "torch.compile")


def test_what_is_no_unet_is_refused_by_name() -> None:
    pipe: Any = build_sd(SAMPLERS["ddim"].make())
    pipe.unet = nn.Identity()
    with pytest.raises(leansd.LeansdError, match="with a Identity as its `unet`"):
        leansd.inherit(pipe, REUSE)
