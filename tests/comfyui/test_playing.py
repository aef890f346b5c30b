"""A plan on a model of ComfyUI, in all that happens to runs there, by a double of its protocol."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.comfyui import choosing
from integrations.comfyui.blocks import read_blocks
from integrations.comfyui.choosing import PlanChoice, RunDescription, choose_plan
from integrations.comfyui.playing import KEY, PlanOnModel

from comfyui.double import (
    CONDS,
    CONST,
    EPS,
    MODEL,
    V_PREDICTION,
    Control,
    Denoiser,
    Guider,
    Patcher,
    Sampler,
    cond,
    lay_out,
    run_all,
    sample_adaptive,
    sample_ancestral,
    sample_euler,
    sample_heun,
    sample_pp,
    sample_stubborn,
    sample_thirds,
)
from comfyui.unet import UNetModel
from leansd.plans import Plan
from leansd.plans.anatomy import WHOLE
from leansd.plans.presets import PRESETS
from leansd.plans.resolve import FEW_STEPS, PlanContext, resolve_plan
from tiny import tiny_unet

STEPS = 12
KEYS = (0, 1, 2, 4, 6, 9, 11)
PLAN = Plan.between(KEYS, cut="head", steps=STEPS, how="forecast").correct({4: 0.3, 6: (0.2, 0.1)})
EULER = Sampler(sample_euler)


def start(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 4, 4, 4, generator=torch.Generator().manual_seed(1))


def draw(
    plan: Any = PLAN,
    *,
    patcher: Patcher | None = None,
    sampler: Any = EULER,
    sigmas: torch.Tensor | None = None,
    positive: Any = None,
    negative: Any = None,
    noise: torch.Tensor | None = None,
    mismatch: Any = "stretch",
    **options: Any,
) -> tuple[torch.Tensor, Any, Guider]:
    """Latents, the report and the guider of a run; `plan` None for one without."""
    patcher = patcher or Patcher()
    lean = None
    if plan is not None:
        choice = plan if isinstance(plan, PlanChoice) else PlanChoice(plan, mismatch)
        lean = PlanOnModel(choice)
        patcher = lean.attach(patcher)
    guider = Guider(patcher, positive or [cond(0.4)], negative or [cond(-0.3)], **options)
    sigmas = lay_out(STEPS) if sigmas is None else sigmas
    latents = guider.sample(start() if noise is None else noise, sampler, sigmas)
    return latents, lean and lean.last, guider


def test_a_full_plan_changes_no_bit() -> None:
    for sampler in (EULER, Sampler(sample_heun), Sampler(sample_adaptive)):
        drawn, report, _ = draw(Plan.full(STEPS), sampler=sampler)
        assert torch.equal(drawn, draw(None, sampler=sampler)[0])
        assert report.computed == report.calls


def test_a_plan_spares_the_model_and_stays_near() -> None:
    patcher = Patcher()
    drawn, report, _ = draw(patcher=patcher)
    assert patcher.denoiser.calls == len(KEYS)
    assert (report.calls, report.computed, report.full, report.forced) == (STEPS, 7, "", {})
    full, _, _ = draw(None)
    few, _, _ = draw(None, sigmas=lay_out(len(KEYS)))
    assert not torch.equal(drawn, full)
    assert (drawn - full).norm() < (few - full).norm()


@pytest.mark.parametrize(
    ("sampler", "keys"),
    [(sample_heun, 2 * 7 - 1), (sample_thirds, 3 * 7 - 2), (sample_pp, 7), (sample_ancestral, 7)],
)
def test_samplers_of_several_calls_go_by_the_ordinal(sampler: Any, keys: int) -> None:
    patcher = Patcher()
    _, report, _ = draw(patcher=patcher, sampler=Sampler(sampler))
    assert patcher.denoiser.calls == report.computed == keys
    assert not report.full


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"sampler": Sampler(sample_adaptive)}, "how often adaptive calls the model"),
        ({"sampler": Sampler(sample_stubborn)}, "how often stubborn calls the model"),
        ({"sigmas": lay_out(9), "mismatch": "compute in full"}, "is for 12 steps, this run has 9"),
        ({"plan": Plan.every(2, cut="up1", steps=STEPS)}, "is for UNets"),
        ({"plan": "no such preset"}, "no preset 'no such preset'"),
        ({"plan": "/nowhere/plan.json"}, "no plan file"),
        ({"positive": [cond(0.4, hooks=object())]}, "changes the model's weights"),
    ],
)
def test_what_cannot_be_followed_is_computed_in_full(options: Any, why: str) -> None:
    plain = {key: each for key, each in options.items() if key not in ("plan", "mismatch")}
    drawn, report, _ = draw(**options)
    assert torch.equal(drawn, draw(None, **plain)[0])
    assert why in report.full
    assert why in str(report)


def sample_curious(model: Any, x: torch.Tensor, sigmas: torch.Tensor, **_: Any) -> torch.Tensor:
    return x * model.inner_model.nobody_has_this


def test_what_a_sampler_raises_is_said_and_interruptions_are_let_through() -> None:
    def stop(model: Any, x: torch.Tensor, sigmas: torch.Tensor, **_: Any) -> torch.Tensor:
        raise Interruption

    class Interruption(Exception):
        pass

    choice = PlanChoice(PLAN)
    guider, sigmas = Guider(Patcher(), [cond(0.4)], [cond(-0.3)]), lay_out(STEPS).tolist()
    described = choosing.describe_run(guider, Sampler(sample_curious), sigmas)
    assert "nobody_has_this" in choosing.choose_plan(choice, described).reason
    with pytest.raises(Interruption):
        choosing.describe_run(guider, Sampler(stop), sigmas)


# -- how conditionings come ------------------------------------------------------------------------

SEVERAL = {
    "positive": [cond(0.4, mask=0.7), cond(1.1, mask=0.3)],
    "negative": [cond(-0.3), cond(-0.9)],
}


@pytest.mark.parametrize("conds", [{}, SEVERAL, {"cfg": 1.0}], ids=["two", "four", "unguided"])
@pytest.mark.parametrize(
    "how",
    [{"split": lambda _: True}, {"split": lambda call: call % 3 == 0}, {"on_threads": True},
     {"on_threads": True, "split": lambda _: True}],
    ids=["apart", "as memory allows", "threads", "threads apart"],
)  # fmt: skip
def test_however_conditionings_come_the_pictures_are_the_same(conds: Any, how: Any) -> None:
    expected, report, _ = draw(**conds)
    drawn, other, _ = draw(**conds, **how)
    assert torch.equal(drawn, expected)
    assert other.computed == report.computed == len(KEYS)


def test_a_conditioning_that_begins_midway_is_computed_when_it_begins() -> None:
    """Prompts that change over the steps: time ranges."""
    sigmas = lay_out(STEPS)
    change = float(sigmas[5] + sigmas[4]) / 2
    conds = [cond(0.4, timestep_end=change), cond(1.5, timestep_start=change)]
    drawn, report, _ = draw(positive=conds)
    assert not report.full
    assert report.computed == len(KEYS) + 1  # step 5, where the other prompt comes in
    full, _, _ = draw(None, positive=conds)
    assert (drawn - full).norm() < 0.05 * full.norm()


@pytest.mark.parametrize("split", [False, True])
def test_controlnets_are_spared_where_the_model_is(split: bool) -> None:
    control, denoiser = Control(), Denoiser()
    conds = {"positive": [cond(0.4, control=control)], "negative": [cond(-0.3, control=control)]}
    drawn, report, _ = draw(**conds, patcher=Patcher(denoiser), split=lambda _: split)
    assert report.computed == len(KEYS)
    assert control.runs == denoiser.controlled == len(KEYS) * (1 + split)
    full, _, _ = draw(None, positive=[cond(0.4, control=Control())], negative=conds["negative"])
    assert not torch.equal(drawn, full)
    # With the ControlNet on one side alone the batches of forecast steps are other ones.
    one_sided = {**conds, "negative": [cond(-0.3)]}
    assert draw(**one_sided)[1].computed == len(KEYS)


def test_a_controlnet_is_there_again_if_a_step_is_computed_after_all() -> None:
    """The latents of a batch change in the middle of a run: what was spared runs after all."""
    control, denoiser = Control(), Denoiser()

    def sample(model: Any, x: torch.Tensor, sigmas: torch.Tensor, **options: Any) -> torch.Tensor:
        ones = x.new_ones(len(x))
        for step in range(STEPS):
            if step == 5:
                x = torch.cat([x, x]) if len(x) > 1 else x
                ones = x.new_ones(len(x))
            denoised = model(x, sigmas[step] * ones, **options["extra_args"])
            x = x + (x - denoised) / sigmas[step] * (sigmas[step + 1] - sigmas[step])
        return x

    conds = {"positive": [cond(0.4, control=control)], "negative": [cond(-0.3, control=control)]}
    _, report, _ = draw(**conds, patcher=Patcher(denoiser), sampler=Sampler(sample))
    assert report.computed == len(KEYS) + 1
    assert control.runs == denoiser.controlled == denoiser.calls == len(KEYS) + 1


# -- another start or end --------------------------------------------------------------------------


def test_from_a_picture_on_the_plans_later_steps_are_followed() -> None:
    sigmas = lay_out(STEPS)[5:]
    patcher = Patcher()
    _, report, _ = draw(patcher=patcher, sigmas=sigmas)
    assert report.calls == 7
    # The first is computed, then rows 6, 9 and 11.
    assert patcher.denoiser.calls == 4


def test_a_run_that_another_sampler_goes_on_with() -> None:
    """The halves of a run, a base and a refiner for one, each follow their part of the plan."""
    sigmas, computed = lay_out(STEPS), []
    for part in (sigmas[:6], sigmas[5:]):
        _, report, _ = draw(sigmas=part)
        computed.append((report.calls, report.computed))
    assert computed == [(5, 4), (7, 4)]


def test_presets_fit_themselves() -> None:
    for steps in (12, 20, 33):
        _, report, _ = draw("balanced", sigmas=lay_out(steps))
        assert not report.full
        assert report.calls == steps
        assert 0.35 * steps < report.computed < 0.65 * steps
    # Few steps run in full, and it is said why.
    _, report, _ = draw("balanced", sigmas=lay_out(6))
    assert report.computed == 6
    assert "too much" in str(report)
    # A sampler that no preset is tuned for.
    _, report, _ = draw("fast", sampler=Sampler(sample_heun), sigmas=lay_out(20))
    assert report.computed < 0.5 * report.calls
    assert "not tuned for heun" in str(report)


@pytest.mark.parametrize("steps", [8, 20, 30, 50])
@pytest.mark.parametrize(
    ("sampler", "own"),
    [("euler", "euler"), ("dpmpp_2m", "dpm++2m"), ("unipc", "unipc"), ("lms", "lms")],
)
def test_a_preset_is_the_plan_that_it_is_everywhere(sampler: str, own: str, steps: int) -> None:
    """But for those that are tuned in ComfyUI's sampler; its DDIM is Euler by another name."""
    blocks = read_blocks(UNetModel(tiny_unet()))
    assert blocks is not None
    sigmas = tuple(lay_out(steps).tolist())
    places = tuple(1 - step / steps for step in range(steps + 1))
    run = RunDescription(sampler, 4.0, sigmas, sigmas[:-1], "noise", places=places, blocks=blocks)
    special: set[str] = set()
    for name, preset in PRESETS.items():
        if preset.build(steps=20, blocks=4).nets:  # no node gives other nets
            continue
        if choosing.find_tuned_here(preset, sampler, steps, sigmas) is not None:
            special.add(name)
            continue
        anatomy = WHOLE if preset.by_sampler else blocks.anatomy
        chosen = choose_plan(PlanChoice(name), run)
        if name in ("tgate", "pab"):  # cross-attention alone is no unit here
            assert "matches nothing" in chosen.reason
            continue
        expected = resolve_plan(name, PlanContext(steps, own, anatomy=anatomy))
        assert chosen.plan is not None, chosen.reason
        assert chosen.plan.fingerprint == expected.plan.fingerprint, name
        assert chosen.notes == expected.notes
    is_tuned = sampler in ("euler", "dpmpp_2m") and steps > FEW_STEPS
    assert special == ({"quality", "balanced", "fast"} if is_tuned else set())


