"""Plans of whole steps for pipelines with a transformer, SD3 to Z-Image, all tiny."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend

import leansd
from leansd.errors import LeansdError
from leansd.evaluation.cost import CostModel
from leansd.plans import Plan
from leansd.plans.plan import Tuned
from leansd.plans.presets import SPEED_PRESETS
from leansd.plans.resolve import carry_over
from leansd.runtime.clock import read_schedule
from leansd.tuning.host import PipelineHost, measure_whole_cost
from tiny_transformers import (
    FLUX,
    PIPELINES,
    SD3,
    TOKENS,
    WIDTH,
    draw,
    draw_embedding,
    make_flux,
    make_sd3,
    make_sd3_img2img,
)
from watching import watch_before

STEPS = 10
KEYS = (0, 1, 2, 4, 6, 9)
PLAN = Plan.between(KEYS, cut="head", steps=STEPS, how="forecast").correct({4: 0.2, 6: (0.1, 0.1)})


@pytest.mark.parametrize(
    ("name", "argument"), [("sd3", "guidance_scale"), ("qwen", "true_cfg_scale")]
)
def test_the_scale_of_a_run_is_known(name: str, argument: str) -> None:
    make, arguments = PIPELINES[name]
    pipe = make()
    tuned = replace(PLAN, tuned=Tuned(type(pipe.scheduler).__name__, "", 4.0))
    with leansd.inherit(pipe, tuned) as run, pytest.warns(UserWarning, match="not 2.5"):
        draw(pipe, arguments, STEPS, **{argument: 2.5})
    assert any("tuned at guidance 4, not 2.5" in note for note in run.report().notes)
    with leansd.inherit(pipe, tuned) as run:
        draw(pipe, arguments, STEPS, **{argument: 4.0})
    assert not run.report().notes


class Counter:
    """How often a pipeline's transformer really runs."""

    def __init__(self, pipe: Any) -> None:
        self.calls = 0
        first = next(each for each in pipe.transformer.modules() if type(each) is torch.nn.Linear)
        watch_before(first, self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1


@pytest.mark.parametrize("name", PIPELINES)
def test_calls_are_as_predicted_and_a_full_plan_changes_no_bit(name: str) -> None:
    make, arguments = PIPELINES[name]
    pipe = make()
    expected = draw(pipe, arguments, STEPS)
    with leansd.inherit(pipe, Plan.full(STEPS)) as run:
        assert torch.equal(draw(pipe, arguments, STEPS), expected)
    assert run.report().full_calls == STEPS
    counter = Counter(pipe)
    with leansd.inherit(pipe, PLAN) as run:
        first = draw(pipe, arguments, STEPS)
        once = counter.calls
        assert torch.equal(draw(pipe, arguments, STEPS), first)
    report = run.report()
    assert (report.calls, report.full_calls, report.inherited) == (STEPS, len(KEYS), 4)
    assert not report.forced
    assert counter.calls == 2 * once
    assert torch.isfinite(first).all()
    assert not torch.equal(first, expected)
    assert (first - expected).norm() < 0.3 * expected.norm()
    assert torch.equal(draw(pipe, arguments, STEPS), expected)
    assert "forward" not in vars(pipe.transformer)


def test_a_forecast_is_what_it_says() -> None:
    """Written out for one step of Euler: the line through the last two outputs over log-SNR."""
    pipe, plan = make_sd3(), Plan.full(4).inherit("head", at=3, how="forecast")
    outputs: list[torch.Tensor] = []
    pipe.transformer.register_forward_hook(lambda _, given, output: outputs.append(output[0]))
    counter = Counter(pipe)
    with leansd.inherit(pipe, plan):
        draw(pipe, SD3, 4, guidance_scale=1.0)
    assert (len(outputs), counter.calls) == (4, 3)
    sigmas, over = pipe.scheduler.sigmas.tolist(), read_schedule(pipe.scheduler).log_snr
    expected = [2 * math.log((1 - sigma) / sigma) for sigma in sigmas[1:4]]
    assert over[1:] == pytest.approx(expected)
    weight = (over[3] - over[1]) / (over[2] - over[1])
    assert torch.equal(outputs[3], torch.lerp(outputs[1], outputs[2], weight))


@pytest.mark.parametrize(
    ("scheduler", "calls", "computed"),
    [
        (FlowMatchHeunDiscreteScheduler(shift=3.0), 2 * STEPS - 1, 2 * 6 - 1),
        (
            UniPCMultistepScheduler(
                use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
            ),
            STEPS, 6,
        ),
    ],
    ids=["heun", "unipc"],
)  # fmt: skip
def test_other_samplers_of_flow(scheduler: Any, calls: int, computed: int) -> None:
    pipe = make_sd3(scheduler=scheduler)
    expected = draw(pipe, SD3, STEPS)
    with leansd.inherit(pipe, Plan.full(STEPS)):
        assert torch.equal(draw(pipe, SD3, STEPS), expected)
    with leansd.inherit(pipe, PLAN) as run:
        drawn = draw(pipe, SD3, STEPS)
    assert (run.report().calls, run.report().full_calls) == (calls, computed)
    assert torch.isfinite(drawn).all()


def test_from_a_picture_on() -> None:
    pipe = make_sd3_img2img()
    given = {**SD3, "image": Image.new("RGB", (64, 64), "red"), "strength": 0.6}
    expected = draw(pipe, given, STEPS)
    with leansd.inherit(pipe, Plan.full(STEPS)):
        assert torch.equal(draw(pipe, given, STEPS), expected)
    with leansd.inherit(pipe, PLAN) as run:
        draw(pipe, given, STEPS)
    # Steps 4 to 9, the first of them computed whatever the plan says.
    assert (run.report().calls, run.report().full_calls) == (6, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_scale": 1.0},
        {name: each.repeat(2, *[1] * (each.ndim - 1)) for name, each in SD3.items()},
        {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.2,
         "skip_layer_guidance_stop": 0.8},
    ],
    ids=["unguided", "two pictures", "skipped layers"],
)  # fmt: skip
def test_other_calls_of_sd3(changes: Any) -> None:
    pipe = make_sd3()
    expected = draw(pipe, SD3, STEPS, **changes)
    with leansd.inherit(pipe, Plan.full(STEPS)):
        assert torch.equal(draw(pipe, SD3, STEPS, **changes), expected)
    with leansd.inherit(pipe, PLAN) as run:
        drawn = draw(pipe, SD3, STEPS, **changes)
    assert len(KEYS) <= run.report().full_calls <= len(KEYS) + 1
    assert (drawn - expected).norm() < 0.2 * expected.norm()


