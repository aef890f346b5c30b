"""Adaptive plans: every picture inherits or not on its own, and otherwise nothing is different."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler, StableDiffusionPAGPipeline, UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode

import leansd
from conformance.models import small_unet
from leansd.anatomy import read_anatomy
from leansd.errors import LeansdError
from leansd.plans import Plan
from leansd.plans.row import MEASURES, How, Measure, Row
from leansd.runtime.attachment import Attachment
from leansd.runtime.run import Run
from test_control import make_controlnet
from test_control import make_pipeline as make_control_pipeline
from test_inheritance import UNETS, Loop
from tiny import TOKENS, WIDTH, shallow_unet, tiny_pipeline, tiny_unet
from watching import watch, watch_before

STEPS = 8
ALWAYS, NEVER = 0.0, math.inf
THRESHOLDS = {0.01: STEPS, 0.02: 4, 0.1: 2}
"""From every step computed to none but the key steps, of which so many where outputs are reused."""


class Batch(Loop):
    """A loop over given pictures, latents [B, 4, 8, 8] that each move at a pace of their own."""

    def __init__(self, unet: UNet2DConditionModel, pictures: tuple[int, ...] = (0, 1)) -> None:
        super().__init__(unet)
        channels = unet.config["in_channels"]
        noise = torch.randn(3, channels, 8, 8, generator=torch.Generator().manual_seed(4))
        text = torch.randn(3, TOKENS, WIDTH, generator=torch.Generator().manual_seed(5))
        pace = torch.tensor([0.05, 0.02, 0.12]).view(3, 1, 1, 1)
        self.given, self.text = noise[list(pictures)], text[list(pictures)]
        self.pace = pace[list(pictures)]

    def step(self, noise: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        return latents - self.pace * noise

    def __call__(self, steps: int = STEPS, **options: Any) -> torch.Tensor:
        self.scheduler.set_timesteps(steps)
        latents, rest = self.given[:, :4], self.given[:, 4:]
        with torch.no_grad():
            for t in self.scheduler.timesteps:
                noise = self.unet(torch.cat([latents, rest], 1), t, self.text).sample
                latents = self.step(noise, latents)
        return latents


def get_run(attachment: Attachment) -> Run:
    run = attachment._follower.run
    assert run is not None
    return run


def list_computed(run: Attachment) -> list[list[int]]:
    """For every picture, the calls of the last run that were computed in full."""
    assert run._follower.last is not None
    pictures = zip(*run._follower.last.calls, strict=True)
    return [[call.index for call in calls if call.computes_all] for calls in pictures]


def find_keys(loop: Loop, frame: Plan, threshold: float, how: How) -> list[int]:
    """The reference for one picture: make the first step that drifted too far a key step; again."""
    keys = list(frame.keys)
    while (step := find_drifted(loop, keys, threshold, how)) is not None:
        keys = sorted([*keys, step])
    return keys


def find_drifted(loop: Loop, keys: list[int], threshold: float, how: How) -> int | None:
    """The first step of a run that drifted too far, at which the run is left; None in a whole one.

    Only plans without a drift run here, and the stem is watched from outside.
    """
    stems: list[torch.Tensor] = []

    class Drifted(Exception):
        pass

    def note(module: Any, args: Any, output: torch.Tensor) -> None:
        step = len(stems)
        stems.append(output.clone())
        last = stems[max(key for key in keys if key <= step)]
        drift = float((output - last).abs().sum() / last.abs().sum())
        if step not in keys and drift >= threshold:
            raise Drifted

    handle = watch(loop.unet.conv_in, note)
    try:
        with leansd.inherit(loop, Plan.between(keys, cut="up1.l0", steps=STEPS, how=how)):
            loop(STEPS)
    except Drifted:
        return len(stems) - 1
    finally:
        handle.remove()
    return None


# -- the two ends ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inherits", "how", "probe"),
    [
        (("up1.l0",), "reuse", "stem"),
        (("up1.l0",), "forecast", "sample"),
        (("mid", "up0.l1.res"), "forecast", "dn0.l0.res"),
        (("mid", "up1.l1.attn"), "residual", "dn0.l0.res"),
        (("*.ca", "*.ff"), "reuse", "dn0.l0.res"),
        (("head",), "reuse", "sample"),
        (("head",), "residual", "sample"),
    ],
)
def test_threshold_spans_from_full_run_to_plan(
    inherits: tuple[str, ...], how: How, probe: str
) -> None:
    loop = Batch(small_unet())
    plan = Plan.full(STEPS).inherit(*inherits, at=[2, 3, 5, 6], how=how)
    full = loop()
    with leansd.inherit(loop, plan):
        expected = loop()
    with leansd.inherit(loop, plan.guard(probe, threshold=ALWAYS)) as run:
        assert torch.equal(loop(), full)
    assert list_computed(run) == [list(range(STEPS))] * 2
    with leansd.inherit(loop, plan.guard(probe, threshold=NEVER)) as run:
        assert torch.equal(loop(), expected)
    assert list_computed(run) == [list(plan.keys)] * 2
    assert not torch.equal(full, expected)


def test_xl() -> None:
    loop = Loop(UNETS["sdxl"]())
    plan = Plan.every(3, cut="up2.l1", steps=STEPS, how="forecast")
    full = loop(STEPS)
    with leansd.inherit(loop, plan):
        expected = loop(STEPS)
    for threshold, result in ((ALWAYS, full), (NEVER, expected)):
        with leansd.inherit(loop, plan.guard("stem", threshold=threshold)):
            assert torch.equal(loop(STEPS), result)


# -- between -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["reuse", "forecast"])
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_one_picture_follows_the_plan_with_the_key_steps_it_needs(
    threshold: float, how: How
) -> None:
    loop = Batch(small_unet(), (0,))
    frame = Plan.between([0, 4], cut="up1.l0", steps=STEPS, how=how)
    keys = find_keys(loop, frame, threshold, how)
    assert len(keys) == THRESHOLDS[threshold] or how != "reuse"
    with leansd.inherit(loop, Plan.between(keys, cut="up1.l0", steps=STEPS, how=how)):
        expected = loop()
    with leansd.inherit(loop, frame.guard("stem", threshold=threshold)) as run:
        assert torch.equal(loop(), expected)
    assert list_computed(run) == [keys]
    report = run.report()
    assert (report.guarded, report.drifted) == (STEPS - 2, len(keys) - 2)


@pytest.mark.parametrize("how", ["reuse", "forecast"])
def test_pictures_of_a_batch_decide_apart(how: How) -> None:
    """As alone, but for rounding: a convolution may sum otherwise for another size of batch."""
    unet = small_unet()
    plan = Plan.between([0, 1, 5], cut="up1.l0", steps=STEPS, how=how).guard("stem", threshold=0.03)
    together = Batch(unet, (0, 1, 2))
    with leansd.inherit(together, plan) as run:
        results = together()
    computed = list_computed(run)
    assert len({tuple(each) for each in computed}) == 3
    for picture, result in enumerate(results):
        alone = Batch(unet, (picture,))
        with leansd.inherit(alone, plan) as run:
            expected = alone()
        assert list_computed(run) == [computed[picture]]
        assert torch.allclose(result, expected[0], atol=1e-4, rtol=1e-4)
        keys = find_keys(alone, plan, 0.03, how)
        assert keys == computed[picture]


@pytest.mark.parametrize(
    ("inherits", "how", "probe", "threshold"),
    [
        (("mid", "up1.l1.attn"), "residual", "stem", 0.03),
        (("*.ca", "*.ff", "up0"), "reuse", "dn0.l0.res", 0.06),
        (("head",), "residual", "sample", 0.03),
    ],
)
def test_any_unit_runs_on_some_rows(
    inherits: tuple[str, ...], how: How, probe: str, threshold: float
) -> None:
    unet = small_unet()
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)  # writes in place between units
    frame = Plan.full(STEPS).inherit(*inherits, at=[2, 3, 5, 6, 7], how=how)
    plan = frame.guard(probe, threshold=threshold)
    together = Batch(unet, (0, 1, 2))
    with leansd.inherit(together, plan) as run:
        results = together()
    computed = list_computed(run)
    assert len({tuple(each) for each in computed}) > 1
    for picture, result in enumerate(results):
        alone = Batch(unet, (picture,))
        static = Plan(
            tuple(
                Row() if step in computed[picture] else row for step, row in enumerate(frame.rows)
            )
        )
        with leansd.inherit(alone, static):
            assert torch.allclose(result, alone()[0], atol=1e-4, rtol=1e-4)


def test_only_the_rows_that_need_it_run() -> None:
    unet = small_unet()
    loop = Batch(unet, (0, 1, 2))
    seen: list[int] = []
    handle = watch_before(
        unet.mid_block.resnets[0].norm1, lambda module, args: seen.append(args[0].shape[0])
    )
    frame = Plan.between([0], cut="up1.l0", steps=STEPS)
    with leansd.inherit(loop, frame.guard("stem", threshold=0.03)) as run:
        loop()
    handle.remove()
    computed = list_computed(run)
    rows = [sum(step in each for each in computed) for step in range(STEPS)]
    assert seen == [count for count in rows if count]
    assert set(rows) == {1, 2, 3}
    report = run.report()
    assert report.full_calls == rows.count(3)
    assert report.drifted == sum(rows) - 3
    assert report.guarded == 3 * (STEPS - 1)
    assert f"{report.drifted} of 21 times a picture drifted" in str(report)
    with leansd.inherit(loop, frame.guard("stem", threshold=NEVER)) as run:
        loop()
    fastest = run.report().predicted_speedup
    assert 1.0 < report.predicted_speedup < fastest
    share = sum(rows) / (3 * STEPS)
    least = 1 / STEPS  # of the frame
    cheap = (1 / fastest - least) / (1 - least)  # cost of an inheriting call, in full ones
    assert report.predicted_speedup == pytest.approx(1 / (share + (1 - share) * cheap))


# -- corrections -------------------------------------------------------------------------------


CORRECTED = {
    how: Plan.between([0, 1, 2, 5, 7], cut="head", steps=STEPS, how=how).correct(
        {5: (0.4, 0.1), 7: -0.3}
    )
    for how in ("forecast", "forecast2", "residual")
}


@pytest.mark.parametrize("how", CORRECTED)
def test_corrections_from_full_run_to_plan(how: How) -> None:
    """Where nothing was inherited before, there is nothing to correct."""
    loop, plan = Batch(shallow_unet()), CORRECTED[how]
    full = loop()
    with leansd.inherit(loop, plan):
        expected = loop()
    with leansd.inherit(loop, plan.correct({5: 0.0, 7: 0.0})):
        assert not torch.allclose(loop(), expected, atol=1e-4)
    for threshold, result in ((ALWAYS, full), (NEVER, expected)):
        with leansd.inherit(loop, plan.guard("sample", threshold=threshold)):
            assert torch.equal(loop(), result)


@pytest.mark.parametrize("how", CORRECTED)
def test_pictures_are_corrected_apart(how: How) -> None:
    unet = small_unet()
    frame = CORRECTED[how]
    plan = frame.guard("sample", threshold=0.035)
    together = Batch(unet, (0, 1, 2))
    with leansd.inherit(together, plan) as run:
        results = together()
    assert run._follower.last is not None
    corrected = {tuple(bool(call.corrects) for call in calls) for calls in run._follower.last.calls}
    assert len({each for calls in corrected for each in calls}) == 2
    assert any(len(set(calls)) == 2 for calls in corrected)
    computed = list_computed(run)
    for picture, result in enumerate(results):
        rows = tuple(
            Row(correct=row.correct) if step in computed[picture] else row
            for step, row in enumerate(frame.rows)
        )
        alone = Batch(unet, (picture,))
        with leansd.inherit(alone, Plan(rows)):
            assert torch.allclose(result, alone()[0], atol=1e-4, rtol=1e-4)


# -- guidance ----------------------------------------------------------------------------------


PROMPTS = ["a cat", "two red birds"]


def draw(pipe: Any, pictures: slice = slice(2)) -> torch.Tensor:
    """Pictures whose latents have unlike sizes, so that they drift apart."""
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    latents = (noise * torch.tensor([1.0, 0.1]).view(2, 1, 1, 1))[pictures]
    return pipe(
        PROMPTS[pictures], num_inference_steps=STEPS, latents=latents, output_type="latent"
    ).images


@pytest.mark.parametrize("guidance", ["compute", "inherit", "forecast", "drop"])
def test_both_lanes_of_a_picture_decide_together(guidance: Any) -> None:
    pipe = tiny_pipeline(unet=small_unet())
    frame = Plan.between([0, 1, 4], cut="up1.l0", steps=STEPS, how="forecast")
    frame = frame.guide(guidance, at=[3, 4, 6])
    with leansd.inherit(pipe, frame):
        expected = draw(pipe)
    with leansd.inherit(pipe, frame.guard("stem", threshold=NEVER)):
        assert torch.equal(draw(pipe), expected)
    plan = frame.guard("sample", threshold=0.5)
    with leansd.inherit(pipe, plan) as run:
        results = draw(pipe)
        computed = list_computed(run)
        assert computed[0] != computed[1]
        for picture, result in enumerate(results):
            expected = draw(pipe, slice(picture, picture + 1))
            assert list_computed(run) == [computed[picture]]
            assert torch.allclose(result, expected[0], atol=1e-4, rtol=1e-4)


def test_full_run_with_guidance() -> None:
    pipe = tiny_pipeline()
    expected = draw(pipe)
    plan = leansd.preset("balanced", steps=STEPS, sampler="lms").guard("stem", threshold=ALWAYS)
    with leansd.inherit(pipe, plan) as run:
        assert torch.equal(draw(pipe), expected)
    assert run.report().full_calls == STEPS


def test_perturbed_attention_guidance_decides_for_the_whole_batch() -> None:
    """Its attention processors rely on the three parts of the batch."""
    parts = tiny_pipeline(unet=small_unet()).components
    pipe = StableDiffusionPAGPipeline(
        **parts, requires_safety_checker=False, pag_applied_layers=["mid"]
    )
    pipe.set_progress_bar_config(disable=True)
    expected = draw(pipe, slice(1))
    plan = Plan.every(3, cut="up1.l0", steps=STEPS)
    with leansd.inherit(pipe, plan.guard("stem", threshold=ALWAYS)):
        assert torch.equal(draw(pipe, slice(1)), expected)
    with leansd.inherit(pipe, plan.guard("stem", threshold=0.4)) as run:
        assert draw(pipe, slice(1)).isfinite().all()
    assert len(list_computed(run)) == 1


def test_control_net_runs_with_every_call() -> None:
    """Before the probe has told, any picture may turn out to be computed."""
    pipe = make_control_pipeline(make_controlnet())

    def control() -> torch.Tensor:
        picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
        return pipe(
            "a cat", image=picture, num_inference_steps=STEPS, output_type="latent",
            generator=torch.Generator().manual_seed(1), height=32, width=32,
        ).images  # fmt: skip

    expected = control()
    plan = Plan.every(2, cut="up1.l0", steps=STEPS)
    for threshold in (ALWAYS, NEVER):
        with leansd.inherit(pipe, plan.guard("stem", threshold=threshold)) as run:
            result = control()
        assert torch.equal(result, expected) == (threshold == ALWAYS)
        assert result.isfinite().all()
        assert run.report().control_runs == STEPS


# -- costs -------------------------------------------------------------------------------------


@contextmanager
def count_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """How often a value of a tensor is asked for."""
    reads = 0

    def count(name: str) -> Callable[..., Any]:
        original = getattr(torch.Tensor, name)

        def read(*args: Any, **kwargs: Any) -> Any:
            nonlocal reads
            reads += 1
            return original(*args, **kwargs)

        return read

    class CountScalars(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal reads
            reads += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    with monkeypatch.context() as patch, CountScalars():
        for name in ("tolist", "cpu", "numpy"):
            patch.setattr(torch.Tensor, name, count(name))
        yield lambda: reads


@pytest.mark.parametrize("plan_name", ["change", "predicted"])
def test_values_are_read_once_a_call(monkeypatch: pytest.MonkeyPatch, plan_name: str) -> None:
    loop = Batch(small_unet(), (0, 1, 2))
    frames = {
        "change": Plan.every(4, cut="up1.l0", steps=STEPS).guard("stem", threshold=0.03),
        "predicted": leansd.preset("easycache", steps=STEPS),
    }
    plan = frames[plan_name]
    loop.scheduler.set_timesteps(STEPS)
    latents, reads = loop.given, []
    with torch.no_grad(), leansd.inherit(loop, plan):
        for step, t in enumerate(loop.scheduler.timesteps):
            if step == 0:  # lays out the course, once a run
                noise = loop.unet(latents, t, loop.text).sample
            else:
                with count_reads(monkeypatch) as get_reads:
                    noise = loop.unet(latents, t, loop.text).sample
                reads.append(get_reads())
            latents = loop.step(noise, latents)
    assert reads == [0 if row.is_key else 1 for row in plan.rows[1:]]


@pytest.mark.parametrize("preset", ["balanced", "easycache"])
def test_nothing_is_kept_after_a_run(preset: str) -> None:
    loop = Batch(tiny_unet())
    plan = leansd.preset(preset, steps=STEPS, sampler="lms")
    plan = plan if plan.drift else plan.guard("stem", threshold=0.03)
    expected = loop()
    with leansd.inherit(loop, plan) as run:
        first = loop()
        assert get_run(run).branches[0].bytes == 0
        assert run.report().bytes_kept > 0
        assert torch.equal(loop(), first)
    assert torch.equal(loop(), expected)
    assert "forward" not in vars(loop.unet)


def test_the_end_of_a_call_drops_what_is_kept() -> None:
    pipe = tiny_pipeline(unet=small_unet())

    def stop(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        if step == 4:
            raise KeyboardInterrupt
        return tensors

    branches: list[Any] = []
    plan = leansd.preset("easycache", steps=STEPS)
    with leansd.inherit(pipe, plan) as run:
        follower = run._follower
        start_call = follower.start_call

        def note(*args: Any) -> Any:
            step = start_call(*args)
            branches.append(get_run(run).branches[0])
            return step

        follower.start_call = note  # type: ignore[method-assign]
        expected = draw(pipe)
        with pytest.raises(KeyboardInterrupt):
            pipe("a cat", num_inference_steps=STEPS, callback_on_step_end=stop)
        assert branches[-1].bytes > 0
        assert torch.equal(draw(pipe), expected)
        assert branches[-1].bytes == 0


def test_changed_batch_midway_computes_in_full() -> None:
    loop = Batch(small_unet(), (0, 1, 2))
    loop.scheduler.set_timesteps(STEPS)
    plan = Plan.every(STEPS, cut="up1.l0", steps=STEPS).guard("stem", threshold=NEVER)
    latents, text = loop.given, loop.text
    with torch.no_grad(), leansd.inherit(loop, plan) as run:
        for index, t in enumerate(loop.scheduler.timesteps):
            if index == 3:
                latents, text = latents[:2], text[:2]
            assert loop.unet(latents, t, text).sample.isfinite().all()
    assert run._follower.last is not None
    assert [len(calls) for calls in run._follower.last.calls] == [3] * 3 + [2] * 5
    full = [index for index, calls in enumerate(run._follower.last.calls) if calls[0].computes_all]
    assert full == [0, 3]


def test_sampler_that_visits_a_time_step_twice() -> None:
    """The forecast of a picture that was computed twice at one time step draws on others."""
    loop = Batch(small_unet())
    loop.scheduler = HeunDiscreteScheduler()
    plan = Plan.between([0, 2, 5], cut="up1.l0", steps=STEPS, how="forecast")
    with leansd.inherit(loop, plan):
        expected = loop()
    with leansd.inherit(loop, plan.guard("stem", threshold=NEVER)):
        assert torch.equal(loop(), expected)
    with leansd.inherit(loop, plan.guard("stem", threshold=0.03)):
        assert loop().isfinite().all()


# -- EasyCache ---------------------------------------------------------------------------------


def sample_by_easycache(loop: Batch, threshold: float, warm_up: int) -> tuple[torch.Tensor, int]:
    """The method around a plain UNet, for one picture; and how many steps it reused."""
    loop.scheduler.set_timesteps(STEPS)
    latents, rest = loop.given[:, :4], loop.given[:, 4:]
    rate = last = full = output = change = None
    error, reused = 0.0, 0
    for step, t in enumerate(loop.scheduler.timesteps):
        reuses = False
        if warm_up <= step < STEPS - 1 and rate is not None:
            error += rate * ((latents - last).abs().sum() / output.abs().sum())
            reuses = bool(error < threshold)
        last = latents
        if reuses:
            noise = latents + change
            reused += 1
        else:
            with torch.no_grad():
                noise = loop.unet(torch.cat([latents, rest], 1), t, loop.text).sample
            if full is not None:
                rate = (noise - output).abs().sum() / (latents - full).abs().sum()
            full, output, change, error = latents, noise, noise - latents, 0.0
        latents = loop.step(noise, latents)
    return latents, reused


@pytest.mark.parametrize(
    ("threshold", "picture", "channels"),
    [
        *((threshold, picture, 4) for threshold in (0.1, 0.15) for picture in (0, 1, 2)),
        *((threshold, 0, 4) for threshold in (0.0, NEVER)),
        *((0.15, picture, 9) for picture in (0, 1, 2)),
    ],
)
def test_easycache_equals_a_plain_loop(threshold: float, picture: int, channels: int) -> None:
    loop = Batch(shallow_unet(in_channels=channels), (picture,))  # the whole output inherits
    expected, reused = sample_by_easycache(loop, threshold, 2)
    plan = leansd.preset("easycache", threshold=threshold, warm_up=2, steps=STEPS)
    with leansd.inherit(loop, plan) as run:
        assert torch.equal(loop(), expected)
    report = run.report()
    assert report.full_calls == STEPS - reused
    assert report.guarded == STEPS - 3
    assert {0.0: reused == 0, NEVER: reused == STEPS - 3}.get(threshold, True)


@pytest.mark.parametrize("channels", [4, 9])
def test_the_unet_is_entered_where_a_picture_computes(channels: int) -> None:
    loop = Batch(small_unet(in_channels=channels), (0, 1, 2))
    entered: list[int] = []
    handle = watch_before(loop.unet.time_embedding, lambda *_: entered.append(1))
    with leansd.inherit(loop, leansd.preset("easycache", threshold=0.3, steps=STEPS)) as run:
        loop()
    handle.remove()
    assert len(entered) == len(set[int]().union(*list_computed(run))) < STEPS


def test_easycache_of_a_batch_is_that_of_its_pictures() -> None:
    unet = small_unet()
    together = Batch(unet, (0, 1, 2))
    plan = leansd.preset("easycache", threshold=0.1, steps=STEPS)
    with leansd.inherit(together, plan) as run:
        results = together()
    assert len({tuple(each) for each in list_computed(run)}) > 1
    for picture, result in enumerate(results):
        expected, _ = sample_by_easycache(Batch(unet, (picture,)), 0.1, 2)
        assert torch.allclose(result, expected[0], atol=1e-4, rtol=1e-4)


# -- as data -----------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.05, NEVER])
@pytest.mark.parametrize("measure", MEASURES)
def test_drift_is_part_of_the_plan(tmp_path: Path, threshold: float, measure: Measure) -> None:
    bare = Plan.every(2, cut="mid", steps=4)
    plan = bare.guard("stem", threshold=threshold, measure=measure)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.fingerprint == plan.fingerprint != bare.fingerprint
    assert plan.fit(8).drift == plan.rename("other").inherit("up1", at=3).drift == plan.drift
    drawn = [line for line in str(plan).splitlines() if line not in str(bare).splitlines()]
    assert drawn == [str(plan.drift)]
    assert str(plan.drift) in plan.draw(read_anatomy(tiny_unet()))


def test_plan_without_drift_reads_and_hashes_as_before(tmp_path: Path) -> None:
    plan = Plan.every(2, cut="mid", steps=2)
    plan.save(tmp_path / "plan.json")
    assert "drift" not in (tmp_path / "plan.json").read_text()
    rows = '[[[], "compute"], [[["mid", "reuse"]], "compute"]]'
    assert plan.fingerprint == sha256(rows.encode()).hexdigest()[:12]


@pytest.mark.parametrize("threshold", [-0.1, math.nan])
def test_threshold_is_no_less_than_zero(threshold: float) -> None:
    with pytest.raises(LeansdError, match="threshold must be 0 or more"):
        Plan.full(4).guard("stem", threshold=threshold)


def test_unknown_measure_is_refused() -> None:
    with pytest.raises(LeansdError, match=r"unknown measure.*change, predicted"):
        Plan.full(4).guard("stem", threshold=0.1, measure="guess")  # pyright: ignore


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cut", "probe", "message"),
    [
        ("up3.l1", "dn0.l0.res", r"dn0\.l0\.res cannot be the probe.*will do: sample, stem$"),
        ("up3.l0", "dn0.l1.res", r"will do: sample, stem, dn0\.l0\.res, dn0\.l0\.attn$"),
        ("*.ca", "dn0.l0.attn", r"will do: sample, stem, dn0\.l0\.res$"),
        ("mid", "dn7", r"probe of the drift: address 'dn7' matches nothing"),
        ("mid", "dn0.l0", r"probe of the drift: expected 1 units, selected 2"),
    ],
)
def test_probe_must_run_before_what_inherits(cut: str, probe: str, message: str) -> None:
    plan = Plan.every(2, cut=cut, steps=STEPS).guard(probe, threshold=0.1)
    with pytest.raises(LeansdError, match=message):
        leansd.inherit(Loop(tiny_unet()), plan)


def test_residual_of_the_head_needs_latents_as_its_input() -> None:
    plan = leansd.preset("easycache", steps=STEPS)
    with pytest.raises(LeansdError, match="head cannot inherit its residual: it takes 4 channels"):
        leansd.inherit(Loop(tiny_unet(out_channels=8)), plan)