def test_presets_are_those_tuned_in_the_sampler_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "sampler": "euler",
        "sigmas": lay_out(STEPS).tolist(),
        "plans": {"balanced": PLAN.rename("balanced").to_dict()},
    }
    monkeypatch.setattr(choosing, "_load_presets", lambda: [row])
    _, report, _ = draw("balanced")
    assert (report.computed, report.notes) == (len(KEYS), ())
    # At other noise levels its computed steps go along, and that is said.
    curved = torch.cat([torch.linspace(14.6**0.1, 0.03**0.1, STEPS) ** 10, torch.zeros(1)])
    _, report, _ = draw("balanced", sigmas=curved)
    assert 0 < report.computed < STEPS
    assert any("noise levels" in each for each in report.notes)
    _, report, _ = draw("balanced", sigmas=lay_out(20))
    assert 0.5 * 20 < report.computed < 0.65 * 20


def test_of_several_schedules_that_a_preset_is_tuned_for_the_nearest_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    schedules = {
        "karras": [14.6, 7.4, 3.4, 1.4, 0.5, 0.15, 0.03, 0.0],
        "normal": [14.6, 6.0, 3.0, 1.7, 1.0, 0.6, 0.3, 0.0],
    }
    rows = [
        {
            "sampler": "dpmpp_2m",
            "sigmas": sigmas,
            "plans": {"balanced": Plan.every(number + 2, cut="head", steps=7).to_dict()},
        }
        for number, sigmas in enumerate(schedules.values())
    ]
    monkeypatch.setattr(choosing, "_load_presets", lambda: rows)
    monkeypatch.setattr(choosing, "FEW_STEPS", 2)
    for number, sigmas in enumerate(schedules.values()):
        found = choosing.find_tuned_here(PRESETS["balanced"], "dpmpp_2m", 7, sigmas)
        assert found is not None
        assert found.keys == Plan.every(number + 2, cut="head", steps=7).keys


