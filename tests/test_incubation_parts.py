"""Incubation's parts: recipes, noise, losses, averages, projections."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from leansd.errors import LeansdError
from leansd.incubation.data.batches import Batch
from leansd.incubation.losses import LOSSES, LossContext, StepOutputs, build_loss
from leansd.incubation.noise import DiffusionSchedule, draw_noise
from leansd.incubation.recipe import BUNDLED, load_recipe
from leansd.incubation.training_state import Ema, read_peak
from leansd.incubation.vgg import Vgg, fit_projection, load_vgg, project_latents
from leansd.plans.presets import PRESETS, Preset, preset
from leansd.surgery.apply import operate
from leansd.surgery.lineage import Origin, Pair
from tiny import shallow_unet, tiny_scheduler

SHARED = """
data: {kind: random, prompts: [a]}
trainer: {batch: 4, ema: 0.9}
stages: [{name: light, surgery: bk-base, train: '*', steps: 10}]
"""


# -- recipes -----------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_a_recipe_is_a_difference_to_its_base(write: Any) -> None:
    write("shared.yaml", SHARED)
    recipe = load_recipe(
        write("mine.yaml", "base: shared.yaml\ntrainer: {batch: 8}\n"),
        ["stages.light.steps=20", "seed=3"],
    )
    assert (recipe.name, recipe.seed) == ("mine", 3)
    assert (recipe.trainer.batch, recipe.trainer.ema) == (8, 0.9)
    assert recipe.stages[0].steps == 20


def test_a_difference_may_change_stages_by_their_names(write: Any) -> None:
    before = load_recipe(write("shared.yaml", SHARED))
    write("mine.surgery.yaml", "name: mine\nedits: [{drop: [mid]}]\n")
    recipe = load_recipe(
        write("mine.yaml", "base: shared.yaml\nstages: {light: {surgery: mine.surgery.yaml}}\n")
    )
    (stage,) = recipe.stages
    assert stage.surgery is not None
    assert stage.surgery.name == "mine"
    assert stage.steps == before.stages[0].steps
    with pytest.raises(LeansdError, match="stages: the base has no dark to change; it has light"):
        load_recipe(write("dark.yaml", "base: shared.yaml\nstages: {dark: {steps: 1}}\n"))


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ("trainer.bach=4", "trainer.bach"),
        ("stages.light.step=4", "stages.0.step"),
        ("stages.light.losses.outptu={}", "stages.0: no loss.*did you mean output"),
        ("stages.dark.steps=4", "there is no dark"),
        ("stages.light.nets={original: dark}", "wants net 'dark'"),
        ("stages.light.losses.vgg.options={wieghts: random}", "did you mean weights"),
        ("stages.light.losses.mid.options={at: mid}", "loss mid has no option 'at'; it has none"),
        ("trainer", "give key=value"),
        ("=4", "give key=value"),
        ("stages.foo=1", "there is no foo, but light, 0"),
        ("stages.9=1", "there is no 9"),
        ("stages.-1.steps=1", "there is no -1"),
        ("stages.light.steps.more=1", "no place in the recipe"),
        ("trainer.batch=[", "is no YAML value"),
        ("seed=2020-99-99", "is no YAML value"),
        ("trainer.batch={a: 1}", "trainer.batch"),
        ("stages=3", "stages"),
    ],
)
def test_what_is_no_key_is_refused_by_its_place(write: Any, change: str, place: str) -> None:
    with pytest.raises(LeansdError, match=place):
        load_recipe(write("mine.yaml", SHARED), [change])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: 3", "base is the name of a file"),
        ("stages: 3\ndata: {kind: random}", "stages"),
        ("stages: [3]\ndata: {kind: random}", "stages.0"),
        ("seed: 2020-99-99", "not YAML"),
        ("[", "not YAML"),
        ("a", "holds no keys"),
    ],
)
def test_what_is_no_recipe_is_a_sentence(write: Any, text: str, said: str) -> None:
    with pytest.raises(LeansdError, match=said) as told:
        load_recipe(write("mine.yaml", text))
    assert "\n" not in str(told.value)


FINGERPRINTS = {
    "emoji-asdm": "3172dcec2b6e",
    "emoji-bk": "0106fe72f3fd",
    "emoji-lean": "7bd519933eb7",
    "emoji-leaner": "05555c5b6a28",
    "emoji-leanest": "6895931aa739",
    "sd15-asdm": "ca5988d70644",
    "sd15-bk": "385a67c9f566",
    "sd15-lean": "f3216f27c55e",
    "smoke": "d7ce60fc45c5",
}
"""A run whose recipe has another is another run: resuming refuses it."""


def test_the_recipes_that_come_along_are_valid_and_their_fingerprints_stay() -> None:
    recipes = [load_recipe(path) for path in sorted(BUNDLED.glob("*.yaml")) if not is_base(path)]
    assert {recipe.name: recipe.fingerprint for recipe in recipes} == FINGERPRINTS


def is_base(path: Path) -> bool:
    return path.stem.endswith("base")


def test_a_base_that_leads_back_is_refused(write: Any) -> None:
    with pytest.raises(LeansdError, match="leads back to itself"):
        load_recipe(write("loop.yaml", "base: loop.yaml"))


def test_only_what_decides_the_result_is_in_the_fingerprint(write: Any) -> None:
    path = write("mine.yaml", SHARED)
    plain = load_recipe(path).fingerprint
    assert load_recipe(path, ["trainer.checkpoint_every=7"]).fingerprint == plain
    assert load_recipe(path, ["trainer.batch=7"]).fingerprint != plain


def test_a_recipe_as_it_is_written_is_the_same(write: Any) -> None:
    recipe = load_recipe(write("mine.yaml", SHARED))
    assert load_recipe(write("copy.yaml", recipe.write())).fingerprint == recipe.fingerprint


# -- noise -------------------------------------------------------------------------------------


def draw(numbers: range) -> Any:
    return draw_noise(0, numbers, (4, 2, 2), strata=4, timesteps=1000)


def test_a_sample_has_its_noise_whoever_draws_it() -> None:
    whole, halves = draw(range(4, 8)), [draw(range(4, 6)), draw(range(6, 8))]
    assert torch.equal(whole.noise, torch.cat([half.noise for half in halves]))
    assert torch.equal(whole.timesteps, torch.cat([half.timesteps for half in halves]))
    assert (whole.timesteps // 250).tolist() == [0, 1, 2, 3]
    assert not torch.equal(whole.noise, draw(range(8, 12)).noise)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_target_means_the_clean_latents(prediction: str) -> None:
    scheduler = tiny_scheduler()
    scheduler.register_to_config(prediction_type=prediction)
    schedule = DiffusionSchedule.read(scheduler)
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 3, 4, 2, 2)
    timesteps = torch.tensor([0, 300, 700])
    noised = schedule.add_noise(clean, noise, timesteps)
    assert torch.allclose(noised, scheduler.add_noise(clean, noise, timesteps), atol=1e-6)
    target = schedule.make_target(clean, noise, timesteps)
    if prediction == "v_prediction":
        assert torch.allclose(target, scheduler.get_velocity(clean, noise, timesteps), atol=1e-6)
    assert torch.allclose(schedule.predict_clean(noised, target, timesteps), clean, atol=1e-4)


# -- losses ------------------------------------------------------------------------------------


def make_outcome(**changes: Any) -> StepOutputs:
    torch.manual_seed(0)
    noised, target, student, teacher = torch.randn(4, 2, 4, 8, 8)
    features = {"dn0.down": torch.randn(2, 8, 4, 4), "mid.l1.res": torch.randn(2, 8, 2, 2)}
    parts: dict[str, Any] = {
        "batch": Batch(noised, torch.zeros(2, 3, 4)),
        "schedule": DiffusionSchedule.read(tiny_scheduler()),
        "timesteps": torch.tensor([100, 800]),
        "noised": noised,
        "target": target,
        "student": student,
        "teacher": teacher,
        "student_features": {at: each + 1 for at, each in features.items()},
        "teacher_features": features,
    }
    return StepOutputs(**(parts | changes))


def make_setting(**changes: Any) -> LossContext:
    ends = ("dn0.down", "mid.l1.res")
    lineage: Any = SimpleNamespace(
        units=("dn0.l0.res", *ends), stands_for=lambda at: Origin("teacher", at)
    )
    return LossContext(lineage, tuple(Pair(at, Origin("teacher", at)) for at in ends), **changes)


def test_losses_are_what_they_say() -> None:
    outcome, setting = make_outcome(), make_setting()
    losses = {name: build_loss(name, {}, setting) for name in ("denoising", "output", "features")}
    assert losses["denoising"](outcome) == F.mse_loss(outcome.student, outcome.target)
    assert losses["output"](outcome) == F.mse_loss(outcome.student, outcome.teacher)
    assert losses["features"](outcome) == pytest.approx(1, rel=1e-5)  # the middle left out
    both = build_loss("features", {"at": "*"}, setting)
    assert both(outcome) == pytest.approx(2, rel=1e-5)
    assert build_loss("mid", {}, setting)(outcome) == pytest.approx(1, rel=1e-5)


def test_normalised_features_do_not_depend_on_scale() -> None:
    loss = build_loss("normalised-features", {}, make_setting())
    outcome = make_outcome()
    louder = make_outcome(
        student_features={at: 8 * each for at, each in outcome.student_features.items()},
        teacher_features={at: 8 * each for at, each in outcome.teacher_features.items()},
    )
    assert torch.allclose(loss(outcome), loss(louder))


def test_losses_are_float32_and_the_mean_of_their_samples() -> None:
    pytest.importorskip("torchvision")
    setting = make_setting(projection=torch.randn(5, 3))
    outcome = make_outcome()
    for name in ("denoising", "output", "features", "normalised-features", "mid", "vgg"):
        options = {"weights": "random"} if name == "vgg" else {}
        loss = build_loss(name, options, setting)
        value = loss(outcome)
        assert value.dtype == torch.float32
        assert value.ndim == 0
        halves = [loss(pick_sample(outcome, row)) for row in (0, 1)]
        assert torch.allclose(value, torch.stack(halves).mean(), rtol=1e-4), name


def pick_sample(outcome: StepOutputs, row: int) -> StepOutputs:
    rows = slice(row, row + 1)
    names = ("timesteps", "noised", "target", "student", "teacher")
    tensors = {name: getattr(outcome, name)[rows] for name in names}
    for name in ("student_features", "teacher_features"):
        tensors[name] = {at: each[rows] for at, each in getattr(outcome, name).items()}
    return make_outcome(**tensors)


def test_a_loss_that_cannot_be_had_says_why() -> None:
    with pytest.raises(LeansdError, match="did you mean output"):
        build_loss("outputs", {}, make_setting())
    with pytest.raises(LeansdError, match=r"loss features has no option 'ta' .there are at"):
        build_loss("features", {"ta": "*"}, make_setting())
    with pytest.raises(LeansdError, match="loss features: at"):
        build_loss("features", {"at": 5}, make_setting())
    with pytest.raises(LeansdError, match="loss vgg: stages"):
        build_loss("vgg", {"stages": "all"}, make_setting(projection=torch.zeros(5, 3)))
    with pytest.raises(LeansdError, match="no projection"):
        build_loss("vgg", {"weights": "random"}, make_setting())


def break_loss(patch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def build(context: LossContext, at: str = "") -> Any:
        raise TypeError("build() got something odd")

    patch.setitem(LOSSES, "broken", build)  # pyright: ignore[reportArgumentType]
    return lambda **options: build_loss("broken", options, make_setting())


def break_preset(patch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def build(steps: int, blocks: int, at: str = "") -> Any:
        raise TypeError("build() got something odd")

    patch.setitem(PRESETS, "broken", Preset("broken", "", build))
    return lambda **options: preset("broken", **options)


@pytest.mark.parametrize("break_one", [break_loss, break_preset])
def test_an_error_inside_a_builder_is_not_the_users_option(
    break_one: Callable[[pytest.MonkeyPatch], Callable[..., Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = break_one(monkeypatch)
    with pytest.raises(TypeError, match="something odd"):
        build(at="mid")
    with pytest.raises(LeansdError, match=r"broken has no option 'ta' .there are at"):
        build(ta="mid")


def test_vgg_counts_what_noise_hides_less() -> None:
    pytest.importorskip("torchvision")
    loss = build_loss("vgg", {"weights": "random"}, make_setting(projection=torch.randn(5, 3)))
    outcome = make_outcome()
    assert loss(make_outcome(student=outcome.teacher)) == 0
    student = outcome.student.clone().requires_grad_()
    loss(make_outcome(student=student)).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


# -- pictures ----------------------------------------------------------------------------------


def test_a_projection_finds_the_colours() -> None:
    torch.manual_seed(0)
    latents, wanted = torch.randn(3, 4, 6, 6), torch.randn(5, 3)
    pictures = project_latents(wanted, latents).repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert torch.allclose(fit_projection(latents, pictures), wanted, atol=1e-5)


def test_a_vgg_of_any_width_comes_from_its_file(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    whole = Vgg((4, 8, 8, 16, 16)).eval()
    save_file(whole.state_dict(), tmp_path / "vgg.safetensors")
    part = load_vgg(tmp_path / "vgg.safetensors", stages=3)
    pictures = torch.randn(1, 3, 16, 16)
    for one, other in zip(part(pictures), whole(pictures), strict=False):
        assert torch.equal(one, other)
    assert len(part(pictures)) == 3
    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "none.safetensors")
    with pytest.raises(LeansdError, match="no VGG16"):
        load_vgg(tmp_path / "none.safetensors")


# -- averages ----------------------------------------------------------------------------------


def test_an_average_is_of_what_trains_by_name() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].requires_grad_(False)
    average = Ema(net, 0.5)
    first = net[1].weight.detach().clone()
    with torch.no_grad():
        net[1].weight.add_(1)
    average.update(net)
    assert set(average.tensors) == {"1.weight", "1.bias"}
    assert torch.allclose(average.tensors["1.weight"], first + 9 / 11)  # young: decay 2 / 11
    with average.applied(net):
        assert torch.equal(net[1].weight, average.tensors["1.weight"])
    assert torch.allclose(net[1].weight, first + 1)
    with pytest.raises(LeansdError, match="another net's"):
        average.load({"2.weight": first}, 1)


def test_a_unit_stands_for_what_was_dropped_after_it() -> None:
    from leansd.surgery.edits import Surgery

    unet = shallow_unet(layers_per_block=2)
    _, lineage = operate(unet, Surgery("light").drop("dn0.l1", "up0.l1"))
    assert lineage.stands_for("dn0.l0.res").at == "dn0.l1.res"
    assert lineage.stands_for("up0.l1.res").at == "up0.l2.res"
    with pytest.raises(LeansdError, match="dn9"):
        lineage.stands_for("dn9")


def test_the_memory_of_a_gpu_is_on_record(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    assert read_peak(torch.device("cuda", 0)) == {"peak_gib": 3.0}
    assert asked == [torch.device("cuda", 0)]  # every line has a peak of its own
    assert read_peak(torch.device("cpu")) == {}
