"""ControlNets under a plan: run when the encoder runs, inherited in between."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    MultiControlNetModel,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
)

import leansd
from conformance.models import small_unet, tiny_controlnet
from conformance.reference import watch_ends
from leansd.plans import Plan
from tiny import tiny_pipeline, tiny_unet

STEPS = 6
MakeUNet = Callable[[], UNet2DConditionModel]


def make_controlnet(seed: int = 0, make_unet: MakeUNet = small_unet) -> ControlNetModel:
    return tiny_controlnet(make_unet(), seed)


def make_pipeline(
    controlnet: Any, make_unet: MakeUNet = small_unet
) -> StableDiffusionControlNetPipeline:
    parts = tiny_pipeline(unet=make_unet()).components
    pipe = StableDiffusionControlNetPipeline(
        **parts, controlnet=controlnet, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: StableDiffusionControlNetPipeline, **options: Any) -> torch.Tensor:
    several = isinstance(pipe.controlnet, MultiControlNetModel)
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    arguments: dict[str, Any] = {
        "prompt": "a cat",
        "image": [picture, 1 - picture] if several else picture,
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "latent",
        "height": 32,
        "width": 32,
    }
    return pipe(**(arguments | options)).images


class Counter:
    """Counts what happens inside a ControlNet."""

    def __init__(self, net: ControlNetModel) -> None:
        self.count = 0
        net.mid_block.resnets[0].norm1.register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        self.count += 1


def remember_residuals(net: ControlNetModel, runs: list[bool]) -> Any:
    """The reference: outside the engine, give the last residuals again where `runs` says so."""
    kept: list[Any] = []
    calls = iter(runs)

    def hook(module: Any, args: Any, output: Any) -> Any:
        if next(calls):
            downs, mid = output
            kept[:] = [([down.clone() for down in downs], mid.clone())]
        downs, mid = kept[0]
        return [down.clone() for down in downs], mid.clone()

    return net.register_forward_hook(hook)


@pytest.mark.parametrize("cut", ["up1.l0", "up0.l1", "up0.l0", "dn*"])
def test_residuals_are_inherited_with_the_encoder(cut: str) -> None:
    net = make_controlnet()
    pipe = make_pipeline(net)
    plan = Plan.every(2, cut=cut, steps=STEPS)
    with leansd.inherit(pipe.unet, plan):
        handle = remember_residuals(net, [step % 2 == 0 for step in range(STEPS)])
        expected = draw(pipe)
        handle.remove()
    counter = Counter(net)
    full = draw(pipe)
    counter.count = 0
    with leansd.inherit(pipe, plan) as run, watch_ends() as left:
        assert torch.equal(draw(pipe), expected)
        assert counter.count == STEPS // 2
        assert left == [0]
        report = run.report()
    assert (report.control_calls, report.control_runs) == (STEPS, STEPS // 2)
    assert "ControlNet ran 3 of 6 times" in str(report)
    assert not torch.equal(expected, full)
    assert "forward" not in vars(net)
    assert torch.equal(draw(pipe), full)


def test_plan_is_built_and_compiled_once_a_run_and_warns_once() -> None:
    pipe = make_pipeline(make_controlnet(make_unet=tiny_unet), tiny_unet)
    with leansd.inherit(pipe, "fast") as run:
        with pytest.warns(UserWarning, match="6 steps change too much") as warned:
            draw(pipe)
        assert len(warned) == 1
        with pytest.warns(UserWarning, match="6 steps change too much") as warned:
            draw(pipe)
        assert len(warned) == 1
        assert run._follower._compile.cache_info().misses == 1


def test_full_encoder_runs_the_control_net_every_time() -> None:
    net = make_controlnet()
    pipe = make_pipeline(net)
    counter = Counter(net)
    expected = draw(pipe)
    counter.count = 0
    with leansd.inherit(pipe, Plan.full(STEPS)):
        assert torch.equal(draw(pipe), expected)
    assert counter.count == STEPS
    with leansd.inherit(pipe, Plan.every(2, cut="mid", steps=STEPS)):
        draw(pipe)
    assert counter.count == 2 * STEPS


def test_several_control_nets_as_one() -> None:
    nets = [make_controlnet(0), make_controlnet(1)]
    pipe = make_pipeline(MultiControlNetModel(nets))
    counters = [Counter(net) for net in nets]
    with leansd.inherit(pipe, Plan.every(3, cut="up1.l0", steps=STEPS)):
        first = draw(pipe)
        assert torch.equal(draw(pipe), first)
    assert [counter.count for counter in counters] == [4, 4]


def test_another_scale_runs_it_anew() -> None:
    """Control that ends midway changes the scale; residuals of the old scale would be wrong."""
    net = make_controlnet()
    pipe = make_pipeline(net)
    counter = Counter(net)
    with leansd.inherit(pipe, Plan.every(3, cut="up1.l0", steps=STEPS)):
        draw(pipe, control_guidance_end=0.7)
    assert counter.count == 3  # steps 0 and 3, and 5, where the scale has become zero


def test_guess_mode() -> None:
    net = make_controlnet()
    pipe = make_pipeline(net)
    expected = draw(pipe, guess_mode=True)
    with leansd.inherit(pipe, Plan.full(STEPS)):
        assert torch.equal(draw(pipe, guess_mode=True), expected)
    counter = Counter(net)
    with leansd.inherit(pipe, Plan.every(2, cut="up1.l0", steps=STEPS)):
        assert draw(pipe, guess_mode=True).isfinite().all()
    assert counter.count == STEPS // 2
