"""The engine against brute force: the same bits, units run as predicted, nothing left behind."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

import leansd
from leansd.anatomy import read_anatomy
from leansd.errors import LeansdError
from leansd.plans import Anatomy, Plan
from leansd.plans.compile import compile_plan
from leansd.runtime.arguments import unwrap
from loops import count_calls, sample
from tiny import tiny_pipeline, tiny_scheduler, tiny_unet, tiny_xl_unet
from watching import watch, watch_before

STEPS = 4
UNETS = {"sd": tiny_unet, "sdxl": tiny_xl_unet}


class Loop:
    """What `leansd.inherit` needs of a pipeline: a UNet and a scheduler."""

    def __init__(self, unet: UNet2DConditionModel, scheduler: Any = None) -> None:
        self.unet = unet
        self.scheduler = scheduler or tiny_scheduler()

    def __call__(self, steps: int = STEPS, **options: Any) -> torch.Tensor:
        return sample(self.unet, steps, scheduler=self.scheduler, **options)


def sample_by_brute_force(loop: Loop, plan: Plan, anatomy: Anatomy) -> torch.Tensor:
    """Compute every unit at every step and then overwrite what the plan says is reused.

    A reused output is that of the last step at which the unit was due, not merely run by force.
    """
    outputs: dict[str, torch.Tensor] = {}
    due = [call.pattern.computed for call in compile_plan(plan, anatomy).calls]
    inherits = plan.resolve(anatomy)
    step = 0

    def make_hook(at: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            if at not in inherits[step]:
                if at in due[step]:
                    outputs[at] = unwrap(output).clone()
                return output
            kept = outputs[at].clone()
            return (kept,) if isinstance(output, tuple) else kept

        return hook

    def on_step(index: int) -> None:
        nonlocal step
        step = index

    handles = [
        loop.unet.get_submodule(unit.path).register_forward_hook(make_hook(unit.at))
        for unit in anatomy
    ]
    try:
        return loop(plan.steps, on_step=on_step)
    finally:
        for handle in handles:
            handle.remove()


def predict_calls(plan: Plan, anatomy: Anatomy) -> Counter[str]:
    return Counter(at for call in compile_plan(plan, anatomy).calls for at in call.pattern.active)


@pytest.mark.parametrize("kind", UNETS)
def test_every_single_unit_cut_equals_brute_force(kind: str) -> None:
    """Each at a step of its own, after one that computes all; idle units give NaN, so a wrong
    liveness cannot stay hidden."""
    loop = Loop(UNETS[kind]())
    anatomy = read_anatomy(loop.unet)
    addresses = [unit.at for unit in anatomy.units[:-1]]
    plan = Plan.full(2 * len(addresses))
    for number, at in enumerate(addresses):
        plan = plan.inherit(at, at=2 * number + 1)
    expected = sample_by_brute_force(loop, plan, anatomy)
    with leansd.inherit(loop, plan), count_calls(loop.unet, anatomy) as counts:
        result = loop(plan.steps)
    assert expected.isfinite().all()
    assert torch.equal(result, expected)
    assert counts == predict_calls(plan, anatomy)


@pytest.mark.parametrize(
    "patterns",
    [
        ("up*",),
        ("mid", "dn3"),
        ("dn*",),
        ("*.attn",),
        ("dn0.l0.res", "up3.l1.attn"),
        ("stem", "up2"),
    ],
)
def test_combined_cuts_equal_brute_force(patterns: tuple[str, ...]) -> None:
    loop = Loop(tiny_unet())
    anatomy = read_anatomy(loop.unet)
    plan = Plan.full(6).inherit(*patterns, at=[1, 2, 4]).inherit("mid", at=[2, 3, 5])
    expected = sample_by_brute_force(loop, plan, anatomy)
    with leansd.inherit(loop, plan), count_calls(loop.unet, anatomy) as counts:
        result = loop(6)
    assert torch.equal(result, expected)
    assert counts == predict_calls(plan, anatomy)


def test_full_plan_and_afterwards_are_bit_equal(any_unet: UNet2DConditionModel) -> None:
    loop = Loop(any_unet)
    modules = list(any_unet.modules())
    before = [dict(vars(module)) for module in modules]
    expected = loop()
    with leansd.inherit(loop, Plan.full(STEPS)):
        assert torch.equal(loop(), expected)
    with leansd.inherit(loop, Plan.every(3, cut="mid", steps=STEPS)):
        assert not torch.equal(loop(), expected)
    assert torch.equal(loop(), expected)
    assert [list(vars(module)) for module in modules] == [list(each) for each in before]


def test_second_run_equals_the_first_and_nothing_is_kept() -> None:
    loop = Loop(tiny_unet())
    plan = Plan.every(2, cut="up3.l1", steps=5, how="forecast")
    with leansd.inherit(loop, plan) as run:
        first = loop(5)
        assert run.report().bytes_kept > 0
        assert run._follower.run is not None
        assert run._follower.run.bytes == 0
        assert torch.equal(loop(5), first)


def test_kept_bytes_are_the_liveness_bound() -> None:
    loop = Loop(tiny_unet())
    anatomy = read_anatomy(loop.unet)
    plan = Plan.every(2, cut="up3.l1", steps=STEPS)
    with leansd.inherit(loop, plan) as run:
        loop()
    one = 2 * anatomy["up3.l1.attn"].channels[1] * 8 * 8 * 4  # [2, C, 8, 8] in float32
    assert run.report().bytes_kept == one
    assert max(len(alive) for alive in compile_plan(plan, anatomy).alive) == 1


def test_residual_is_present_input_plus_kept_change() -> None:
    loop = Loop(tiny_unet())
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    mid = loop.unet.mid_block

    def remember(module: Any, args: Any, output: torch.Tensor) -> None:
        seen.append((args[0].clone(), output.clone()))

    handle = watch(mid, remember)
    with leansd.inherit(loop, Plan.every(2, cut="mid", steps=2, how="residual")):
        loop(2)
    handle.remove()
    (input_before, output_before), (input_now, output_now) = seen
    expected = input_now + (output_before - input_before)
    assert torch.allclose(output_now, expected, atol=1e-5)
    assert not torch.equal(output_now, output_before)


def test_forecast_is_the_line_over_log_snr() -> None:
    loop = Loop(tiny_unet())
    seen: list[torch.Tensor] = []
    handle = watch(loop.unet.mid_block, lambda module, args, output: seen.append(output.clone()))
    with leansd.inherit(loop, Plan.between([0, 1], cut="mid", steps=STEPS, how="forecast")):
        loop()
    handle.remove()
    alphas = loop.scheduler.alphas_cumprod[loop.scheduler.timesteps].double()
    over = torch.log(alphas / (1 - alphas))
    for step in (2, 3):
        slope = (seen[1] - seen[0]) / (over[1] - over[0])
        expected = seen[1] + slope * (over[step] - over[1])
        assert torch.allclose(seen[step], expected.float(), atol=1e-5)


def test_forecast_with_one_key_step_reuses() -> None:
    loop = Loop(tiny_unet())
    with leansd.inherit(loop, Plan.between([0], cut="mid", steps=STEPS, how="forecast")):
        forecast = loop()
    with leansd.inherit(loop, Plan.between([0], cut="mid", steps=STEPS)):
        assert torch.equal(loop(), forecast)


def test_changed_batch_midway_computes_in_full() -> None:
    """Guidance switched off midway halves the batch: a full step, then the plan goes on."""
    unet = tiny_unet()
    loop = Loop(unet)
    anatomy = read_anatomy(unet)
    inputs = {"encoder_hidden_states": torch.randn(2, 77, 32)}
    loop.scheduler.set_timesteps(6)
    latents = torch.randn(2, 4, 8, 8)
    with torch.no_grad(), leansd.inherit(loop, Plan.every(3, cut="up3.l1", steps=6)):
        for index, t in enumerate(loop.scheduler.timesteps):
            if index == 2:
                latents, inputs = latents[:1], {"encoder_hidden_states": torch.randn(1, 77, 32)}
            with count_calls(unet, anatomy) as counts:
                noise = unet(latents, t, **inputs).sample
            assert noise.isfinite().all()
            assert (counts["mid.l0.res"] == 1) == (index in (0, 2, 3))


def test_branches_called_apart_do_not_mix() -> None:
    """Two calls a step, one for each guidance branch, give what two attached loops give."""
    unet = tiny_unet()
    text = torch.randn(2, 77, 32)
    start = torch.randn(1, 4, 8, 8)
    plan = Plan.every(2, cut="up3.l1", steps=STEPS)

    def run(branches: list[int]) -> dict[int, torch.Tensor]:
        loop = Loop(unet)
        loop.scheduler.set_timesteps(STEPS)
        latents = dict.fromkeys(branches, start)
        with torch.no_grad(), leansd.inherit(loop, plan):
            for t in loop.scheduler.timesteps:
                for branch in branches:
                    noise = unet(latents[branch], t, text[branch : branch + 1]).sample
                    latents[branch] = loop.scheduler.step(noise, t, latents[branch]).prev_sample
        return latents

    both = run([0, 1])
    assert torch.equal(both[0], run([0])[0])
    assert torch.equal(both[1], run([1])[1])


def test_image_to_image_runs_the_tail_of_the_plan() -> None:
    loop = Loop(tiny_unet())
    anatomy = read_anatomy(loop.unet)
    plan = Plan.every(2, cut="mid", steps=8)
    loop.scheduler.set_timesteps(8)
    text = torch.randn(1, 77, 32)
    ran = []
    with torch.no_grad(), leansd.inherit(loop, plan):
        for t in loop.scheduler.timesteps[3:]:
            with count_calls(loop.unet, anatomy) as counts:
                loop.unet(torch.randn(1, 4, 8, 8), t, text)
            ran.append(counts["mid.l0.res"])
    assert ran == [1, 1, 0, 1, 0]  # steps 3 (first, so in full), 4, 5, 6, 7


def test_other_step_count_is_refused_before_the_first_step() -> None:
    loop = Loop(tiny_unet())
    anatomy = read_anatomy(loop.unet)
    with (
        leansd.inherit(loop, Plan.full(5)),
        count_calls(loop.unet, anatomy) as counts,
        pytest.raises(LeansdError, match=r"for 5 steps, this run has 4.*plan\.fit\(4\)"),
    ):
        loop(4)
    assert not counts
    with leansd.inherit(loop, "balanced"):
        loop(9)
        loop(12)


def test_few_steps_run_in_full_unless_the_plan_itself_is_given() -> None:
    loop = Loop(tiny_unet())
    expected = loop(8)
    with leansd.inherit(loop, "turbo"), pytest.warns(UserWarning, match="8 steps change too much"):
        assert torch.equal(loop(8), expected)
    with leansd.inherit(loop, leansd.preset("turbo", steps=8, sampler="ddim")):
        assert not torch.equal(loop(8), expected)


def test_plan_of_another_anatomy_names_step_and_address() -> None:
    plan = Plan.every(2, cut="up3.l1", steps=STEPS)
    with pytest.raises(LeansdError, match=r"step 1: address 'up3.l1' matches nothing"):
        leansd.inherit(Loop(tiny_xl_unet()), plan)


def test_attaching_twice_is_refused() -> None:
    loop = Loop(tiny_unet())
    with leansd.inherit(loop, "fast"), pytest.raises(LeansdError, match="already attached"):
        leansd.inherit_(loop, "fast")
    leansd.inherit_(loop, "fast")
    with pytest.raises(LeansdError, match="already attached"), leansd.inherit(loop, "fast"):
        pass
    leansd.release_(loop)
    leansd.release_(loop)
    assert "forward" not in vars(loop.unet)


def test_exception_midway_leaves_nothing() -> None:
    loop = Loop(tiny_unet())
    expected = loop()

    def fail(module: Any, args: Any) -> None:
        raise RuntimeError("out of luck")

    run = leansd.inherit_(loop, Plan.every(2, cut="mid", steps=STEPS))
    handle = watch_before(loop.unet.up_blocks[2], fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        loop()
    handle.remove()
    assert run._follower.run is None
    loop()
    leansd.release_(loop)
    assert torch.equal(loop(), expected)


def test_copy_of_an_attached_unet_is_plain_and_its_own() -> None:
    loop = Loop(tiny_unet())
    expected = loop()
    with leansd.inherit(loop, Plan.every(2, cut="mid", steps=STEPS)):
        copied = Loop(copy.deepcopy(loop.unet))
    assert torch.equal(copied(), expected)
    with torch.no_grad():
        for parameter in copied.unet.parameters():
            parameter.zero_()
    assert not copied.unet(torch.ones(1, 4, 8, 8), 1, torch.ones(1, 77, 32)).sample.any()
    assert torch.equal(loop(), expected)


def test_raw_loop_without_scheduler() -> None:
    unet = tiny_unet()
    anatomy = read_anatomy(unet)
    text = torch.randn(1, 77, 32)
    with torch.no_grad(), leansd.inherit(unet, Plan.every(2, cut="mid", steps=3)):
        for run in ([900, 500, 100], [800, 400, 50]):
            ran = []
            for t in run:
                with count_calls(unet, anatomy) as counts:
                    unet(torch.randn(1, 4, 8, 8), t, text)
                ran.append(counts["mid.l0.res"])
            assert ran == [1, 0, 1]
    with pytest.raises(LeansdError, match="bare UNet"):
        leansd.inherit(unet, "fast")


def test_another_pipeline_on_the_same_unet_is_not_touched() -> None:
    unet = tiny_unet()
    attached, other = Loop(unet), Loop(unet)
    expected = other()
    with leansd.inherit(attached, Plan.every(2, cut="mid", steps=STEPS)):
        assert torch.equal(other(), expected)
        assert not torch.equal(attached(), expected)


def test_whole_pipeline_and_report() -> None:
    pipe = tiny_pipeline()

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        return pipe(
            "a cat", num_inference_steps=5, generator=generator, output_type="latent"
        ).images

    expected = draw()
    with leansd.inherit(pipe, leansd.preset("full", steps=5)):
        assert torch.equal(draw(), expected)
    with leansd.inherit(pipe, leansd.preset("deepcache", interval=2, steps=5)) as run:
        with pytest.raises(LeansdError, match="nothing has run yet"):
            run.report()
        draw()
    report = run.report()
    assert (report.calls, report.full_calls) == (5, 3)
    assert report.computed + report.inherited + report.idle == 5 * 46
    assert report.predicted_speedup > 1.2
    assert "speed-up" in str(report)
