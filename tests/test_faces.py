"""The same words mean the same plan wherever they are said: in the API, the commands, the page."""

import json
import warnings
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from PIL import Image

import leansd
from leansd.anatomy import read_anatomy
from leansd.cli import main
from leansd.cli.options import Following
from leansd.evaluation.evaluation import list_cases
from leansd.plans.presets import PRESETS, SPEED_PRESETS
from leansd.plans.resolve import PlanContext, Resolved, resolve_plan
from leansd.runtime.context import describe_runs
from leansd.runtime.samplers import set_sampler
from leansd.shards import read_shard
from leansd.unets import open_anatomy
from tiny import tiny_pipeline, tiny_unet

SAMPLERS = ("ddim", "euler", "dpm++2m", "unipc")
STEPS = (8, 20, 30, 50)
RUNS = list(product(SAMPLERS, STEPS))
ALONE = [name for name in PRESETS if not leansd.preset(name, 20).nets]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pipe(model: Path):
    pipe = leansd.load(model, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def read(pipe):
    return read_anatomy(pipe.unet)


def expect(pipe, name: str, sampler: str, steps: int) -> Resolved:
    """What every face must make of a preset's name."""
    set_sampler(pipe, sampler)
    nets = {} if name in ALONE else {"light": read(pipe)}
    return resolve_plan(
        name, describe_runs(pipe, PlanContext(steps, anatomy=read(pipe), nets=nets))
    )


OPENED = cache(open_anatomy)
"""The same folder is asked of again and again."""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Run a command; gives the object that it ends with, and standard error on one line."""

    def call(*arguments: object) -> tuple[dict, str]:
        assert main([str(each) for each in arguments]) == 0
        printed = capsys.readouterr()
        return json.loads(printed.out.splitlines()[-1]), " ".join(printed.err.split())

    return call


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_names_mean_tuned_plans_where_there_are_some(pipe, sampler: str) -> None:
    for name, steps in product(SPEED_PRESETS, STEPS[1:]):
        found = expect(pipe, name, sampler, steps)
        tuned = leansd.preset(name, steps, sampler=sampler)
        assert found.plan.fingerprint == tuned.fingerprint
        assert len(found.notes) == (sampler == "unipc")
        assert (tuned.tuned is None) == (sampler == "unipc")
        if sampler == "dpm++2m":
            assert leansd.preset(name, steps) == tuned


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_inherit_runs_the_plan_that_names_mean(
    pipe, monkeypatch: pytest.MonkeyPatch, sampler: str, whole: bool
) -> None:
    """Every preset at every step count; quickly, of those that are not tuned one count each."""
    counted = cache(leansd.dissect)(pipe.unet)
    monkeypatch.setattr("leansd.runtime.report.dissect", lambda *_, **__: counted)
    text = torch.zeros(2, 7, pipe.unet.config.cross_attention_dim)
    latents = torch.zeros(2, 4, 4, 4)
    turn = SAMPLERS.index(sampler)
    others = [name for name in PRESETS if name not in SPEED_PRESETS][turn :: len(SAMPLERS)]
    runs = [*product(SPEED_PRESETS, STEPS), *((name, STEPS[turn]) for name in others)]
    runs = list(product(PRESETS, STEPS)) if whole else runs
    for name, steps in runs:
        expected = expect(pipe, name, sampler, steps)
        nets = {} if name in ALONE else {"light": tiny_unet()}
        pipe.scheduler.set_timesteps(steps)
        told: list[warnings.WarningMessage]
        with warnings.catch_warnings(record=True) as told, torch.no_grad():
            warnings.simplefilter("always")
            with leansd.inherit(pipe, name, nets=nets) as following:
                pipe.unet(latents, pipe.scheduler.timesteps[0], text)
        assert following.report().plan.fingerprint == expected.plan.fingerprint, (name, steps)
        assert [str(each.message) for each in told] == list(expected.notes), (name, steps)


@pytest.mark.parametrize(("name", "run_of"), zip([*ALONE, "fast", "turbo"], RUNS, strict=True))
def test_plan_command_shows_the_plan_that_names_mean(
    pipe, model, run, name, run_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leansd.unets.open_anatomy", OPENED)
    expected = expect(pipe, name, *run_of)
    sampler, steps = run_of
    shown, told = run(
        "plan", name, "--model", model, "--steps", steps, "--sampler", sampler, "--json"
    )
    assert shown["fingerprint"] == expected.plan.fingerprint
    assert shown["plan"] == expected.plan.name
    assert all(note in told for note in expected.notes)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_commands_and_evaluate_settle_on_the_plan_that_names_mean(
    pipe, model, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    """What generate, rows, evaluate and plan ask before and after a model is open."""
    monkeypatch.setattr("leansd.unets.open_anatomy", OPENED)
    monkeypatch.setattr("leansd.runtime.context.read_anatomy", lambda _: read(pipe))
    for name, steps in product(PRESETS, STEPS):
        expected = expect(pipe, name, sampler, steps)
        alone = name in ALONE
        fitting = Following(False, False, None if alone else [f"light={model}"])
        outlined, context = fitting.outline(name, str(model), steps=steps, sampler=sampler)
        settled = fitting.settle(name, pipe, context, 7.5)
        found = {outlined.plan.fingerprint, settled.fingerprint}
        if alone:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found.add(list_cases(pipe, [name], steps)[-1].fingerprint)
        assert found == {expected.plan.fingerprint}, (name, steps)
        assert outlined.notes == expected.notes, (name, steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sampler", "steps"),
    [("balanced", "dpm++2m", 9), ("turbo", "euler", 8), ("fast", "unipc", 9)],
)
def test_drawing_commands_carry_the_plan_that_names_mean(
    pipe, model, run, tmp_path, name: str, sampler: str, steps: int
) -> None:
    expected = expect(pipe, name, sampler, steps)
    shared = ("--model", model, "--steps", steps, "--sampler", sampler, "--json", "--device", "cpu")

    drawn, told = run("generate", "a pizza", *shared, "--plan", name, "--out", tmp_path / "drawn")
    (picture,) = drawn["pictures"]
    assert picture["plan_fingerprint"] == expected.plan.fingerprint
    with Image.open(picture["path"]) as image:
        assert image.text["plan_fingerprint"] == expected.plan.fingerprint
    assert all(told.count(note) == 1 for note in expected.notes)

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "a", "prompt": "a pizza"}\n')
    _, told = run(
        "generate", "--prompts", rows, *shared, "--plan", name, "--out", tmp_path / "bulk"
    )
    (job,) = (tmp_path / "bulk").glob("*.json")
    plan = leansd.Plan.from_dict(json.loads(job.read_text())["plan"])
    assert plan.fingerprint == expected.plan.fingerprint
    (shard,) = (tmp_path / "bulk").glob("*.tar")
    (inside,) = read_shard(shard)
    assert inside.facts["plan_fingerprint"] == expected.plan.fingerprint
    assert all(told.count(note) == 1 for note in expected.notes)

    (tmp_path / "prompts.txt").write_text("a pizza\na cat\n")
    measured, told = run(
        "evaluate", *shared[1:], "--plan", name, "--prompts", tmp_path / "prompts.txt",
        "--count", 2, "--reference", "full", "--seeds-for-spread", 0,
        "--out", tmp_path / "measured",
    )  # fmt: skip
    assert expected.plan.fingerprint in {each.get("fingerprint") for each in measured["results"]}
    assert all(told.count(note) == 1 for note in expected.notes)


@pytest.mark.slow
def test_demo_compares_the_plans_that_names_mean(pipe, model, run, tmp_path) -> None:
    expected = {name: expect(pipe, name, "euler", 9) for name in SPEED_PRESETS}
    shown, _ = run(
        "demo", "--model", model, "--steps", 9, "--sampler", "euler", "--prompts", "a pizza",
        "--out", tmp_path, "--json",
    )  # fmt: skip
    found = {each["name"]: each["fingerprint"] for each in shown["plans"]}
    assert {name: found[name] for name in expected} == {
        name: each.plan.fingerprint for name, each in expected.items()
    }


def test_page_means_the_same(pipe, model, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio")
    from leansd.ui.folders import Folders, Settings
    from leansd.ui.studio import Studio

    monkeypatch.setattr("leansd.ui.studio.load", lambda *_, **__: pipe)
    studio = Studio(Folders.open(tmp_path, model.parent), "cpu")
    for name, (sampler, steps) in product(ALONE, RUNS):
        settings = Settings(model="tiny", prompt="a", steps=steps, sampler=sampler)
        expected = expect(pipe, name, sampler, steps)
        found = studio.resolve(name, settings)
        assert found.plan.fingerprint == expected.plan.fingerprint, (name, sampler, steps)
        assert found.notes == expected.notes, (name, sampler, steps)


def test_export_means_the_same(pipe, model, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")
    monkeypatch.setattr("leansd.exporting.exporter.write_onnx", lambda *_: 0.0)
    tmp_path.joinpath("out").mkdir()
    for name, (sampler, steps) in zip(ALONE, RUNS, strict=False):
        expected = expect(pipe, name, sampler, steps)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            exported = leansd.export(
                model, tmp_path / "out", to="onnx", plan=name, steps=steps, sampler=sampler
            )
        assert exported.plan is not None
        assert exported.plan.fingerprint == expected.plan.fingerprint
        assert set(expected.notes) <= {str(each.message) for each in told}


def test_plans_tuned_elsewhere_are_told_and_refused(pipe, model, run, tmp_path, capsys) -> None:
    from leansd.anatomy.reading import fingerprint_module
    from leansd.plans.plan import Tuned

    plan = leansd.Plan.every(2, cut="up2", steps=4)
    own = leansd.Plan(plan.rows, "own", None, Tuned("euler", fingerprint_module(pipe.unet), 5.0))
    other = leansd.Plan(plan.rows, "other", None, Tuned("euler", "another"))
    set_sampler(pipe, "euler")
    assert resolve_plan(own, describe_runs(pipe, PlanContext(4, guidance=5.0))).notes == ()
    assert (
        "tuned at guidance 5, not 3"
        in resolve_plan(own, describe_runs(pipe, PlanContext(guidance=3))).notes[0]
    )
    found = resolve_plan(other, describe_runs(pipe))
    assert "other weights" in found.notes[0]
    with pytest.raises(leansd.LeansdError, match="other weights: tune one"):
        found.require_tuned()
    own.save(tmp_path / "own.json")
    shared = (
        "generate",
        "a",
        "--model",
        model,
        "--plan",
        tmp_path / "own.json",
        "--sampler",
        "ddim",
    )
    assert main([*map(str, shared), "--out", str(tmp_path / "out")]) == 2
    assert "was tuned for sampler euler, not ddim" in capsys.readouterr().err
    _, told = run(*shared, "--out", tmp_path / "out", "--force", "--json")
    assert "was tuned for sampler euler, not ddim" in told
