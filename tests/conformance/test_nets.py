"""Switching under every case: a copy of the UNet at some steps changes nothing."""

import copy
from typing import Any

import pytest
import torch
from accelerate import cpu_offload

import leansd
from conformance.cases import CASES, PICTURES, STEPS, build_sd, text
from conformance.models import make_pipeline, tiny_controlnet
from conformance.reference import PLANS, draw
from conformance.samplers import SAMPLERS
from conformance.test_offload import KINDS
from leansd.anatomy import read_anatomy
from leansd.plans import Plan
from leansd.runtime.controlnet import find_readers
from tiny import tiny_unet

SAMPLER = "ddim"


ARGUMENTS = [
    "sd1",
    "xl",
    "guidance-off",
    "batch-and-size",
    "cutoff",
    "img2img",
    "inpaint-9",
    "controlnet",
    "controlnet-window",
    "controlnet-guess",
    "controlnet-two",
    "controlnet-xl",
    "t2i-adapter",
    "ip-adapter",
    "lora",
    "freeu",
]
"""Cases whose UNets are given something of their own; the others differ in shape and precision."""


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_copy_at_some_steps_changes_nothing(name: str) -> None:
    case = CASES[name]
    pipe = case.build(SAMPLERS[SAMPLER].make(**case.schedule))
    blocks = read_anatomy(pipe.unet).up_blocks
    plan = PLANS["deep"](blocks).guide("inherit", at=2)
    twin = copy.deepcopy(pipe.unet)
    for call in case.calls:
        with leansd.inherit(pipe, plan):
            expected = draw(pipe, call)
        with leansd.inherit(pipe, plan.switch("twin", at=[1, 3, 4]), nets={"twin": twin}):
            assert torch.equal(draw(pipe, call), expected)


def test_a_thinner_net_takes_the_residuals_of_its_own_skips() -> None:
    own_unet = tiny_unet()
    pipe: Any = make_pipeline(
        "StableDiffusionControlNetPipeline",
        own_unet,
        SAMPLERS[SAMPLER].make(),
        controlnet=tiny_controlnet(own_unet, 0),
    )
    light, _ = leansd.operate(pipe.unet, leansd.Surgery("light").drop("dn1.l1", "up2.l1"))
    call = text(image=PICTURES[0])
    seen: list[tuple[torch.Tensor, ...]] = []
    hook = light.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["down_block_additional_residuals"]),
        with_kwargs=True,
    )
    given: list[tuple[torch.Tensor, ...]] = []
    control = pipe.controlnet.register_forward_hook(
        lambda module, args, output: given.append(output[0])
    )
    with leansd.inherit(pipe, Plan.full(STEPS).switch("light", at=[2]), nets={"light": light}):
        draw(pipe, call)
    hook.remove()
    control.remove()
    own, theirs = (list(find_readers(read_anatomy(unet)))[:-1] for unet in (pipe.unet, light))
    assert len(own) == len(given[2]) == len(theirs) + 1
    for at, residual in zip(theirs, seen[0], strict=True):
        assert torch.equal(residual, given[2][own.index(at)])
    # Between runs of the ControlNet the light net is given what is kept of the last.
    plan = Plan.every(2, cut="up2.l0.res", steps=STEPS).switch("light", at=[1, 3])
    with leansd.inherit(pipe, plan, nets={"light": light}) as run:
        assert draw(pipe, call).isfinite().all()
    assert run.report().control_runs < run.report().control_calls


@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_nets_take_turns(kind: str) -> None:
    pipe = build_sd(SAMPLERS[SAMPLER].make())
    other = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        other.conv_out.weight.mul_(1.1)
    plan = Plan.every(2, cut="up1.l1", steps=STEPS).switch("other", at=[2, 3])
    nets = {"other": other}
    with leansd.inherit(pipe, plan, nets=nets):
        shared = draw(pipe, text())
    KINDS[kind](pipe)
    cpu_offload(other, torch.device("cpu"))
    with leansd.inherit(pipe, plan, nets=nets) as run:
        drawn = draw(pipe, text())
    # Weights that are away cannot be compared, so that nothing is inherited across the switch.
    assert run.report().full_calls >= 3
    assert torch.allclose(drawn, shared, atol=1.0)
    assert drawn.isfinite().all()