def test_a_plan_from_a_file(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "mine.json")
    _, report, _ = draw(str(tmp_path / "mine.json"))
    assert report.computed == len(KEYS)


def test_flow_models_have_log_snr_of_their_own() -> None:
    sigmas = lay_out(STEPS, 1.0, 0.02)
    drawn, report, _ = draw(patcher=Patcher(noise=CONST()), sigmas=sigmas)
    assert report.computed == len(KEYS)
    full, _, _ = draw(None, patcher=Patcher(noise=CONST()), sigmas=sigmas)
    assert (drawn - full).norm() < 0.02 * full.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    denoiser = Denoiser()
    denoiser.dtype = dtype
    drawn, report, _ = draw(patcher=Patcher(denoiser))
    assert report.computed == len(KEYS)
    assert torch.isfinite(drawn).all()


# -- what goes wrong, and what others do -----------------------------------------------------------


def assert_nothing_left(lean: PlanOnModel, patcher: Patcher, guider: Guider) -> None:
    assert KEY not in guider.model_options["transformer_options"]
    assert KEY not in patcher.model_options["transformer_options"]
    assert not any(isinstance(each, torch.Tensor) for each in vars(lean).values())


@pytest.mark.parametrize("fails_at", [1, 3, 5])
def test_an_interrupted_run_leaves_nothing_and_the_next_is_whole(fails_at: int) -> None:
    denoiser = Denoiser()
    lean = PlanOnModel(PlanChoice(PLAN))
    patcher = lean.attach(Patcher(denoiser))
    guider = Guider(patcher, [cond(0.4)], [cond(-0.3)])
    denoiser.fails_at = fails_at
    with pytest.raises(torch.OutOfMemoryError):
        guider.sample(start(), EULER, lay_out(STEPS))
    assert_nothing_left(lean, patcher, guider)
    drawn = guider.sample(start(), EULER, lay_out(STEPS))
    assert torch.equal(drawn, draw()[0])
    assert lean.last is not None
    assert lean.last.computed == len(KEYS)
    assert_nothing_left(lean, patcher, guider)


