"""Where a GPU is waited for, counted on a device that is not there (`accelerator.py`).

What runs to the end there has nothing on the wrong device. Who waits for it is a table of its own:
each test says where values are read by nature, and how often.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState

import leansd
from accelerator import Accelerator, OnDevice, simulate
from leansd.evaluation.profile import profile
from leansd.evaluation.runs import CallSet, run_calls
from leansd.incubation.recipe import Recipe
from leansd.incubation.trainer import StageTrainer
from leansd.incubation.training_run import incubate
from leansd.plans import Plan
from leansd.plans.methods import Mix
from leansd.tuning.cutting import cut
from leansd.tuning.drift import measure_drift
from leansd.tuning.mix_fitting import FitState, MixConfig, MixFit, Spending
from leansd.tuning.run_starts import record_starts
from leansd.tuning.sampler_map import PlanMap, read_sampler
from leansd.tuning.tuner import tune
from test_tuning import make_cost
from tiny import shallow_unet, tiny_pipeline, tiny_scheduler

SHORT, LONG = 6, 12


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator]:
    """A GPU of CUDA's, without double precision, as Apple's are."""
    monkeypatch.setattr("leansd.core.devices.WITHOUT_DOUBLES", ("cuda",))
    monkeypatch.setattr("leansd.runtime.finite.REAL", {torch.Tensor, torch.nn.Parameter, OnDevice})
    with simulate(monkeypatch, doubles=False) as entered:
        yield entered


def make_pipe(unet: Any = None) -> Any:
    return tiny_pipeline(unet=unet or shallow_unet())


def count_own(device: Accelerator, run: Callable[[], Any]) -> dict[str, int]:
    """How often something of this package waits for the device meanwhile, by place."""
    before = device.waits.copy()
    run()
    return {
        place.removeprefix("leansd "): count
        for place, count in (device.waits - before).items()
        if place.startswith("leansd ")
    }


def draw(pipe: Any, steps: int, plan: Plan | None = None, **options: Any) -> torch.Tensor:
    """Latents on the CPU."""
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": steps, "output_type": "latent", "generator": generator}
    if plan is None:
        return pipe("a", **call).images.cpu()
    with leansd.inherit(pipe, plan, **options):
        return pipe("a", **call).images.cpu()


# -- the device itself -----------------------------------------------------------------------------


def test_the_device_is_as_strict_as_a_gpu(device: Accelerator) -> None:
    here = torch.arange(4.0, device="cuda")
    assert isinstance(here, OnDevice)
    for wrong in (
        lambda: here + torch.ones(4),
        lambda: torch.ones(4).add_(here),
        lambda: torch.randn(2, device="cuda", generator=torch.Generator()),
        lambda: here.numpy(),
        lambda: here.double(),
    ):
        with pytest.raises((RuntimeError, TypeError)):
            wrong()
    assert not device.waits
    large = torch.ones(100_000)
    for waits in (
        lambda: here[1].item(),
        lambda: bool(here.sum() > 0),
        lambda: here.tolist(),
        lambda: here[here > 1],
        lambda: torch.equal(here, here),
        lambda: torch.ones(2).to("cuda"),
        lambda: large.to("cuda", non_blocking=True),  # not from memory that is not pinned
        lambda: here.copy_(torch.ones(4)),
    ):
        before = device.waits.total()
        waits()
        assert device.waits.total() == before + 1
    before = device.waits.total()
    large.pin_memory().to("cuda", non_blocking=True)
    torch.ones(2).to("cuda", non_blocking=True)  # goes along with the command
    assert (here * 2.0 + torch.tensor(1.0)).device.type == "cuda"
    assert device.waits.total() == before


# -- runs ------------------------------------------------------------------------------------------


def make_plans(steps: int) -> dict[str, Plan]:
    keys = [0, 1, *range(3, steps, 3)]
    whole = Plan.between(keys, cut="head", steps=steps, how="forecast")
    mixes = {
        key: Mix(0.1, (0.0,) * place + (0.9,), (0.0,) * place + (0.2,))
        for place, key in enumerate(keys)
        if place
    }
    return {
        "full": Plan.full(steps),
        "reuse": Plan.every(2, cut="up0.l0", steps=steps),
        "parts": Plan.every(2, cut="*.attn", steps=steps, how="residual"),
        "corrected": whole.correct(dict.fromkeys(keys[2:], (0.4, 0.2))),
        "mixed": whole.mix(mixes),
        "guidance": Plan.full(steps).guide("inherit", at=range(2, steps, 2)),
        "gate": Plan.full(steps).inherit("*.ca", at=range(2, steps)),
        "gri": Plan.full(steps).attend("*.sa", by="gri", at=range(1, steps, 2)),
        "nets": Plan.full(steps).switch("small", at=range(2, steps)),
    }


ONCE_A_RUN = {"clock.read_schedule": 1, "finite.read": 1}
"""Its time steps when it begins, and whether all it gave are numbers when it is over."""
HALVES = {"guidance.has_two_halves": 1}
"""Plans that tell the lanes apart see once that the batch is twice the same."""


@pytest.mark.parametrize("name", list(make_plans(SHORT)))
def test_no_step_of_a_run_reads_a_value(name: str, device: Accelerator) -> None:
    """And gives what it gives on the CPU, bit for bit."""
    plan, pipe, small = make_plans(SHORT)[name], make_pipe(), shallow_unet(1)
    expected = draw(pipe, SHORT, plan, **_give(name, small))
    pipe.to("cuda")
    made: list[torch.Tensor] = []
    options = _give(name, small.to("cuda"))
    seen = count_own(device, lambda: made.append(draw(pipe, SHORT, plan, **options)))
    # When two nets are given, they are compared once.
    seen = {place: count for place, count in seen.items() if not place.startswith("nets.")}
    assert seen == ONCE_A_RUN | (HALVES if name in ("guidance", "mixed") else {})
    assert torch.equal(made[0], expected)


def _give(name: str, small: Any) -> dict[str, Any]:
    return {"nets": {"small": small}} if name == "nets" else {}


def test_a_guarded_run_waits_once_for_each_step_that_inherits(device: Accelerator) -> None:
    pipe = make_pipe().to("cuda")
    plan = Plan.every(2, cut="up0.l0", steps=SHORT).guard("stem", threshold=1e9)
    seen = count_own(device, lambda: draw(pipe, SHORT, plan))
    assert seen == ONCE_A_RUN | HALVES | {"adaptive._observe": SHORT // 2}


@pytest.mark.parametrize("steps", [SHORT, LONG])
def test_a_loop_of_ones_own_reads_its_time_steps_once(steps: int, device: Accelerator) -> None:
    """Its time steps lie in one tensor on the device."""
    unet, scheduler = shallow_unet().to("cuda"), tiny_scheduler()
    scheduler.set_timesteps(steps, device="cuda")
    text = torch.zeros(1, 7, 32, device="cuda")
    latents = torch.zeros(1, 4, 8, 8, device="cuda")

    runs: list[Any] = []

    def loop() -> None:
        plan = Plan.every(2, cut="up0.l0", steps=steps)
        with torch.no_grad(), leansd.inherit(unet, plan) as run:
            for moment in scheduler.timesteps:
                unet(latents, moment, text)
        runs.append(run)

    assert count_own(device, loop) == {"clock.read": 1, "finite.read": 1}
    assert runs[0].report().inherited > 0


@pytest.mark.parametrize(
    ("renew", "inherits"), [(torch.clone, True), (lambda text: text + 1.0, False)]
)
def test_conditions_made_anew_at_every_step_are_compared_there(
    renew: Any, inherits: bool, device: Accelerator
) -> None:
    """Equal copies count as the same, as on the CPU; each time that costs a wait."""
    pipe = make_pipe().to("cuda")

    def exchange(_: Any, index: int, moment: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": renew(tensors["prompt_embeds"])}

    with leansd.inherit(pipe, Plan.every(2, cut="up0.l0", steps=SHORT)) as run:
        seen = count_own(
            device,
            lambda: pipe(
                "a", num_inference_steps=SHORT, output_type="latent",
                callback_on_step_end=exchange, callback_on_step_end_tensor_inputs=["prompt_embeds"],
            ),
        )  # fmt: skip
    assert seen == ONCE_A_RUN | {"watch._are_same": SHORT - 1}
    assert (run.report().inherited > 0) == inherits


def test_a_pipeline_that_goes_there_and_back_follows_its_plan(
    device: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moved between runs, and offloaded within them."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    plan, pipe = make_plans(SHORT)["reuse"], make_pipe()
    expected = draw(pipe, SHORT, plan)
    with leansd.inherit(pipe, plan) as run:
        for move in (
            lambda: pipe.to("cuda"),
            lambda: pipe.to("cpu"),
            lambda: pipe.enable_model_cpu_offload(device="cuda"),
        ):
            move()
            assert torch.equal(draw(pipe, SHORT), expected)
            assert run.report().inherited > 0


def offload_models(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cuda")


def offload_sequentially(pipe: Any) -> None:
    pipe.enable_sequential_cpu_offload(device="cuda")


def offload_blocks(pipe: Any) -> None:
    pipe.enable_group_offload(
        torch.device("cuda"), offload_type="block_level", num_blocks_per_group=1
    )


def offload_leaves(pipe: Any) -> None:
    pipe.enable_group_offload(torch.device("cuda"), offload_type="leaf_level")


def offload_ahead(pipe: Any) -> None:
    """The next leaf is on its way while one is at work, in a stream of its own."""
    pipe.enable_group_offload(torch.device("cuda"), offload_type="leaf_level", use_stream=True)


OFFLOADS = (offload_models, offload_sequentially, offload_blocks, offload_leaves, offload_ahead)


@pytest.mark.parametrize(
    ("offload", "name"),
    [
        *((offload, "parts") for offload in OFFLOADS),
        *(
            (offload, name)
            for offload in (offload_sequentially, offload_ahead)
            for name in ("corrected", "guidance")
        ),
    ],
)
def test_what_lies_elsewhere_until_it_is_needed_follows_the_plan(
    offload: Callable[[Any], None],
    name: str,
    device: Accelerator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With no wait of its own but the two of any run; who offloads waits for what it moves."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    plan, pipe = make_plans(SHORT)[name], make_pipe()
    plain, expected = draw(pipe, SHORT), draw(pipe, SHORT, plan)
    offload(pipe)
    made: list[torch.Tensor] = []
    with leansd.inherit(pipe, plan) as run:
        for _ in range(2):
            seen = count_own(device, lambda: made.append(draw(pipe, SHORT)))
            assert seen == ONCE_A_RUN | (HALVES if name == "guidance" else {})
            report = run.report()
            assert report.full_calls < report.calls == SHORT
            assert (report.forced, report.uncounted) == ({}, "")
    assert all(torch.equal(each, expected) for each in made)
    assert torch.equal(draw(pipe, SHORT), plain)


# -- what is measured, fitted and cut --------------------------------------------------------------


def test_a_profile_reads_no_more_than_a_run(device: Accelerator) -> None:
    """Time steps once for its probing run, and once for what is compiled of it afterwards."""
    pipe = make_pipe().to("cuda")
    cost = profile(pipe, repeats=1)
    once = device.waits.copy()
    profile(pipe, repeats=1)
    assert cost.units["mid.l0.attn"]["whole"] > 0
    own = {place for place in once if place.startswith("leansd ")}
    assert own == {f"leansd {place}" for place in ONCE_A_RUN | HALVES}
    assert device.waits["leansd clock.read_schedule"] <= 2 * 2


def test_a_tuning_reads_what_a_run_came_to(
    device: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents and pictures of every run; in a fit of corrections, each corrected step once."""
    runs: list[int] = []

    def count_run(pipe: Any, calls: Any, *args: Any, **kwargs: Any) -> Any:
        runs.append(len(calls))
        return run_calls(pipe, calls, *args, **kwargs)

    monkeypatch.setattr("leansd.tuning.host.run_calls", count_run)
    pipe = make_pipe().to("cuda")
    cost = make_cost(leansd.dissect(pipe.unet))
    settings = {"guidance_scale": 3.0, "width": 32, "height": 32}
    seen = count_own(
        device,
        lambda: tune(
            pipe, ["a", "b", "c", "d"], steps=SHORT, settings=settings, cost=cost,
            speeds=(1.5,), grids=(1.0,), tries=0, batch=1,
        ),
    )  # fmt: skip
    drawn = sum(runs)
    assert seen.pop("runs._run_together") == 2 * drawn
    assert seen.pop("clock.read_schedule") <= 2 * drawn
    assert seen.pop("guidance.has_two_halves", 0) <= drawn
    assert seen.pop("finite.read") <= drawn
    assert seen.pop("trials.steer") <= SHORT * drawn
    seen.pop("reading.encode_tensor")  # the weights, once
    full = {"error_model._square", "error_model.stack_outputs", "space.measure_deviation"}
    assert set(seen) <= full, seen
    assert seen["error_model._square"] == 2 * 4 * 3  # of 3 calls, at 4 places
    assert seen["error_model.stack_outputs"] <= 4


