"""The panel for SD.Next, against a double of what SD.Next calls; nothing of SD.Next is needed."""

import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline
from PIL import Image

import leansd
from hosts import open_in_host
from leansd.anatomy.reading import read_anatomy
from leansd.plans.anatomy import HEAD
from leansd.plans.methods import Mix
from leansd.runtime.engine import list_followers
from loops import count_calls
from tiny import shallow_unet, tiny_pipeline

MIDDLE = "mid.l0.res"
"""A unit that runs wherever the UNet does."""
SCRIPT = Path(__file__).parent.parent / "integrations/sdnext/scripts/lean_plan.py"
STEPS = 20


class Processing(types.SimpleNamespace):
    """SD.Next's `p`: what is to be drawn."""

    def __init__(self, **changes: Any) -> None:
        given: dict[str, Any] = {"steps": STEPS, "strength": 0.5, "passes": ("Base",), "seed": 0}
        super().__init__(extra_generation_params={}, **(given | changes))


class Host:
    """SD.Next's passes: arguments are made, the pipeline is called, modifiers are taken off."""

    def __init__(self) -> None:
        self.pipe: Any = tiny_pipeline(unet=shallow_unet(), scheduler=make_euler())
        self.after: list[Callable[[Any], None]] = []
        self.posts = 0
        self.during: Callable[[int], None] = lambda step: None
        """What a callback of the host's does in the midst of a run."""
        self.before: Callable[[], None] = lambda: None
        """What comes between the arguments and the call."""

    @property
    def modules(self) -> dict[str, dict[str, Any]]:
        scripts = {"Script": type("Script", (), {}), "AlwaysVisible": object()}
        passes = {"set_pipeline_args": self.set_pipeline_args, "process_post": self.process_post}
        return {
            "modules": {},
            "modules.scripts": scripts,
            "modules.script_callbacks": {"on_after_process": self.after.append},
            "modules.processing_diffusers": passes,
        }

    def set_pipeline_args(self, p: Any, model: Any, desc: str, **named: Any) -> dict[str, Any]:
        def call_back(pipe: Any, step: int, time: Any, kept: dict[str, Any]) -> dict[str, Any]:
            self.during(step)
            return kept

        generator = torch.Generator().manual_seed(p.seed)
        common = {"prompt": "a lighthouse", "guidance_scale": 5.0, "output_type": "latent"}
        return {**common, "generator": generator, "callback_on_step_end": call_back, **named}

    def process_post(self, p: Any) -> None:
        self.posts += 1

    def run_pass(self, p: Any, desc: str) -> Any:
        host = sys.modules["modules.processing_diffusers"]
        pipe, named = self.pipe, {"num_inference_steps": p.steps}
        if desc != "Base":  # another pipeline around the same networks
            parts = {**pipe.components, "requires_safety_checker": False}
            pipe = StableDiffusionImg2ImgPipeline(**parts)
            pipe.set_progress_bar_config(disable=True)
            picture = Image.new("RGB", (32, 32), "teal")
            named = {**named, "image": picture, "strength": p.strength}
        arguments = host.set_pipeline_args(p=p, model=pipe, desc=desc, **named)
        self.before()
        try:
            return pipe(**arguments)[0]
        except RuntimeError:
            return None
        finally:
            if desc != "Refiner":
                host.process_post(p)

    def draw(self, script: Any, p: Processing, plan: str = "off", file: Path | str = "") -> Any:
        """The last latents of every pass; None for one that failed."""
        try:
            script.LeanPlanScript().process(p, plan, str(file))
            return [self.run_pass(p, desc) for desc in p.passes]
        finally:
            for callback in self.after:
                callback(p)
            assert not list_followers(self.pipe.unet)


