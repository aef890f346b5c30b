"""The panel for Forge, against a double of what Forge calls; nothing of Forge is needed."""

import types
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import leansd
from hosts import open_in_host
from leansd.core import list_log_snr
from leansd.plans.anatomy import WHOLE
from leansd.plans.plan import Tuned
from leansd.plans.presets import SPEED_PRESETS
from leansd.plans.resolve import FEW_STEPS, PlanContext, carry_over, resolve_plan

SCRIPT = Path(__file__).parent.parent / "integrations/forge/scripts/lean_plan.py"
STEPS = 30


@pytest.fixture(scope="module")
def forge() -> Iterator[Any]:
    """The script, opened as Forge opens it."""
    scripts = {"Script": type("Script", (), {}), "AlwaysVisible": object()}
    with open_in_host(SCRIPT, {"modules": {}, "modules.scripts": scripts}) as script:
        yield script


def call_plainly(apply_model: Any, args: Any) -> torch.Tensor:
    return apply_model(args["input"], args["timestep"], **args["c"])


class Unet:
    """Forge's model patcher, as far as it is used."""

    model: Any = None

    def __init__(self, **options: Any) -> None:
        self.model_options = options

    def clone(self) -> "Unet":
        return Unet(**self.model_options)

    def set_model_unet_function_wrapper(self, wrapper: Any) -> None:
        self.model_options["model_function_wrapper"] = wrapper

    def set_model_sampler_post_cfg_function(self, function: Any) -> None:
        self.model_options["sampler_post_cfg_function"] = function


class Processing:
    """Forge's `p`: an Euler sampler on a smooth stand-in for a model."""

    def __init__(
        self,
        batches: Sequence[Sequence[int]] = ((0, 1),),
        sampler: str = "Euler",
        steps: int = STEPS,
    ) -> None:
        self.batches, self.sampler_name, self.steps = batches, sampler, steps
        self.sampler = types.SimpleNamespace(get_sigmas=self.get_sigmas)
        self.sd_model = types.SimpleNamespace(forge_objects=types.SimpleNamespace(unet=Unet()))
        self.extra_generation_params: dict[str, str] = {}
        self.cfg_scale = 7.0
        self.calls = 0

    def get_sigmas(self, p: Any, steps: int) -> torch.Tensor:
        return torch.cat([torch.linspace(14**0.2, 0.03**0.2, steps) ** 5, torch.zeros(1)])

    def apply_model(self, x: torch.Tensor, sigma: torch.Tensor, *, shift: torch.Tensor) -> Any:
        self.calls += 1
        level = sigma.reshape(-1, 1, 1, 1)
        return x / (1 + level**2) + torch.tanh(x / (1 + level)) / 4 + shift.reshape(-1, 1, 1, 1)

    def sample(self, first: int = 0) -> torch.Tensor:
        """The last latents [2, 4, 4, 4] of a run from step `first` on."""
        options = self.sd_model.forge_objects.unet.model_options
        wrap = options.get(
            "model_function_wrapper", lambda f, a: f(a["input"], a["timestep"], **a["c"])
        )
        sigmas = self.get_sigmas(self, self.steps)
        x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)) * sigmas[first]
        for now, then in zip(sigmas[first:-1], sigmas[first + 1 :], strict=True):
            sums, counts = torch.zeros(2, *x.shape), torch.zeros(2)
            for places in self.batches:
                count = len(places) * len(x)
                shift = torch.tensor(places).repeat_interleave(len(x)) * 0.3
                arguments = {"input": torch.cat([x] * len(places)), "timestep": now.expand(count)}
                arguments |= {"c": {"shift": shift}, "cond_or_uncond": list(places)}
                for place, part in zip(
                    places, wrap(self.apply_model, arguments).chunk(len(places)), strict=True
                ):
                    sums[place], counts[place] = sums[place] + part, counts[place] + 1
            cond, rest = sums / counts.reshape(-1, 1, 1, 1, 1)
            denoised = rest + 4 * (cond - rest)
            after = options.get("sampler_post_cfg_function")
            denoised = after({"denoised": denoised}) if after else denoised
            x = x + (x - denoised) / now * (then - now)
        return x


def draw(forge: Any, p: Processing, plan: str, *, first: int = 0, file: str = "") -> torch.Tensor:
    """One picture by the panel."""
    script = forge.LeanPlanScript()
    script.process_before_every_sampling(p, plan, file, x=None)
    try:
        return p.sample(first)
    finally:
        script.postprocess(p, None)
        assert script.run is None


BATCHES = {"together": ((0, 1),), "turned": ((1, 0),), "apart": ((0,), (1,))}


@pytest.mark.parametrize("batches", BATCHES.values(), ids=BATCHES)
def test_a_plan_is_followed_however_conditionings_are_batched(forge: Any, batches: Any) -> None:
    full, lean = Processing(batches), Processing(batches)
    expected = full.sample()
    made = draw(forge, lean, "balanced")
    plan = leansd.preset("balanced", steps=STEPS, sampler="euler")
    keys = sum(not row.inherit for row in plan.rows)
    assert lean.calls == keys * len(batches) < full.calls
    fewer = Processing(batches, steps=keys).sample()
    assert (made - expected).abs().mean() < (fewer - expected).abs().mean() / 2
    assert lean.extra_generation_params == {"Lean Plan": f"balanced ({plan.fingerprint})"}
    assert torch.allclose(made, draw(forge, Processing(), "balanced"), atol=1e-4)