def make_fit(pipe: Any, pictures: int) -> MixFit:
    starts, _ = record_starts(
        pipe, CallSet("abcd", seed=0, batch=4, settings={"guidance_scale": 3}), SHORT
    )
    plan = Plan.between([0, 1, 3], cut="head", steps=SHORT, how="forecast")
    here = PlanMap.of(plan, read_sampler(pipe.scheduler, SHORT), leansd.dissect(pipe.unet))
    config = MixConfig(batch=4, rate=0.05, iterations=3)
    spending = Spending(pictures, recomputes=True, by_block=False, bytes=0)
    return MixFit(pipe.unet, here, starts, config=config, spending=spending)


@pytest.mark.parametrize("pictures", [1, 4])
def test_a_fit_of_mixes_waits_once_an_iteration(pictures: int, device: Accelerator) -> None:
    """However many pictures go through at once; and it is the fit that the CPU makes."""
    pipe = make_pipe()
    expected = make_fit(pipe, pictures).run()
    fit = make_fit(pipe.to("cuda"), pictures)
    fit.measure_spans()
    waits: list[int] = []
    before = device.waits.total()

    def watch(state: FitState, error: float) -> None:
        waits.append(device.waits.total())

    made = fit.run(watch=watch)
    assert [late - early for early, late in zip([before, *waits], waits, strict=False)] == [1, 1, 1]
    for ours, theirs in zip(made.rows, expected.rows, strict=True):
        assert (ours.mix is None) == (theirs.mix is None)
        if ours.mix is not None and theirs.mix is not None:
            assert ours.mix.guided == pytest.approx(theirs.mix.guided, abs=1e-3)


