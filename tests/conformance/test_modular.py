"""Modular pipelines: the guider calls the conditional and the unconditional branch apart."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from diffusers import ClassifierFreeGuidance, StableDiffusionXLAutoBlocks

import leansd
from conformance.cases import STEPS, build_xl
from conformance.reference import Output, is_empty, is_plain, recall, watch_stores
from conformance.samplers import SAMPLERS
from leansd.anatomy import read_anatomy
from leansd.plans import Anatomy, Plan
from leansd.plans.anatomy import HEAD
from leansd.plans.compile import compile_plan
from leansd.plans.liveness import Call
from watching import watch_before


@pytest.fixture
def pipe() -> Any:
    return make_modular(ClassifierFreeGuidance(guidance_scale=4.0))


def make_modular(guider: Any, sampler: str = "euler") -> Any:
    parts = build_xl(SAMPLERS[sampler].make()).components
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    parts = {name: part for name, part in parts.items() if part is not None}
    pipe.update_components(**parts, guider=guider)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    arguments = {"prompt": "a cat", "num_inference_steps": STEPS, "generator": generator}
    return pipe(output="latents", output_type="latent", **(arguments | options))


@contextmanager
def overwrite_apart(pipe: Any, anatomy: Anatomy, calls: Sequence[Call]) -> Iterator[None]:
    """Brute force: every unit of both branches is computed, then inherited outputs are put over.

    What an unconditional branch computes at a call that leaves it out is thrown away.
    """
    history: dict[tuple[str, bool], list[Output]] = {}
    number, cond = -1, torch.empty(0)

    def before_unet(*_: Any) -> None:
        nonlocal number
        number += pipe.guider.is_conditional

    def after_unet(module: Any, args: Any, output: Any) -> Any:
        nonlocal cond
        call, noise = calls[number], output[0]
        if pipe.guider.is_conditional:
            cond = noise
            return None
        differences = history.setdefault(("guidance", True), [])
        if call.guidance == "compute":
            differences.append(Output(call.index, cond - noise, None))
            return None
        rest = cond
        if call.guidance != "drop":
            how = "reuse" if call.guidance == "inherit" else "forecast"
            rest = cond - recall(differences, how, call.index, noise, pipe.scheduler)
        if HEAD in call.pattern.active:
            history.setdefault((HEAD, False), []).append(Output(call.index, rest, None))
        return (rest,)

    def after_unit(at: str, module: Any, args: Any, output: Any) -> Any:
        call, lane = calls[number], pipe.guider.is_conditional
        tensor = output[0] if isinstance(output, tuple) else output
        if not lane and call.guidance != "compute":
            return None
        past = history.setdefault((at, lane), [])
        how = call.pattern.inherited.get(at) or call.pattern.parts.get(at)
        if how is not None:
            tensor = recall(past, how, call.index, args[0], pipe.scheduler)
        elif at in call.pattern.active:
            change = tensor - args[0] if tensor.shape == args[0].shape else None
            past.append(Output(call.index, tensor.clone(), change))
        return (tensor,) if isinstance(output, tuple) else tensor

    handles = [
        pipe.unet.register_forward_pre_hook(before_unet),
        pipe.unet.register_forward_hook(after_unet),
    ]
    for unit in (*anatomy.units, *anatomy.parts):
        module = pipe.unet.get_submodule(unit.path)
        handles.append(module.register_forward_hook(partial(after_unit, unit.at)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def count_branches(pipe: Any) -> Iterator[dict[bool, int]]:
    """How often the head ran for the conditional (True) and the unconditional branch."""
    counts = {True: 0, False: 0}

    def count(*_: Any) -> None:
        counts[pipe.guider.is_conditional] += 1

    handle = watch_before(pipe.unet.conv_norm_out, count)
    try:
        yield counts
    finally:
        handle.remove()


FULL = Plan.full(STEPS)
REUSE = Plan.every(2, cut="up2.l1", steps=STEPS)
PLANS = {
    "full": FULL,
    "reuse": REUSE,
    "residual": Plan.every(2, cut="*.attn", steps=STEPS, how="residual"),
    "guidance": FULL.guide("inherit", at=[2, 4]),
    "guidance-reuse": REUSE.guide("inherit", at=[1, 2]).guide("drop", at=4),
    "guidance-residual": REUSE.inherit("*.attn", at=[2, 4], how="residual").guide("drop", at=3),
    "guidance-head": Plan.between([0, 1, 3], cut=HEAD, steps=STEPS, how="forecast").guide(
        "forecast", at=3
    ),
    "gate": leansd.preset("tgate", steps=STEPS, blocks=3, gate=2),
}


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        *((name, "a cat") for name in PLANS),
        *((name, ["a cat", "a dog"]) for name in ("guidance-residual", "gate")),
    ],
)
def test_branches_called_apart_equal_brute_force(pipe: Any, name: str, prompt: Any) -> None:
    plan, anatomy = PLANS[name], read_anatomy(pipe.unet)
    calls = compile_plan(plan, anatomy).calls
    plain = draw(pipe, prompt=prompt)
    with overwrite_apart(pipe, anatomy, calls):
        expected = draw(pipe, prompt=prompt)
    assert torch.equal(expected, plain) == (name == "full")
    with leansd.inherit(pipe, plan) as run, watch_stores() as stores:
        with count_branches(pipe) as counts:
            assert torch.equal(draw(pipe, prompt=prompt), expected)
        ran = [call for call in calls if HEAD in call.pattern.active]
        whole = sum(call.guidance == "compute" for call in ran)
        assert counts == {True: len(ran), False: whole}
        assert torch.equal(draw(pipe, prompt=prompt), expected)
        assert bool(stores) == (name != "full")
        assert all(map(is_empty, stores))
        assert run.report().calls == 2 * STEPS
    assert is_plain(pipe.unet)
    assert torch.equal(draw(pipe, prompt=prompt), plain)


@pytest.mark.parametrize("cut", ["up2.l1", "head"])
@pytest.mark.parametrize("guidance", ["inherit", "drop"])
def test_branches_called_apart_follow_a_frame_each(pipe: Any, cut: str, guidance: Any) -> None:
    """Guidance is computed: what one branch's pictures do, the other does not know."""
    bare = Plan.every(2, cut=cut, steps=STEPS, how="forecast")
    frame = bare.guide(guidance, at=3)
    prompts = ["a cat", "a dog"]
    plain = draw(pipe, prompt=prompts)
    with leansd.inherit(pipe, bare):
        expected = draw(pipe, prompt=prompts)
    for threshold, result in ((0.0, plain), (math.inf, expected)):
        with leansd.inherit(pipe, frame.guard("sample", threshold=threshold)) as run:
            assert torch.equal(draw(pipe, prompt=prompts), result)
        report = run.report()
        assert report.calls == 2 * STEPS
        assert report.guarded == 2 * 2 * len([row for row in frame.rows if not row.is_key])
    assert not torch.equal(plain, expected)


