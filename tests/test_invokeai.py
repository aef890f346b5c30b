"""The node for InvokeAI, against a double of its ways to denoise; nothing of InvokeAI is needed.

Both are loops around a UNet; guidance is computed in one batch or, sequentially, in two calls.
"""

import enum
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor2_0

import leansd
from hosts import open_in_host
from leansd.anatomy.reading import read_anatomy
from leansd.plans.anatomy import HEAD
from leansd.runtime.engine import list_followers
from loops import count_calls
from tiny import LATENT, TOKENS, WIDTH, shallow_unet

NODE = Path(__file__).parent.parent / "integrations/invokeai/lean_plan/__init__.py"
STEPS = 20
MIDDLE = "mid.l0.res"
"""A unit that runs wherever the UNet does."""
SCHEDULERS = {
    "euler": EulerDiscreteScheduler,
    "dpm++2m": DPMSolverMultistepScheduler,
    "ddim": DDIMScheduler,
    "heun": HeunDiscreteScheduler,
}


class Stage(enum.Enum):
    """When a callback of an extension is called."""

    SETUP = "setup"
    PRE_UNET = "pre_unet"


class Mode(enum.Enum):
    """What a UNet call is conditioned on."""

    Both = "both"
    Negative = "negative"
    Positive = "positive"


def callback(stage: Stage) -> Callable[[Any], Any]:
    def mark(function: Any) -> Any:
        function.stage = stage
        return function

    return mark


class Extension:
    """The base class of InvokeAI's extensions."""

    @contextmanager
    def patch_unet(self, unet: Any, original_weights: Any) -> Iterator[None]:
        yield


class Extensions:
    """Their manager."""

    def __init__(self) -> None:
        self.every: list[Any] = []

    def add_extension(self, extension: Any) -> None:
        self.every.append(extension)

    def call_back(self, stage: Stage, context: Any) -> None:
        for each in self.every:
            for name in dir(type(each)):
                if getattr(getattr(each, name), "stage", None) is stage:
                    getattr(each, name)(context)


class Processor(AttnProcessor2_0):
    """InvokeAI's attention, which is told how far a run has come."""

    def __call__(self, *args: Any, percent_through: float, **named: Any) -> torch.Tensor:
        return super().__call__(*args, **named)