def test_what_changes_midway_is_computed() -> None:
    pipe = make_sd3()

    def exchange(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            tensors["prompt_embeds"] = tensors["prompt_embeds"] * 1.5
        return tensors

    options = {
        "callback_on_step_end": exchange,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    with leansd.inherit(pipe, PLAN) as run:
        draw(pipe, SD3, STEPS, **options)
    assert run.report().full_calls == len(KEYS) + 1  # step 5


def test_what_gives_more_than_one_tensor_is_computed_and_the_report_says_so() -> None:
    pipe = make_sd3()
    expected = draw(pipe, SD3, STEPS)
    forward = pipe.transformer.forward
    pipe.transformer.forward = lambda *args, **kwargs: (*forward(*args, **kwargs), 1)
    with leansd.inherit(pipe, PLAN) as run:
        assert torch.equal(draw(pipe, SD3, STEPS), expected)
    assert (run.report().calls, run.report().full_calls) == (STEPS, STEPS)
    assert "no one tensor" in next(iter(run.report().forced))


def test_what_others_have_hooked_is_computed() -> None:
    pipe = make_sd3()
    expected = draw(pipe, SD3, STEPS)
    seen: list[torch.Tensor] = []
    inner = pipe.transformer.transformer_blocks[0].attn
    handle = inner.register_forward_hook(lambda _, given, output: seen.append(output[0]))
    with leansd.inherit(pipe, PLAN) as run:
        assert torch.equal(draw(pipe, SD3, STEPS), expected)
    assert len(seen) == run.report().full_calls == STEPS
    assert next(iter(run.report().forced)) == "a module of the transformer is hooked"
    handle.remove()
    with leansd.inherit(pipe, PLAN) as run:
        draw(pipe, SD3, STEPS)
    assert run.report().full_calls == len(KEYS)


def test_an_interrupted_call_leaves_nothing() -> None:
    pipe = make_sd3()

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            raise KeyboardInterrupt
        return tensors

    with leansd.inherit(pipe, PLAN):
        expected = draw(pipe, SD3, STEPS)
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, SD3, STEPS, callback_on_step_end=stop)
        assert torch.equal(draw(pipe, SD3, STEPS), expected)


def test_a_preview_by_the_same_pipeline_leaves_the_run_as_it_is() -> None:
    """Its sampler counts its own steps, so plain diffusers wants another one for the preview."""
    pipe = make_sd3()
    previews: list[torch.Tensor] = []

    def preview(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            own, pipe.scheduler = pipe.scheduler, copy.deepcopy(pipe.scheduler)
            previews.append(draw(pipe, SD3, STEPS))
            pipe.scheduler = own
        return tensors

    with leansd.inherit(pipe, PLAN) as run:
        expected, counter = draw(pipe, SD3, STEPS), Counter(pipe)
        assert torch.equal(draw(pipe, SD3, STEPS, callback_on_step_end=preview), expected)
    assert torch.equal(previews[0], expected)
    assert (run.report().calls, counter.calls) == (STEPS, 2 * len(KEYS))


def test_calls_of_others_are_let_through() -> None:
    """A pipeline that shares the transformer, and whoever calls it by hand."""
    pipe, other = make_sd3(), make_sd3()
    other.transformer = pipe.transformer
    expected = draw(other, SD3, STEPS)
    with leansd.inherit(pipe, PLAN):
        assert torch.equal(draw(other, SD3, STEPS), expected)
        with pytest.raises(LeansdError, match="already attached"):
            leansd.inherit_(pipe, PLAN)
    leansd.inherit_(pipe, PLAN)
    assert not torch.equal(draw(pipe, SD3, STEPS), expected)
    leansd.release_(pipe)
    assert torch.equal(draw(pipe, SD3, STEPS), expected)


def test_presets_fit_themselves() -> None:
    pipe = make_flux()
    with leansd.inherit(pipe, "balanced") as run, pytest.warns(match="as for euler"):
        draw(pipe, FLUX, 20)
    # What it says it is: the plan for Euler, and as fast as its name promises, or faster.
    report = run.report()
    assert report.full_calls == len(leansd.preset("balanced", 20, sampler="euler").keys)
    assert report.predicted_speedup >= SPEED_PRESETS["balanced"].speedup
    with leansd.inherit(pipe, "balanced") as run, pytest.warns(match="run in full"):
        draw(pipe, FLUX, 4)
    assert run.report().full_calls == 4


@pytest.mark.parametrize(
    ("plan", "options", "why"),
    [
        (Plan.every(2, cut="up1", steps=STEPS), {}, "only whole steps"),
        ("deepcache", {}, "only whole steps"),
        ("easycache", {}, "decides as it runs"),
        (PLAN, {"nets": {"light": None}}, "cannot switch"),
        (PLAN, {"compile": True}, "compile it by itself"),
        (PLAN.fit(12), {}, "is for 12 steps, this run has 10"),
    ],
)
def test_what_is_for_unets_is_refused_before_the_first_step(
    plan: Any, options: Any, why: str
) -> None:
    pipe = make_sd3()
    counter = Counter(pipe)
    with pytest.raises(LeansdError, match=why), leansd.inherit(pipe, plan, **options):
        draw(pipe, SD3, STEPS)
    assert counter.calls == 0
    assert "forward" not in vars(pipe.transformer)


@pytest.mark.parametrize("name", PIPELINES)
def test_tuning_finds_plans_of_whole_steps(name: str) -> None:
    make, arguments = PIPELINES[name]
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    texts = [draw_embedding(1, TOKENS, WIDTH, seed=seed) for seed in range(4)]
    as_rows = isinstance(arguments["prompt_embeds"], list)
    calls = [{**arguments, "prompt_embeds": [*text] if as_rows else text} for text in texts]
    cost = CostModel(
        "tiny", 4, (64, 64), {"head": {"whole": 0.1, "none": 0.0}}, {},
        fixed={"whole": 0.0, "none": 0.001},
    )  # fmt: skip
    front = leansd.tune(
        pipe, calls, steps=STEPS, speeds=(1.6,), grids=(1.0, 0.6), tries=1, cost=cost
    )
    every = (*front.points, *front.dominated)
    plan = next(each.plan for each in every if not each.is_plain)
    assert plan.steps in (STEPS, 6)
    with leansd.inherit(pipe, plan) as run:
        draw(pipe, arguments, plan.steps)
    assert run.report().full_calls == len(plan.keys)
    # It knows the noise levels of the runs, which some pipelines lay out by themselves.
    assert plan.tuned is not None
    assert plan.tuned.log_snr == pytest.approx(read_schedule(pipe.scheduler).log_snr, abs=1e-3)
    # Nothing given, the machine's time is measured.
    measured = measure_whole_cost(PipelineHost(pipe), calls, STEPS)
    assert measured.full_call > measured.fixed["none"] >= 0


# -- other noise levels, and what changes in the midst of a run ------------------------------------


def tune_at(shift: float) -> Plan:
    """The plan as tuned where SD3's sampler lays out its steps by such a shift."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(STEPS)
    levels = tuple(read_schedule(scheduler).log_snr)
    return replace(PLAN, tuned=Tuned("flow-euler", "", None, levels))


def test_key_steps_move_with_the_noise_levels_and_the_report_says_so() -> None:
    pipe = make_sd3()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with leansd.inherit(pipe, tune_at(3.0)) as run:
            same = draw(pipe, SD3, STEPS)
    assert run.report().notes == ()
    with leansd.inherit(pipe, PLAN):
        assert torch.equal(draw(pipe, SD3, STEPS), same)
    plan = tune_at(1.0)
    with leansd.inherit(pipe, plan) as run, pytest.warns(match="moved to the nearest"):
        draw(pipe, SD3, STEPS)
    report = run.report()
    assert plan.tuned is not None
    moved = carry_over(plan, plan.tuned.log_snr, read_schedule(pipe.scheduler).log_snr)
    assert report.plan.keys == moved.keys != PLAN.keys
    assert any("other noise levels" in note for note in report.notes)
    assert "other noise levels" in str(report)


def test_a_run_from_a_picture_says_at_which_strength_its_plan_was_tuned() -> None:
    pipe = make_sd3_img2img()
    given = {**SD3, "image": Image.new("RGB", (64, 64), "red"), "strength": 0.6}
    with leansd.inherit(pipe, tune_at(3.0)) as run, pytest.warns(match="at strength 1, not 0.6"):
        draw(pipe, given, STEPS)
    assert run.report().full_calls == 3


def change_weights(pipe: Any) -> None:
    with torch.no_grad():
        pipe.transformer.transformer_blocks[0].attn.to_v.weight.mul_(-2)


def change_processor(pipe: Any) -> None:
    attention = pipe.transformer.transformer_blocks[0].attn
    attention.processor = copy.deepcopy(attention.processor)


@pytest.mark.parametrize("change", [change_weights, change_processor])
def test_whatever_follows_other_weights_is_computed(change: Any) -> None:
    pipe = make_sd3()

    def at_step_4(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            change(pipe)
        return tensors

    with leansd.inherit(pipe, PLAN) as run:
        draw(pipe, SD3, STEPS, callback_on_step_end=at_step_4)
    assert run.report().full_calls == len(KEYS) + 1  # step 5


def compile_by_itself(pipe: Any, backend: Any) -> None:
    pipe.transformer.compile(backend=backend, fullgraph=True)


def wrap_compiled(pipe: Any, backend: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend=backend, fullgraph=True)


@pytest.mark.parametrize("compile_", [compile_by_itself, wrap_compiled])
def test_a_compiled_transformer_is_spared_and_its_graph_stays_as_it_is(compile_: Any) -> None:
    pipe = make_sd3()
    full = draw(pipe, SD3, STEPS)
    with leansd.inherit(pipe, PLAN):
        expected = draw(pipe, SD3, STEPS)
    counter = CompileCounterWithBackend("eager")
    compile_(pipe, counter)
    assert torch.equal(draw(pipe, SD3, STEPS), full)
    with leansd.inherit(pipe, PLAN) as run:
        assert torch.equal(draw(pipe, SD3, STEPS), expected)
    assert (run.report().full_calls, dict(run.report().forced)) == (len(KEYS), {})
    assert torch.equal(draw(pipe, SD3, STEPS), full)
    assert counter.frame_count == 1


def test_conditions_made_anew_at_every_step_are_the_same_ones() -> None:
    """Sana casts them in each step where they come in another precision."""
    make, arguments = PIPELINES["sana"]
    pipe = make()
    pipe.to(torch.bfloat16)
    with leansd.inherit(pipe, PLAN) as run:
        draw(pipe, arguments, STEPS)
    assert run.report().full_calls == len(KEYS)


def test_heun_is_played_and_its_tuning_refused_by_one_sentence() -> None:
    pipe = make_sd3(scheduler=FlowMatchHeunDiscreteScheduler(shift=3.0))
    counter = Counter(pipe)
    with pytest.raises(LeansdError, match=r"transformer more than once .* such as flow-euler$"):
        leansd.tune(pipe, ["a pear"] * 4, steps=STEPS, speeds=(2.0,))
    assert counter.calls == 0


def test_a_cache_of_blocks_runs_inside_of_the_steps_that_are_computed() -> None:
    """Diffusers' own; what it spares within a step is its business."""
    pipe = make_flux(blocks=2)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1.0))
    counter, blocks = Counter(pipe), list[int]()
    watch_before(pipe.transformer.transformer_blocks[1].attn, lambda *_: blocks.append(1))
    cached = draw(pipe, FLUX, STEPS)
    alone, spared = counter.calls, STEPS - len(blocks)
    blocks.clear()
    with leansd.inherit(pipe, PLAN) as run:
        drawn = draw(pipe, FLUX, STEPS)
    assert (run.report().full_calls, dict(run.report().forced)) == (len(KEYS), {})
    assert counter.calls - alone == alone * len(KEYS) // STEPS
    assert 0 < spared < STEPS
    assert len(blocks) < len(KEYS)
    assert torch.isfinite(drawn).all()
    assert torch.equal(draw(pipe, FLUX, STEPS), cached)