def test_drift_is_read_when_the_runs_are_over(device: Accelerator) -> None:
    pipe = make_pipe().to("cuda")
    seen = count_own(device, lambda: measure_drift(pipe, CallSet(["a"]), steps=SHORT))
    assert seen["drift.read_sums"] == 1
    assert seen.keys() <= {"drift.read_sums", "runs._run_together", *ONCE_A_RUN}


def test_a_cut_is_read_once_for_each_net_tried(device: Accelerator) -> None:
    pipe = make_pipe().to("cuda")
    tried: list[str] = []
    seen = count_own(
        device,
        lambda: cut(
            pipe, ["a"], budget=0.9, of="macs", steps=SHORT, moments=3, tries=2,
            tell=lambda text, share: tried.append(text),
        ),
    )  # fmt: skip
    assert 0 < seen["cutting.measure_error"] <= len(tried) + 2


# -- training --------------------------------------------------------------------------------------

LOSSES = {
    "denoising": {}, "output": {}, "features": {}, "normalised-features": {}, "guided": {},
    "mid": {}, "vgg": {"options": {"weights": "random"}},
}  # fmt: skip
STAGE = {
    "name": "light",
    "mode": "decoupled",
    "surgery": {"name": "light", "edits": [{"drop": ["dn0.l1", "up0.l1"]}]},
    "train": "*",
    "losses": LOSSES,
    "steps": 3,
}
KEPT = {"safetensors torch._to_ndarray": 10}
"""What the teacher made of a batch, written to disk, tensor by tensor."""
TRAININGS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, int]]] = {
    "decoupled": ({}, {}, {}),
    "accumulated": ({"accumulate": 2}, {"mode": "end-to-end"}, {}),
    "cached": ({}, {"cached": 1}, KEPT),
    "recomputed, bf16": ({"gradient_checkpointing": True, "precision": "bf16"}, {}, {}),
}