@pytest.mark.parametrize(("fails_at", "split"), [(3, False), (6, True)])
def test_a_step_tried_again_after_memory_ran_out(fails_at: int, split: bool) -> None:
    """A sampler that takes the same step again: with latents that nothing of the failure is in."""
    denoiser = Denoiser()
    denoiser.fails_at = fails_at

    def sample(model: Any, x: torch.Tensor, sigmas: torch.Tensor, **options: Any) -> torch.Tensor:
        ones, step, seen = x.new_ones(len(x)), 0, []
        while step < STEPS:
            try:
                denoised = model(x, sigmas[step] * ones, **options["extra_args"])
            except torch.OutOfMemoryError:
                seen.append(step)
                continue
            x = x + (x - denoised) / sigmas[step] * (sigmas[step + 1] - sigmas[step])
            step += 1
        return x

    drawn, report, _ = draw(
        patcher=Patcher(denoiser), sampler=Sampler(sample), split=lambda _: split
    )
    full, _, _ = draw(None)
    assert report.calls == STEPS + 1
    assert report.computed > len(KEYS)
    assert (drawn - full).norm() < 0.05 * full.norm()


def test_another_packs_call_with_the_same_conditioning_is_not_mixed_up() -> None:
    """Perturbed attention: a second call of the same conditioning, with a model that is another."""

    def perturb(executor: Any, model: Any, conds: Any, x: Any, sigma: Any, options: Any) -> Any:
        cond, rest = executor(model, conds, x, sigma, options)
        (other,) = executor(model, [conds[0]], x + 0.5, sigma, options)
        return [cond + 0.2 * (cond - other), rest]

    drawn = []
    for plan in (None, PLAN):
        patcher = Patcher()
        patcher.add_wrapper_with_key(CONDS, "perturb", perturb)
        latents, report, _ = draw(plan, patcher=patcher)
        drawn.append(latents)
    assert torch.equal(*drawn)
    assert report is not None
    assert report.computed == STEPS
    assert "comes twice" in str(report)


