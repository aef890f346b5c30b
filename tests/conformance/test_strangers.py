"""What people do besides with a pipeline that follows a plan: a full plan is never seen.

Every situation is run plainly, under a full plan (the same bits), and twice under one that inherits
(the same both times, and numbers); after leaving, the pipeline draws what it drew before.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor

import leansd
from conformance.cases import build_controlnet, build_ip_adapter, build_lora, build_sd, build_xl
from conformance.models import draw_picture, small_unet
from conformance.samplers import SAMPLERS
from leansd.anatomy import read_anatomy
from leansd.plans import Plan
from tiny import TOKENS, WIDTH

STEPS = 4
LEAN = Plan.every(2, cut="up1.l1", steps=STEPS, name="lean").inherit("*.ca", at=[2, 3])
LONG = "a very long prompt of a cat that sits on a mat, and looks out of a window, at a dog"


@dataclass(frozen=True)
class Situation:
    """How a pipeline is set up and called."""

    call: Mapping[str, Any] = field(default_factory=dict)
    setup: Callable[[Any], Any] = lambda pipe: None
    build: Callable[[Any], Any] = build_sd
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    sampler: str = "ddim"
    seeds: int = 1
    """A generator for each of so many pictures; one for all where it is 1."""

    def open(self) -> Any:
        pipe = self.build(SAMPLERS[self.sampler].make())
        self.setup(pipe)
        return pipe

    def draw(self, pipe: Any) -> torch.Tensor:
        seeds = [torch.Generator().manual_seed(each) for each in range(self.seeds)]
        options = {"prompt": "a cat", "output_type": "latent", "num_inference_steps": STEPS}
        with self.within():
            drawn = pipe(
                **(options | dict(self.call)), generator=seeds if self.seeds > 1 else seeds[0]
            )
        return torch.as_tensor(drawn.images).clone()


def on_step(change: Callable[[Any, dict[str, Any]], None], at: int = 1, *inputs: str) -> Any:
    def callback(pipe: Any, step: int, moment: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            change(pipe, given)
        return given

    return {
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["latents", *inputs],
    }


def set_guidance(pipe: Any, given: dict[str, Any]) -> None:
    pipe._guidance_scale = 2.0


def write_latents(pipe: Any, given: dict[str, Any]) -> None:
    given["latents"].mul_(0.5)


def exchange_latents(pipe: Any, given: dict[str, Any]) -> None:
    given["latents"] = given["latents"].flip(-1)


def set_processor(pipe: Any, given: dict[str, Any]) -> None:
    pipe.unet.set_attn_processor(AttnProcessor())


def set_adapter_scale(pipe: Any, given: dict[str, Any]) -> None:
    pipe.set_ip_adapter_scale(0.2)


def embed(count: int = 1) -> torch.Tensor:
    return torch.randn(count, TOKENS, WIDTH, generator=torch.Generator().manual_seed(7))


class Communal(StableDiffusionPipeline):
    """A community pipeline: a class of its own around the same call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