@pytest.fixture
def accelerate_there(device: Accelerator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator]:
    """The device, which Accelerate takes for its own; as if all that goes there were large."""
    monkeypatch.setattr("accelerator.SMALL", 0)
    monkeypatch.setattr(PartialState, "default_device", property(lambda _: OnDevice.device))
    _forget_state()
    yield device
    _forget_state()


def _forget_state() -> None:
    AcceleratorState._reset_state()
    PartialState._reset_state()


@pytest.mark.parametrize("name", list(TRAININGS))
def test_a_step_of_training_waits_once(
    name: str, accelerate_there: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all its losses and its norm together; moving averages, and data on their way, never."""
    settings, changes, first = TRAININGS[name]
    steps: list[Counter[str]] = []
    own = StageTrainer.take_step

    def watch(self: StageTrainer, *args: Any) -> Any:
        before = accelerate_there.waits.copy()
        taken = own(self, *args)
        steps.append(accelerate_there.waits - before)
        return taken

    monkeypatch.setattr(StageTrainer, "take_step", watch)
    recipe = Recipe.model_validate({
        "name": "light",
        "data": {"kind": "random", "prompts": ["a", "b"], "paired": True},
        "trainer": {"batch": 2, "ema": 0.9} | settings,
        "stages": [STAGE | changes],
    })  # fmt: skip
    pipe = make_pipe(shallow_unet(layers_per_block=2)).to("cuda")
    incubate(recipe, tmp_path / "run", pipe=pipe)
    once = {"leansd trainer.take_step": 1}
    assert steps == [Counter(once | first), Counter(once), Counter(once)]
    assert pipe.unet.device == OnDevice.device  # as it was