def make_euler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def script(host: Host, caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    """The script, opened as SD.Next opens it."""
    caplog.set_level("INFO", logger="sd")
    with open_in_host(SCRIPT, host.modules) as opened:
        yield opened


def count_keys(plan: str, first: int = 0) -> int:
    """How often the UNet runs: the first step of a run from a picture is computed."""
    rows = leansd.preset(plan, steps=STEPS, sampler="euler").rows[first:]
    return 1 + sum(HEAD not in row.inherit for row in rows[1:])


def test_a_plan_is_followed_by_a_pass_and_said_once(host: Host, script: Any, caplog: Any) -> None:
    (full,) = host.draw(script, Processing())
    assert not caplog.records
    p, unet = Processing(), host.pipe.unet
    with count_calls(unet, read_anatomy(unet)) as counts:
        (lean,) = host.draw(script, p, "balanced")
    assert counts[MIDDLE] == count_keys("balanced") < STEPS
    assert 0 < (lean - full).abs().mean() < full.std() / 2
    expected = leansd.preset("balanced", STEPS, sampler="euler")
    told = f"balanced ({expected.fingerprint})"
    assert p.extra_generation_params == {"Lean Plan": told}
    (record,) = caplog.records
    assert record.getMessage().startswith("Lean Plan: plan balanced: 20 UNet calls, ")
    assert host.posts == 2
    (again,) = host.draw(script, Processing(), "balanced")
    assert torch.equal(again, lean)
    (off,) = host.draw(script, Processing())
    assert torch.equal(off, full)


def test_a_full_plan_changes_no_bit(host: Host, script: Any, tmp_path: Path) -> None:
    leansd.Plan.full(STEPS).save(tmp_path / "full.json")
    (full,) = host.draw(script, Processing())
    (lean,) = host.draw(script, Processing(), file=tmp_path / "full.json")
    assert torch.equal(lean, full)


def test_a_second_pass_follows_from_where_it_starts(host: Host, script: Any, caplog: Any) -> None:
    passes = ("Base", "Hires")
    expected = host.draw(script, Processing(passes=passes))
    unet = host.pipe.unet
    with count_calls(unet, read_anatomy(unet)) as counts:
        made = host.draw(script, Processing(passes=passes), "balanced")
    assert counts[MIDDLE] == count_keys("balanced") + count_keys("balanced", first=STEPS // 2)
    for lean, full in zip(made, expected, strict=True):
        assert 0 < (lean - full).abs().mean() < full.std() / 2
    assert [each.getMessage()[:29] for each in caplog.records] == ["Lean Plan: plan balanced: " + n
            for n in ("20 ", "10 ")]  # fmt: skip


def test_a_refiner_is_left_alone(host: Host, script: Any, caplog: Any) -> None:
    (full,) = host.draw(script, Processing(passes=("Refiner",)))
    (lean,) = host.draw(script, Processing(passes=("Refiner",)), "balanced")
    assert torch.equal(lean, full)
    assert "the refiner's pass is computed in full" in caplog.text


def test_after_an_error_nothing_is_attached(host: Host, script: Any, caplog: Any) -> None:
    (full,) = host.draw(script, Processing())

    def fail(step: int = 5) -> None:
        if step == 5:
            raise RuntimeError("out of memory")

    host.during = fail
    assert host.draw(script, Processing(), "balanced") == [None]
    assert "plan balanced: 6 UNet calls" in caplog.text
    host.during, host.before = lambda step: None, fail
    with pytest.raises(RuntimeError, match="out of memory"):
        host.draw(script, Processing(), "balanced")
    assert "plan balanced: nothing ran" in caplog.text
    host.before = lambda: None
    (after,) = host.draw(script, Processing())
    assert torch.equal(after, full)


def test_a_plan_that_does_not_suit_is_told_and_computed_in_full(
    host: Host, script: Any, caplog: Any, tmp_path: Path
) -> None:
    (full,) = host.draw(script, Processing())
    leansd.Plan.every(3, cut="head", steps=12, how="forecast").save(tmp_path / "twelve.json")
    leansd.Plan.full(STEPS).mix({0: Mix(0.05)}).save(tmp_path / "mix.json")
    leansd.Plan.full(STEPS).switch("light", at=[3]).save(tmp_path / "net.json")
    told = {
        tmp_path / "mix.json": "mixes outputs",
        tmp_path / "net.json": "light",
        tmp_path / "twelve.json": f"is for 12 steps, this run has {STEPS}",
        Path("no/such.json"): "no plan file at no/such.json",
    }
    for file, reason in told.items():
        p = Processing()
        (made,) = host.draw(script, p, file=file)
        assert torch.equal(made, full)
        assert not p.extra_generation_params
        (record,) = caplog.records
        assert record.getMessage().startswith("Lean Plan: computed in full, because ")
        assert reason in record.getMessage()
        caplog.clear()
    script.PASSES.begin(lambda **_: {}, p=Processing(lean_plan="balanced"), model=object())
    script.PASSES.close()
    assert "cannot attach to a object" in caplog.text


def test_hooks_of_a_script_that_is_read_again_take_the_place_of_the_old(
    host: Host, script: Any, caplog: Any
) -> None:
    host.draw(script, Processing(), "balanced")
    modules = {name: dict(vars(sys.modules[name])) for name in host.modules}
    caplog.clear()
    host.after.clear()
    with open_in_host(SCRIPT, modules) as again:
        host.draw(again, Processing(), "balanced")
    assert len(caplog.records) == 1


def test_steps_are_those_of_the_call(script: Any) -> None:
    p = Processing()
    assert script.count_steps({"num_inference_steps": 41}, p) == 41
    assert script.count_steps({"timesteps": [999, 500, 1], "num_inference_steps": None}, p) == 3
    assert script.count_steps({}, p) == STEPS