class Control(Extension):
    """A ControlNet that comes and goes, and leaves unconditional calls alone."""

    def __init__(self, steps: range) -> None:
        self.steps = steps

    @callback(Stage.PRE_UNET)
    def add(self, context: Any) -> None:
        sample, mode = context.unet_kwargs["sample"], context.conditioning_mode
        if context.step_index in self.steps and mode is not Mode.Negative:
            given = torch.ones(len(sample), 32, LATENT, LATENT)
            if mode is Mode.Both:
                given[: len(sample) // 2] = 0
            context.unet_kwargs["down_block_additional_residuals"] = (given, given)
            context.unet_kwargs["mid_block_additional_residual"] = given


class Pipeline(StableDiffusionPipeline):
    """InvokeAI's pipeline: a loop of its own in the usual way to denoise."""

    sequential = False
    during: Callable[[int], None] = staticmethod(lambda step: None)

    def latents_from_embeddings(self, latents: Any, timesteps: Any, texts: Any) -> torch.Tensor:
        with torch.inference_mode():
            for index, time in enumerate(timesteps):
                self.during(index)
                latents = self.step(time.expand(len(latents)), latents, texts)
        return latents

    def step(self, times: Any, latents: Any, texts: Any) -> Any:
        scaled = self.scheduler.scale_model_input(latents, times[0])
        if self.sequential:
            rest, cond = (self.predict(scaled, times, text) for text in texts)
        else:
            text = torch.cat(texts)
            rest, cond = self.predict(torch.cat([scaled] * 2), torch.cat([times] * 2), text).chunk(
                2
            )
        noise = rest + 4 * (cond - rest)
        return self.scheduler.step(noise, times[0], latents).prev_sample

    def predict(self, sample: Any, times: Any, text: Any) -> torch.Tensor:
        return self.unet(sample, times, text, cross_attention_kwargs={}).sample


class Denoise:
    """InvokeAI's node Denoise, as far as it is used."""

    steps = STEPS
    start = 0.0
    plan = "balanced"
    sequential = False
    control: Any = None
    batch = 2

    def __init__(self, unet: UNet2DConditionModel, kind: str = "euler", **changes: Any) -> None:
        self.unet = unet
        schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        schedule["clip_sample"] = False  # as pipelines set it
        self.scheduler = SCHEDULERS[kind].from_config({**schedule, "steps_offset": 1})
        self.during: Callable[[int], None] = lambda step: None
        vars(self).update(changes)

    @staticmethod
    def create_pipeline(unet: Any, scheduler: Any) -> Any:
        nothing: dict[str, Any] = dict.fromkeys(
            ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
        )
        return Pipeline(unet=unet, scheduler=scheduler, requires_safety_checker=False, **nothing)

    @staticmethod
    def parse_controlnet_field(exit_stack: Any, context: Any, control: Any, manager: Any) -> None:
        if control is not None:
            manager.add_extension(control)

    def prepare(self) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Latents, the time steps to come and the texts."""
        self.scheduler.set_timesteps(self.steps)
        order = self.scheduler.order
        times = self.scheduler.timesteps[int(self.start * self.steps) * order :]
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(self.batch, 4, LATENT, LATENT, generator=generator)
        latents = self.scheduler.add_noise(torch.zeros_like(noise), noise, times[:1])
        texts = torch.randn(2, 1, TOKENS, WIDTH, generator=generator).expand(2, self.batch, -1, -1)
        return latents, times, (texts[0], texts[1])

    def denoise(self, *, modular: bool) -> torch.Tensor:
        try:
            return self.denoise_modular() if modular else self.denoise_usual()
        finally:
            assert not list_followers(self.unet)
            assert "forward" not in vars(self.unet)

    def denoise_usual(self) -> torch.Tensor:
        latents, times, texts = self.prepare()
        pipe = self.create_pipeline(self.unet, self.scheduler)
        pipe.sequential, pipe.during = self.sequential, self.during
        return pipe.latents_from_embeddings(latents, timesteps=times, texts=texts)

    def denoise_modular(self) -> torch.Tensor:
        latents, times, texts = self.prepare()
        conditioning = types.SimpleNamespace(guidance_scale=4.0, texts=texts)
        inputs = types.SimpleNamespace(timesteps=times, conditioning_data=conditioning)
        context = types.SimpleNamespace(inputs=inputs, scheduler=self.scheduler, latents=latents)
        context.step_index = context.conditioning_mode = context.unet_kwargs = None
        manager = Extensions()
        own = self.unet.attn_processors
        with ExitStack() as stack:
            self.parse_controlnet_field(stack, None, self.control, manager)
            manager.call_back(Stage.SETUP, context)
            self.unet.set_attn_processor(Processor())
            stack.callback(self.unet.set_attn_processor, own)
            for each in manager.every:
                stack.enter_context(each.patch_unet(self.unet, None))
            for context.step_index, time in enumerate(times):
                self.during(context.step_index)
                with torch.inference_mode():
                    self.step(context, manager, time)
        return context.latents

    def step(self, context: Any, manager: Extensions, time: torch.Tensor) -> None:
        modes = (Mode.Negative, Mode.Positive) if self.sequential else (Mode.Both,)
        parts = [self.predict(context, manager, time, mode) for mode in modes]
        rest, cond = torch.cat(parts).chunk(2)
        noise = rest + 4 * (cond - rest)
        context.latents = self.scheduler.step(noise, time, context.latents).prev_sample

    def predict(self, context: Any, manager: Extensions, time: Any, mode: Mode) -> torch.Tensor:
        texts = context.inputs.conditioning_data.texts
        scaled = self.scheduler.scale_model_input(context.latents, time)
        told = {"percent_through": context.step_index / len(context.inputs.timesteps)}
        context.conditioning_mode = mode
        context.unet_kwargs = {
            "sample": torch.cat([scaled] * 2) if mode is Mode.Both else scaled,
            "timestep": time,
            "encoder_hidden_states": torch.cat(texts)
            if mode is Mode.Both
            else texts[mode is Mode.Positive],
            "cross_attention_kwargs": told,
            "down_block_additional_residuals": None,
            "mid_block_additional_residual": None,
        }
        manager.call_back(Stage.PRE_UNET, context)
        noise = self.unet(**context.unet_kwargs).sample
        context.unet_kwargs = context.conditioning_mode = None
        return noise


DOUBLES: dict[str, dict[str, Any]] = {
    "invokeai.app.invocations.denoise_latents": {"DenoiseLatentsInvocation": Denoise},
    "invokeai.backend.stable_diffusion.extension_callback_type": {"ExtensionCallbackType": Stage},
    "invokeai.backend.stable_diffusion.extensions.base": {
        "ExtensionBase": Extension,
        "callback": callback,
    },
    "invokeai.invocation_api": {
        "InputField": lambda default, description: default,
        "invocation": lambda name, **said: lambda node: node,
    },
}


@pytest.fixture(scope="module")
def node() -> Iterator[Any]:
    """The node, opened as InvokeAI opens it."""
    with open_in_host(NODE, DOUBLES) as opened:
        yield opened.LeanDenoiseInvocation


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return shallow_unet()


@pytest.fixture(params=["usual", "modular"])
def modular(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> bool:
    caplog.set_level("INFO", logger="InvokeAI")
    return request.param == "modular"


@pytest.fixture(params=["together", "apart"])
def sequential(request: pytest.FixtureRequest) -> bool:
    return request.param == "apart"


def list_computed(kind: str, first: int = 0, steps: int = STEPS) -> list[int]:
    """Steps at which the UNet runs: of a run from a picture always the first."""
    rows = leansd.preset("balanced", steps=steps, sampler=kind).rows
    return [step for step in range(first, steps) if step == first or HEAD not in rows[step].inherit]


@pytest.mark.parametrize(
    ("kind", "start"), [("euler", 0.0), ("euler", 0.5), ("dpm++2m", 0.0), ("ddim", 0.5)]
)
def test_a_plan_is_followed_with_guidance_together_or_apart(
    node: Any, unet: Any, modular: bool, sequential: bool, kind: str, start: float, caplog: Any
) -> None:
    options = {"sequential": sequential, "start": start}
    full = Denoise(unet, kind, **options).denoise(modular=modular)
    with count_calls(unet, read_anatomy(unet)) as counts:
        lean = node(unet, kind, **options).denoise(modular=modular)
    computed = list_computed(kind, int(start * STEPS))
    assert (
        counts[MIDDLE] == len(computed) * (1 + sequential) < STEPS * (1 - start) * (1 + sequential)
    )
    assert 0 < (lean - full).abs().mean() < full.std() / 2
    (record,) = caplog.records
    assert "balanced: " in record.getMessage()
    # Were one conditioning made from what is kept of another, these would be far apart.
    other = node(unet, kind, start=start, sequential=not sequential).denoise(modular=not modular)
    assert torch.allclose(lean, other, atol=1e-4 * float(full.std()))


def test_a_full_plan_changes_no_bit(
    node: Any, unet: Any, modular: bool, sequential: bool, tmp_path: Path
) -> None:
    leansd.Plan.full(STEPS).save(tmp_path / "full.json")
    options = {"sequential": sequential, "plan": str(tmp_path / "full.json")}
    full = Denoise(unet, **options).denoise(modular=modular)
    assert torch.equal(node(unet, **options).denoise(modular=modular), full)


def test_a_sampler_of_two_calls_a_step(
    node: Any, unet: Any, modular: bool, sequential: bool, tmp_path: Path
) -> None:
    plan = leansd.Plan.every(4, cut="head", steps=STEPS, how="forecast")
    plan.save(tmp_path / "fourth.json")
    made = []
    for start in (0.0, 0.5):
        options = {"sequential": sequential, "start": start, "plan": str(tmp_path / "fourth.json")}
        full = Denoise(unet, "heun", **options).denoise(modular=modular)
        with count_calls(unet, read_anatomy(unet)) as counts:
            lean = node(unet, "heun", **options).denoise(modular=modular)
        assert 0 < counts[MIDDLE] <= (1 + sequential) * STEPS * (1 - start)
        assert (lean - full).abs().mean() < full.std() / 2
        made.append(counts[MIDDLE])
    assert made[1] < made[0]


def test_a_run_is_over_when_the_next_begins(node: Any, unet: Any, modular: bool) -> None:
    first = node(unet).denoise(modular=modular)
    assert torch.equal(node(unet).denoise(modular=modular), first)
    again = node(unet)
    assert torch.equal(again.denoise(modular=modular), first)
    assert torch.equal(again.denoise(modular=modular), first)


def test_after_an_error_nothing_is_attached(
    node: Any, unet: Any, modular: bool, caplog: Any
) -> None:
    full = Denoise(unet).denoise(modular=modular)

    def fail(step: int) -> None:
        if step == 5:
            raise RuntimeError("canceled")

    with pytest.raises(RuntimeError, match="canceled"):
        node(unet, during=fail).denoise(modular=modular)
    assert "5 UNet calls" in caplog.text or "of 5 times" in caplog.text
    assert torch.equal(Denoise(unet).denoise(modular=modular), full)


def test_a_plan_that_does_not_suit_is_told_and_computed_in_full(
    node: Any, unet: Any, modular: bool, tmp_path: Path, caplog: Any
) -> None:
    full = Denoise(unet).denoise(modular=modular)
    leansd.Plan.every(3, cut="head", steps=12, how="forecast").save(tmp_path / "twelve.json")
    told = {
        str(tmp_path / "twelve.json"): f"is for 12 steps, this run has {STEPS}",
        "no/such.json": "no plan file at no/such.json",
        "balancde": "no preset 'balancde'",
    }
    for plan, reason in told.items():
        assert torch.equal(node(unet, plan=plan).denoise(modular=modular), full)
        (record,) = caplog.records
        assert "computed in full, because " in record.getMessage()
        assert reason in record.getMessage()
        caplog.clear()


def test_a_plan_inside_the_unet_is_for_the_usual_way(
    node: Any, unet: Any, sequential: bool, tmp_path: Path, caplog: Any
) -> None:
    caplog.set_level("INFO", logger="InvokeAI")
    leansd.Plan.every(2, cut="mid", steps=STEPS).save(tmp_path / "inside.json")
    options = {"plan": str(tmp_path / "inside.json"), "sequential": sequential}
    for modular in (False, True):
        full = Denoise(unet, **options).denoise(modular=modular)
        with count_calls(unet, read_anatomy(unet)) as counts:
            lean = node(unet, **options).denoise(modular=modular)
        assert counts[MIDDLE] == STEPS * (1 + sequential) // (1 if modular else 2)
        assert torch.equal(lean, full) == modular
        other = node(unet, plan=options["plan"], sequential=not sequential)
        assert torch.allclose(lean, other.denoise(modular=modular), atol=1e-4 * float(full.std()))
    assert "of this denoiser only whole steps, head, are inherited" in caplog.text


def test_attention_that_is_not_known_is_computed_in_full(node: Any, unet: Any, caplog: Any) -> None:
    """As with regional prompts and IP-Adapters in the usual way to denoise."""

    class Regional(AttnProcessor2_0):
        """A processor of InvokeAI's."""

    caplog.set_level("INFO", logger="InvokeAI")
    unet.set_attn_processor(Regional())
    full = Denoise(unet).denoise(modular=False)
    with pytest.warns(UserWarning, match="Regional"):
        lean = node(unet).denoise(modular=False)
    assert torch.equal(lean, full)
    assert "20 computed in full because Regional looks into the UNet" in caplog.text


def test_where_a_controlnet_comes_or_goes_nothing_is_made_from_before(
    node: Any, unet: Any, sequential: bool
) -> None:
    control, computed = Control(range(7, 10)), list_computed("euler")
    assert not {7, 10} & set(computed), "steps that the plan would leave out"
    options = {"control": control, "sequential": sequential}
    full = Denoise(unet, **options).denoise(modular=True)
    with count_calls(unet, read_anatomy(unet)) as counts:
        lean = node(unet, **options).denoise(modular=True)
    assert counts[MIDDLE] > len(computed) * (1 + sequential)
    assert counts[MIDDLE] < STEPS * (1 + sequential)
    assert (lean - full).abs().mean() < full.std() / 2


def test_guidance_of_its_own_at_every_step_is_no_guidance_that_is_known(
    node: Any, unet: Any
) -> None:
    following = node.parse_controlnet_field.__globals__["DenoisingRun"]
    run = following("balanced")
    scheduler = Denoise(unet).scheduler
    scheduler.set_timesteps(STEPS)
    conditioning = types.SimpleNamespace(guidance_scale=[4.0] * STEPS)
    nothing = types.SimpleNamespace(
        timesteps=scheduler.timesteps[:0], conditioning_data=conditioning
    )
    run.begin(types.SimpleNamespace(inputs=nothing, scheduler=scheduler))
    assert run.reason == "no step of the run is one of its scheduler's"
    nothing.timesteps = scheduler.timesteps
    again = following("balanced")
    again.begin(types.SimpleNamespace(inputs=nothing, scheduler=scheduler))
    assert again._player is not None