def build_communal(scheduler: Any) -> Any:
    pipe = Communal(**build_sd(scheduler).components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


SITUATIONS = {
    "prompts of several lengths": Situation(
        {"prompt": ["a cat", LONG], "negative_prompt": ["", "a dog"]}, seeds=2
    ),
    "pictures and generators": Situation({"num_images_per_prompt": 3}, seeds=3),
    "pictures of several prompts": Situation(
        {"prompt": ["a cat", LONG], "num_images_per_prompt": 2}, seeds=4
    ),
    "as numbers": Situation({"output_type": "np"}),
    "guidance rescale": Situation({"guidance_rescale": 0.7}),
    "eta": Situation({"eta": 1.0}),
    "time steps": Situation({"timesteps": [900, 600, 300, 20]}, sampler="euler"),
    "sigmas": Situation({"sigmas": [14.0, 3.0, 1.0, 0.1, 0.0]}, sampler="euler"),
    "embeddings": Situation(
        {"prompt": None, "prompt_embeds": embed(), "negative_prompt_embeds": -embed()}
    ),
    "latents": Situation({"latents": torch.ones(1, 4, 8, 8)}),
    "odd size": Situation({"height": 40, "width": 56}),
    "guidance changes": Situation(on_step(set_guidance)),
    "latents are written to": Situation(on_step(write_latents)),
    "latents are exchanged": Situation(on_step(exchange_latents)),
    "inference mode": Situation(within=torch.inference_mode),
    "autocast": Situation(within=lambda: torch.autocast("cpu", torch.bfloat16)),
    "attention slicing": Situation(setup=lambda pipe: pipe.enable_attention_slicing()),
    "fused projections": Situation(setup=lambda pipe: pipe.fuse_qkv_projections(vae=False)),
    "channels last": Situation(
        setup=lambda pipe: pipe.unet.to(memory_format=torch.channels_last)
    ),
    "training mode": Situation(setup=lambda pipe: pipe.unet.train()),
    "gradient checkpointing": Situation(
        setup=lambda pipe: pipe.unet.enable_gradient_checkpointing()
    ),
    "free init": Situation(setup=lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.3, 1.4)),
    "a class of one's own": Situation(build=build_communal),
    "sdxl of two sizes": Situation(
        {"original_size": (64, 64), "target_size": (32, 32), "prompt_2": "a dog"}, build=build_xl
    ),
    "adapter and lora": Situation({"cross_attention_kwargs": {"scale": 0.5}}, build=build_lora),
    "image adapter's scale changes": Situation(
        {"ip_adapter_image_embeds": [torch.ones(2, 1, WIDTH)], **on_step(set_adapter_scale)},
        setup=lambda pipe: pipe.set_ip_adapter_scale(1.0),
        build=build_ip_adapter,
    ),
    "a ControlNet of several pictures": Situation(
        {"prompt": ["a cat", LONG], "image": [draw_picture(1), draw_picture(2)]},
        build=build_controlnet,
        seeds=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SITUATIONS)
def test_a_full_plan_is_not_seen_and_another_never_stale(name: str) -> None:
    situation = SITUATIONS[name]
    pipe = situation.open()
    plain = situation.draw(pipe)
    situation.setup(pipe)
    with leansd.inherit(pipe, Plan.full(STEPS)):
        assert torch.equal(situation.draw(pipe), plain)
    situation.setup(pipe)
    plan = LEAN
    if "up2" in read_anatomy(pipe.unet).blocks:
        plan = Plan.every(2, cut="up2.l1", steps=STEPS)
    with leansd.inherit(pipe, plan) as run:
        drawn = situation.draw(pipe)
        report = run.report()
        assert report.full_calls < report.calls
        situation.setup(pipe)
        assert torch.equal(situation.draw(pipe), drawn)
    assert drawn.isfinite().all()
    assert not torch.equal(drawn, plain)
    situation.setup(pipe)
    assert torch.equal(situation.draw(pipe), plain)


def test_schedulers_and_step_counts_may_change_between_runs() -> None:
    pipe, plain = build_sd(SAMPLERS["ddim"].make()), Situation({"num_inference_steps": 9})
    with leansd.inherit(pipe, "deepcache") as run:
        ddim = plain.draw(pipe)
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        euler = plain.draw(pipe)
        longer = Situation({"num_inference_steps": 12}).draw(pipe)
        assert run.report().calls == 12
        assert run.report().full_calls < 12
        pipe.scheduler = SAMPLERS["ddim"].make()
        assert torch.equal(plain.draw(pipe), ddim)
    assert not torch.equal(euler, ddim)
    assert not torch.equal(longer, euler)


def test_a_pipeline_with_another_unet_than_when_it_was_attached_says_so() -> None:
    pipe, other = build_sd(SAMPLERS["ddim"].make()), small_unet(seed=5)
    with leansd.inherit(pipe, LEAN) as run:
        Situation().draw(pipe)
        assert "another UNet" not in str(run.report())
        pipe.unet = other
        Situation().draw(pipe)
        with pytest.warns(UserWarning, match="another UNet than when it was attached"):
            run.report()