@pytest.mark.parametrize("order", ["before", "after"])
def test_another_packs_wrapper_around_the_model(order: str) -> None:
    def scale(executor: Any, x: Any, *args: Any) -> Any:
        return executor(x, *args) * 0.9

    patcher = Patcher()
    if order == "before":
        patcher.add_wrapper_with_key(MODEL, "scale", scale)
    lean = PlanOnModel(PlanChoice(PLAN))
    patcher = lean.attach(patcher)
    if order == "after":
        patcher.add_wrapper_with_key(MODEL, "scale", scale)
    drawn = Guider(patcher, [cond(0.4)], [cond(-0.3)]).sample(start(), EULER, lay_out(STEPS))
    plain = Patcher()
    plain.add_wrapper_with_key(MODEL, "scale", scale)
    full, _, _ = draw(None, patcher=plain)
    assert lean.last is not None
    assert lean.last.computed == len(KEYS)
    assert (drawn - full).norm() < 0.05 * full.norm()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("noise", [EPS, V_PREDICTION, CONST])
@pytest.mark.parametrize("sampler", [sample_euler, sample_ancestral])
def test_an_inherited_picture_is_the_one_that_was_computed(
    sampler: Any, noise: Any, compiled: bool
) -> None:
    pictures: list[torch.Tensor] = []

    def watch(model: Any, x: torch.Tensor, sigmas: torch.Tensor, **options: Any) -> torch.Tensor:
        class Watched:
            def __call__(self, *args: Any, **given: Any) -> torch.Tensor:
                pictures.append(model(*args, **given))
                return pictures[-1]

            def __getattr__(self, name: str) -> Any:
                return getattr(model, name)

        return sampler(Watched(), x, sigmas, **options)

    patcher = Patcher(noise=noise())
    if compiled:
        patcher.model_options["torch_compile_kwargs"] = {"backend": "inductor"}
    sigmas = lay_out(STEPS, float(patcher.noise.sigma_max), float(patcher.noise.sigma_min))
    plan = Plan.between(KEYS, cut="head", steps=STEPS, how="denoised")
    _, report, _ = draw(plan, patcher=patcher, sampler=Sampler(watch), sigmas=sigmas)
    assert (report.computed, report.full) == (len(KEYS), "")
    seen = pictures[-STEPS:]  # before them are those of the probe
    for step, picture in enumerate(seen):
        last = max(key for key in KEYS if key <= step)
        assert torch.allclose(picture, seen[last], rtol=1e-3, atol=3e-3)


def test_a_model_whose_scale_is_not_known_shows_no_picture() -> None:
    class EDM(EPS):
        """Scales its input otherwise."""

    plan = Plan.between(KEYS, cut="head", steps=STEPS, how="denoised")
    drawn, report, _ = draw(plan, patcher=Patcher(noise=EDM()))
    assert torch.equal(drawn, draw(None, patcher=Patcher(noise=EDM()))[0])
    assert "predicts is not known" in report.full