def test_guider_that_starts_late(pipe: Any) -> None:
    """The branches are first called apart after the last step that leaves one out."""
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=4.0, start=0.4))
    plan = REUSE.guide("inherit", at=1)
    with leansd.inherit(pipe, REUSE):
        expected = draw(pipe)
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=4.0, start=0.4))
    with leansd.inherit(pipe, plan):
        assert torch.equal(draw(pipe), expected)


def test_guider_that_stops_midway(pipe: Any) -> None:
    """Without an unconditional call there is nothing to leave out: the run starts over there."""

    def draw_anew() -> torch.Tensor:
        # A guider still stands at the last step of its last run when the next one asks it.
        pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=4.0, stop=0.6))
        return draw(pipe)

    plain = draw_anew()
    plan = FULL.guide("inherit", at=[1, 4])
    with leansd.inherit(pipe, plan), count_branches(pipe) as counts:
        assert not torch.equal(draw_anew(), plain)
        assert counts == {True: STEPS, False: 2}
    with leansd.inherit(pipe, FULL.guide("inherit", at=[3, 4])):
        assert torch.equal(draw_anew(), plain)


def test_report_counts_a_call_that_is_left_out(pipe: Any) -> None:
    with leansd.inherit(pipe, PLANS["guidance"]) as run:
        draw(pipe)
    report = run.report()
    assert report.full_calls == 2 * (STEPS - 2)
    assert report.predicted_speedup == pytest.approx(STEPS / (STEPS - 1))


def test_guider_of_three_predictions_runs_in_full() -> None:
    pipe = make_modular(ThreePredictions())
    plain = draw(pipe)
    with leansd.inherit(pipe, FULL.guide("inherit", at=[2, 3])):
        assert torch.equal(draw(pipe), plain)


class ThreePredictions(ClassifierFreeGuidance):
    """Says of itself, as perturbed-attention guiders do, that it may make a third prediction."""

    _input_predictions: ClassVar = ["pred_cond", "pred_uncond", "pred_cond_skip"]
