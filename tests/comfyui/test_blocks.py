"""Plans that inherit inside ComfyUI's UNet, by a double of it around a UNet of diffusers."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from integrations.comfyui.blocks import read_blocks
from integrations.comfyui.choosing import PlanChoice, set_options
from integrations.comfyui.playing import KEY, PlanOnModel

import leansd
from comfyui.double import EPS, Denoiser, Guider, Patcher, Sampler, cond, lay_out, sample_heun
from comfyui.test_playing import EULER, SEVERAL, draw
from comfyui.unet import Residual, UNetModel
from leansd.plans import Plan
from leansd.plans.presets import PRESETS
from tiny import tiny_unet, tiny_xl_unet

STEPS = 6
SIGMAS = lay_out(STEPS)
DEEP = leansd.preset("deepcache", steps=STEPS, interval=3)
PLANS = {
    "deepcache 0": DEEP,
    "deepcache 4": leansd.preset("deepcache", steps=STEPS, interval=3, branch=4),
    "encoder": Plan.every(2, cut="mid", steps=STEPS),
    "forecast": Plan.every(3, cut="up2.up", steps=STEPS, how="forecast"),
    "change": Plan.full(STEPS).inherit("up2.l1.attn", at=[2, 3, 5], how="residual"),
    "both": Plan.every(2, cut="up2.up", steps=STEPS).inherit("head", at=[5], how="forecast"),
}


@cache
def make_unet() -> UNet2DConditionModel:
    return tiny_unet()


class StableDiffusion(EPS):
    """The noise levels that the runtime for diffusers takes where there is no scheduler."""

    def __init__(self) -> None:
        kept = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)
        self.sigmas = ((1 - kept) / kept).sqrt()
        self.sigma_min, self.sigma_max = float(self.sigmas[0]), float(self.sigmas[-1])


def start(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def run(plan: Any, unet: Any = None, noise: Any = None, **options: Any) -> Any:
    """(latents, report, UNet) of a run."""
    unet = unet or UNetModel(make_unet())
    options = {"patcher": Patcher(unet), "sigmas": SIGMAS} | options
    drawn, report, _ = draw(plan, noise=start() if noise is None else noise, **options)
    return drawn, report, unet


@pytest.mark.parametrize("make", [tiny_unet, tiny_xl_unet])
def test_its_units_are_those_of_diffusers(make: Any) -> None:
    unet = make()
    blocks = read_blocks(UNetModel(unet))
    assert blocks is not None
    anatomy = leansd.dissect(unet)
    assert blocks.anatomy.fingerprint == anatomy.fingerprint
    assert [each.scale for each in blocks.anatomy] == [each.scale for each in anatomy]
    for unit in blocks.anatomy:
        assert unit.params == anatomy[unit.at].params
    for other in (Denoiser(), torch.nn.Linear(1, 1)):
        assert read_blocks(other) is None


class Taken:
    """What a UNet was called with, and what it gave."""

    def __init__(self, unet: UNetModel) -> None:
        self.unet, self.seen = unet, list[Any]()

    def watch(self, executor: Any, x: Any, timesteps: Any, context: Any, *rest: Any) -> Any:
        output = executor(x, timesteps, context, *rest)
        self.seen.append((x.clone(), timesteps.clone(), self.unet.find_text(context), output))
        return output


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_gives_what_it_gives_in_diffusers(name: str) -> None:
    """The same calls, answered by the runtime for diffusers on the same weights."""
    plan, unet = PLANS[name], UNetModel(make_unet())
    noise = StableDiffusion()
    taken, patcher = Taken(unet), Patcher(unet, noise)
    sigmas = torch.cat([noise.sigmas[torch.tensor([999, 800, 620, 410, 200, 20])], torch.zeros(1)])
    patcher.add_wrapper_with_key("diffusion_model", "watch", taken.watch)
    drawn, report, _ = run(plan, unet, patcher=patcher, sigmas=sigmas)
    assert not report.full
    assert not report.forced
    full, _, _ = run(None, patcher=Patcher(unet, noise), sigmas=sigmas)
    assert not torch.equal(drawn, full)
    with leansd.inherit(unet.unet, plan), torch.no_grad():
        for x, t, text, output in taken.seen:
            expected = unet.unet(x, t[0], text).sample
            assert torch.allclose(output, expected, atol=1e-5 * float(expected.abs().max()))


def test_deepcache_by_name_spares_all_but_its_branch() -> None:
    sigmas, plan = lay_out(9), leansd.preset("deepcache", steps=9)
    named, report, unet = run("deepcache", sigmas=sigmas)
    assert torch.equal(named, run(plan, sigmas=sigmas)[0])
    deeper = set_options(PRESETS["deepcache"], interval=2, branch=4)
    plan = leansd.preset("deepcache", steps=9, interval=2, branch=4)
    assert torch.equal(run(deeper, sigmas=sigmas)[0], run(plan, sigmas=sigmas)[0])
    assert (report.calls, report.computed, report.partial) == (9, 9, 6)
    assert unet.calls == 9
    assert "9 of 9 times (6 in part), 0 forecast" in str(report)


@pytest.mark.parametrize("conds", [{}, SEVERAL, {"cfg": 1.0}], ids=["two", "four", "unguided"])
@pytest.mark.parametrize("how", [{"split": lambda _: True}, {"split": lambda call: call % 3 == 0}])
def test_however_conditionings_come_the_pictures_are_the_same(conds: Any, how: Any) -> None:
    expected, report, _ = run(DEEP, **conds)
    drawn, other, _ = run(DEEP, **conds, **how)
    assert torch.allclose(drawn, expected, atol=1e-4 * float(expected.abs().max()))
    assert other.partial == report.partial == 4


def assert_equal_full(plan: Any, why: str, **options: Any) -> None:
    drawn, report, _ = run(plan, **{k: each() for k, each in options.items()})
    full, _, _ = run(None, **{k: each() for k, each in options.items()})
    assert torch.equal(drawn, full)
    assert report.partial == 0
    assert why in str(report)


def patch(**changes: Any) -> Any:
    def make() -> Patcher:
        patcher = Patcher(UNetModel(make_unet()))
        for name, each in changes.items():
            if name == "injections":
                patcher.injections = each
            elif name == "patches":
                patcher.model_options["transformer_options"]["patches"] = each
            else:
                patcher.model_options[name] = each
        return patcher

    return make


@pytest.mark.parametrize(
    ("plan", "why", "changes"),
    [
        (DEEP, "another pack puts layers", {"injections": {"motion": [object()]}}),
        (DEEP, "the model is compiled", {"torch_compile_kwargs": {"backend": "inductor"}}),
        (DEEP, "may resize them", {"patches": {"input_block_patch": [lambda h, options: h]}}),
        (Plan.every(2, cut="up7.up", steps=STEPS), "up7.up", {}),
        (Plan.full(STEPS).inherit("up2.l1.attn.t0.ca", at=[3]), "up2.l1.attn.t0.ca", {}),
    ],
)  # fmt: skip
def test_what_is_unsound_or_unknown_is_computed_in_full(plan: Plan, why: str, changes: Any) -> None:
    assert_equal_full(plan, why, patcher=patch(**changes))


def test_a_full_plan_changes_no_bit_and_a_model_of_other_layers_runs_in_full() -> None:
    full, _, _ = run(None)
    assert torch.equal(run(Plan.full(STEPS))[0], full)
    # Inherited where nothing is computed in between, and so the same.
    other = torch.nn.Conv2d(1, 1, 1)
    unet = UNetModel(make_unet())
    unet.input_blocks[1].append(other)
    assert read_blocks(unet) is None


def test_patches_that_write_between_blocks() -> None:
    """As FreeU does: on what comes in, wherever it comes from."""

    def write(h: torch.Tensor, skip: torch.Tensor, _: Any) -> Any:
        h[:, : h.shape[1] // 2] *= 1.1
        return h, skip

    make = patch(patches={"output_block_patch": [write]})
    drawn, report, _ = run(DEEP, patcher=make())
    full, _, _ = run(None, patcher=make())
    assert report.partial == 4
    assert torch.isfinite(drawn).all()
    assert not torch.equal(drawn, run(DEEP)[0])
    assert torch.equal(run(Plan.full(STEPS), patcher=make())[0], full)


@pytest.mark.parametrize("split", [False, True])
def test_controlnets_run_wherever_a_part_of_the_model_does(split: bool) -> None:
    def conds(control: Residual) -> Any:
        return {"positive": [cond(0.4, control=control)], "negative": [cond(-0.3, control=control)]}

    options: dict[str, Any] = {"split": lambda _: split}
    control = Residual()
    drawn, report, _ = run(PLANS["both"], **conds(control), **options)
    assert not report.full
    assert control.runs == (STEPS - 1) * (1 + split)
    assert torch.isfinite(drawn).all()
    bare, _, _ = run(PLANS["both"], **options)
    assert not torch.equal(drawn, bare)
    same, _, _ = run(Plan.full(STEPS), **conds(Residual()), **options)
    full, _, _ = run(None, **conds(Residual()), **options)
    assert torch.equal(same, full)


def test_nothing_is_left_after_a_run_also_one_that_failed() -> None:
    unet = UNetModel(make_unet())
    before = {name: dict(vars(each)) for name, each in unet.named_modules()}
    expected, _, _ = run(DEEP)
    forward = unet.out[2].forward

    def fail(*args: Any) -> Any:
        if unet.calls == 3:
            raise torch.OutOfMemoryError
        return forward(*args)

    patcher = PlanOnModel(PlanChoice(DEEP)).attach(Patcher(unet))
    unet.out[2].forward = fail  # pyright: ignore[reportAttributeAccessIssue]
    guider = Guider(patcher, [cond(0.4)], [cond(-0.3)])
    with pytest.raises(torch.OutOfMemoryError):
        guider.sample(start(), EULER, SIGMAS)
    del unet.out[2].forward
    assert KEY not in guider.model_options["transformer_options"]
    for name, each in unet.named_modules():
        assert vars(each).keys() == before[name].keys(), name
    unet.calls = 0
    assert torch.equal(guider.sample(start(), EULER, SIGMAS), expected)


def test_a_conditioning_that_begins_midway_is_computed_when_it_begins() -> None:
    change = float(SIGMAS[5] + SIGMAS[4]) / 2
    conds = [cond(0.4, timestep_end=change), cond(1.5, timestep_start=change)]
    _, report, unet = run(DEEP, positive=conds)
    assert not report.full
    assert (report.partial, unet.calls) == (3, STEPS)  # step 5 is whole, as the other begins


def test_a_model_that_another_pack_calls_twice_is_computed_in_full() -> None:
    """Within a call, where no identity tells the two apart; ControlNets are not lost by that."""

    def repeat(executor: Any, x: Any, *args: Any) -> torch.Tensor:
        t, context, y, control, options = args
        first = executor(x, t, context, y, control, options)
        return (first + executor(x + 0.1, t, context, y, None, options)) / 2

    drawn: list[torch.Tensor] = []
    for follows in (False, True):
        patcher, control = Patcher(UNetModel(make_unet())), Residual()
        if follows:
            patcher = PlanOnModel(PlanChoice(DEEP)).attach(patcher)
        patcher.add_wrapper_with_key("diffusion_model", "repeat", repeat)
        guider = Guider(patcher, [cond(0.4, control=control)], [cond(-0.3)])
        drawn.append(guider.sample(start(), EULER, SIGMAS))
    assert torch.equal(*drawn)


def test_latents_of_another_size_midway_start_over() -> None:
    def sample(model: Any, x: torch.Tensor, sigmas: torch.Tensor, **options: Any) -> torch.Tensor:
        for step in range(STEPS):
            if step == 4 and x.shape[-1] > 4:
                x = x.repeat(1, 1, 2, 2)
            ones = x.new_ones(len(x))
            denoised = model(x, sigmas[step] * ones, **options["extra_args"])
            x = x + (x - denoised) / sigmas[step] * (sigmas[step + 1] - sigmas[step])
        return x

    drawn, report, _ = run(DEEP, sampler=Sampler(sample))
    assert torch.isfinite(drawn).all()
    assert report.partial == 3
    assert any("shape" in why for why in report.forced)


def test_samplers_of_two_calls_a_step_and_runs_from_a_picture() -> None:
    _, report, _ = run(DEEP, sampler=Sampler(sample_heun))
    assert (report.calls, report.partial) == (2 * STEPS - 1, 2 * 4 - 1)
    _, report, _ = run(DEEP, sigmas=SIGMAS[2:])
    assert (report.calls, report.partial) == (4, 2)


def test_half_precision() -> None:
    unet = UNetModel(tiny_unet()).to(torch.bfloat16)
    unet.text, unet.dtype = unet.text.bfloat16(), torch.bfloat16
    drawn, report, _ = run(DEEP, unet)
    assert report.partial == 4
    assert torch.isfinite(drawn).all()