@pytest.mark.parametrize(
    ("p", "plan"),
    [
        pytest.param(Processing(), "full", id="a full plan"),
        pytest.param(Processing(((0, 0, 1),)), "balanced", id="joined prompts"),
        pytest.param(Processing(sampler="DPM++ SDE"), "balanced", id="two calls a step"),
        pytest.param(Processing(), "off", id="off"),
    ],
)
def test_what_is_not_known_is_computed_to_the_bit(
    forge: Any, tmp_path: Path, p: Processing, plan: str
) -> None:
    expected = p.sample()
    calls, p.calls = p.calls, 0
    file = ""
    if plan == "full":
        leansd.Plan.full(STEPS).save(tmp_path / "full.json")
        file = str(tmp_path / "full.json")
    assert torch.equal(draw(forge, p, plan, file=file), expected)
    assert p.calls == calls


def test_a_run_from_a_picture_takes_the_plans_tail(forge: Any) -> None:
    p = Processing()
    made = draw(forge, p, "balanced", first=12)
    rows = leansd.preset("balanced", steps=STEPS, sampler="euler").rows[12:]
    # Its first step is computed, whatever the plan says there.
    assert p.calls <= 1 + sum(not row.inherit for row in rows)
    assert torch.isfinite(made).all()


def test_a_wrong_plan_is_told_and_computed_in_full(forge: Any, caplog: Any) -> None:
    p = Processing()
    expected = p.sample()
    assert torch.equal(draw(forge, p, "", file="no/such.json"), expected)
    assert "computed in full" in caplog.text


def test_a_plan_of_other_noise_levels_or_guidance_goes_along_and_it_is_said(
    forge: Any, tmp_path: Path, caplog: Any
) -> None:
    p = Processing(steps=12)
    levels = list_log_snr(p.get_sigmas(p, 12).tolist()[:-1])
    plan = leansd.Plan.between((0, 1, 2, 4, 6, 9, 11), cut="head", steps=12, how="forecast")
    for name, own in (("same", levels), ("other", [level * 0.2 - 1 for level in levels])):
        tuned = Tuned("euler", "", 7.0 if name == "same" else 4.0, tuple(own))
        replace(plan, tuned=tuned, name=name).save(tmp_path / f"{name}.json")
    draw(forge, p, "", file=str(tmp_path / "same.json"))
    assert p.calls == 7
    assert not caplog.records
    moved, p.calls = carry_over(plan, [level * 0.2 - 1 for level in levels], levels), 0
    draw(forge, p, "", file=str(tmp_path / "other.json"))
    assert p.calls == len(moved.keys) != 7
    assert "tuned for other noise levels" in caplog.text
    assert "tuned at guidance 4, not 7" in caplog.text


@pytest.mark.parametrize(
    "model",
    [
        types.SimpleNamespace(predictor=types.SimpleNamespace(prediction_type="const")),
        types.SimpleNamespace(model_sampling=type("Flow", (type("CONST", (), {}),), {})()),
    ],
    ids=["Forge", "reForge"],
)
def test_models_of_flow_have_log_snr_of_their_own(forge: Any, model: Any) -> None:
    unet = Unet()
    unet.model = model
    assert forge.find_prediction(unet) == "flow"
    assert forge.find_prediction(Unet()) == "noise"
    sigmas = [1.0, 0.8, 0.5, 0.2, 0.0]
    run = forge.ForgeRun(leansd.Plan.full(4), sigmas, "flow")
    run.run_model(torch.zeros(1, 4, 2, 2), torch.ones(1), [0], lambda: torch.zeros(1, 4, 2, 2))
    assert run.player.schedule.log_snr == list_log_snr(sigmas[:-1], "flow")


@pytest.mark.parametrize("steps", [8, 20, 30, 50])
@pytest.mark.parametrize(
    ("sampler", "own"), [("Euler", "euler"), ("DPM++ 2M", "dpm++2m"), ("LMS", "lms")]
)
def test_a_preset_is_the_plan_that_it_is_everywhere(
    forge: Any, sampler: str, own: str, steps: int
) -> None:
    """DDIM and UniPC are no samplers of the panel: they run in full, and it is said."""
    script = forge.LeanPlanScript()
    for name in SPEED_PRESETS:
        context = PlanContext(steps, sampler=own, anatomy=WHOLE)
        expected = resolve_plan(name, context).plan
        if steps > FEW_STEPS and own != "lms":  # also where the inside of the model is known
            assert expected.fingerprint == leansd.preset(name, steps, sampler=own).fingerprint
        p = Processing(sampler=sampler, steps=steps)
        script.process_before_every_sampling(p, name)
        assert script.run.plan.fingerprint == expected.fingerprint
        told = p.extra_generation_params["Lean Plan"]
        assert told == f"{expected.name} ({expected.fingerprint})"


@pytest.mark.parametrize(
    ("sampler", "own", "nearest"),
    [("LMS", "lms", "euler"), ("DPM++ 3M SDE", "dpm++3m-sde", "euler-a")],
)
def test_it_is_said_where_no_plan_is_tuned_for_a_sampler(
    forge: Any, caplog: Any, sampler: str, own: str, nearest: str
) -> None:
    """In the words of every other face, and with the plan that they take there."""
    context = PlanContext(STEPS, sampler=own, adds_noise=nearest == "euler-a", anatomy=WHOLE)
    resolved = resolve_plan("balanced", context)
    (note,) = resolved.notes
    assert f"not tuned for {own}: it is as for {nearest};" in note
    draw(forge, Processing(sampler=sampler), "balanced")
    assert note in caplog.text
    for tuned in ("Euler", "Euler a", "DPM++ 2M SDE"):
        caplog.clear()
        draw(forge, Processing(sampler=tuned), "balanced")
        assert "not tuned" not in caplog.text