@pytest.mark.parametrize("split", [False, True])
def test_a_compiled_model_is_played_around_its_graph(split: bool) -> None:
    """Within it nothing of this pack would be seen: what is there is traced, for every plan."""
    expected, _, _ = draw(split=lambda _: split)
    patcher, seen = Patcher(), list[set[str]]()

    def look(executor: Any, *args: Any) -> Any:
        seen.append({str(each) for each in args[-1]})
        return executor(*args)

    patcher.model_options["torch_compile_kwargs"] = {"backend": "inductor", "fullgraph": True}
    patcher.add_wrapper_with_key(MODEL, "look", look)
    drawn, report, _ = draw(patcher=patcher, split=lambda _: split)
    assert (report.computed, report.full, report.forced) == (len(KEYS), "", {})
    assert len(seen) == patcher.denoiser.calls == len(KEYS) * (1 + split)
    assert not any(KEY in each for each in seen)
    assert torch.allclose(drawn, expected, atol=1e-4)
    full, _, _ = draw(Plan.full(STEPS), patcher=patcher)
    assert torch.equal(full, draw(None)[0])


def test_outputs_that_are_no_tensor_are_handed_on() -> None:
    """Models that give several things: nothing is known of them, so nothing is kept."""
    patcher = PlanOnModel(PlanChoice(PLAN)).attach(Patcher())
    patcher.add_wrapper_with_key(MODEL, "pair", lambda executor, *args: Pair(executor(*args)))
    guider = Guider(patcher, [cond(0.4)], [cond(-0.3)])
    drawn = guider.sample(start(), EULER, lay_out(STEPS))
    assert torch.equal(drawn, draw(None)[0])


class Pair:
    def __init__(self, output: torch.Tensor) -> None:
        self.output = output

    def float(self) -> torch.Tensor:
        return self.output.float()


def test_a_second_plan_takes_the_place_of_the_first() -> None:
    first = PlanOnModel(PlanChoice(Plan.full(STEPS)))
    second = PlanOnModel(PlanChoice(PLAN))
    patcher = second.attach(first.attach(Patcher()))
    Guider(patcher, [cond(0.4)], [cond(-0.3)]).sample(start(), EULER, lay_out(STEPS))
    assert first.last is None
    assert second.last is not None


def test_the_model_itself_is_as_it_was() -> None:
    patcher = Patcher()
    PlanOnModel(PlanChoice(PLAN)).attach(patcher)
    assert not patcher.wrappers
    assert torch.equal(draw(None, patcher=patcher)[0], draw(None)[0])


def test_two_runs_at_once_on_one_model() -> None:
    lean = PlanOnModel(PlanChoice(PLAN))
    patcher = lean.attach(Patcher())
    expected = [draw(positive=[cond(each)])[0] for each in (0.4, 0.9)]
    drawn: dict[float, torch.Tensor] = {}

    def run(context: float) -> Callable[[], None]:
        def task() -> None:
            guider = Guider(patcher, [cond(context)], [cond(-0.3)])
            drawn[context] = guider.sample(start(), EULER, lay_out(STEPS))

        return task

    run_all([run(0.4), run(0.9)])
    assert all(map(torch.equal, expected, (drawn[0.4], drawn[0.9])))


def test_no_value_is_read_from_the_device_in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the start of a run, which reads its sigmas: neither `.item()` nor `.tolist()`."""
    read: list[str] = []

    def watch(name: str) -> Any:
        original = getattr(torch.Tensor, name)
        return lambda self, *args: (read.append(name), original(self, *args))[1]

    def sample(model: Any, *args: Any, **options: Any) -> torch.Tensor:
        if isinstance(model, Guider):  # the run itself, not the look at the sampler before it
            for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy"):
                monkeypatch.setattr(torch.Tensor, name, watch(name))
        return sample_euler(model, *args, **options)

    noise = CONST()
    monkeypatch.setattr(noise, "timestep", lambda sigma: sigma)
    draw(patcher=Patcher(noise=noise), sampler=Sampler(sample), sigmas=lay_out(STEPS, 1.0, 0.02))
    monkeypatch.undo()
    # The double itself asks once a conditioning and call whether it is time for it.
    assert read == ["__bool__"] * (2 * 2 * STEPS)
