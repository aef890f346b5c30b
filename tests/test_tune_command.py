"""`leansd tune`, and what the other commands do with the plans that it writes."""

import json
from dataclasses import replace

import pytest
from PIL import Image

import leansd
from conformance.models import small_unet
from leansd.anatomy.reading import fingerprint_module
from leansd.cli import main
from leansd.evaluation.records import load_records
from leansd.plans.plan import Tuned
from leansd.tuning import Front, Point, error_model, tuner
from pages import read_page
from tiny import tiny_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline(unet=small_unet()).save_pretrained(path)
    return str(path)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a boat\na tree\na cat\na house\n")
    return path


@pytest.fixture
def fails(capsys):
    def call(*arguments):
        assert main([str(argument) for argument in arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("leansd: ")
        assert printed.err.count("\n") == 1
        return printed.err

    return call


@pytest.mark.slow
def test_tune_writes_plan_front_report_and_drift(model, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tuner, "GRIDS", (1.0,))
    monkeypatch.setattr(error_model, "PROBES", (0.5,))
    out, drift = tmp_path / "new" / "plan.json", tmp_path / "drift.jsonl"
    arguments = [
        "tune", model, "--prompts", prompts, "--steps", 6, "--speeds", "1.5", "--psnr", 1,
        "--tries", 0, "--sampler", "euler", "--guidance", 3, "-o", out, "--drift", drift, "--json",
    ]  # fmt: skip
    assert main([str(each) for each in arguments]) == 0
    printed = capsys.readouterr().out
    *table, last = printed.strip().splitlines()
    facts = json.loads(last)
    assert all(len(line.rstrip()) <= 80 for line in table if not line.startswith("wrote"))
    front = Front.load(out.with_suffix(".front.json"))
    plan = leansd.Plan.load(out)
    assert facts["fingerprint"] == plan.fingerprint == front.at(psnr=1).fingerprint
    assert (facts["sampler"], facts["guidance"]) == ("euler", 3.0)
    assert facts["fewer_steps_win"] == ("fewer steps alone win" in printed)
    assert facts["fewer_steps_win"] == (plan.tuned is None)
    assert {each.metric for each in load_records(drift)} == {
        "unit_drift",
        "cut_error",
        "guidance_drift",
    }
    _, page = read_page(out.with_suffix(".html"))
    for title in ("Speed against fidelity", "The chosen plan", "Drift of every unit"):
        assert title in page
    assert out.with_suffix(".journal.jsonl").exists()


def test_tune_tells_what_is_wrong_before_it_runs(fails, model, prompts, tmp_path):
    few = tmp_path / "few.txt"
    few.write_text("a boat\na tree\n")
    shared = ["tune", model, "-o", tmp_path / "plan.json"]
    given = [*shared, "--prompts", prompts]
    assert "2 prompts: give at least 8" in fails(
        *shared, "--prompts", few, "--count", 4, "--calls", 30
    )
    assert "5 calls are too few to fit" in fails(*given, "--calls", 5)
    assert "2 calls are too few" in fails(*shared, "--prompts", few)
    assert "one goal" in fails(*given, "--speedup", 2, "--ms", 100)
    assert "positive" in fails(*given, "--ms", -1)
    assert "no gain" in fails(*given, "--speedup", 0.5)
    assert "are no speed-ups" in fails(*given, "--speeds", "2,x")
    assert "draws noise at every step" in fails(*given, "--sampler", "euler-a")
    assert "more than once" in fails(*given, "--sampler", "heun")
    assert "no sampler" in fails(*given, "--sampler", "eulr")
    assert not (tmp_path / "plan.json").exists()


@pytest.fixture(scope="module")
def tuned(model, tmp_path_factory):
    """A plan as `leansd tune` would write it for the model with Euler, and a front of it."""
    folder = tmp_path_factory.mktemp("tuned")
    pipe = leansd.load(model, device="cpu")
    subject = fingerprint_module(pipe.unet)
    plan = leansd.Plan.between([0, 1, 3], cut="head", steps=4, how="forecast", name="tuned 1.3x")
    plan = replace(plan, tuned=Tuned("euler", subject, 3.0))
    plan.save(folder / "plan.json")
    front = Front.of(subject, "euler", 6, [Point(plan, 1.3, 10.0, 30.0)])
    front.save(folder / "front.json")
    return folder


def draw(model, folder, *options):
    arguments = ["generate", "a", "--model", model, "--plan", folder / "plan.json", "--json"]
    return [*arguments, "--out", folder / "out", *options]


def test_a_tuned_plan_is_used_where_it_was_tuned_for(model, tuned, capsys):
    options = draw(model, tuned, "--sampler", "euler", "--guidance", 3)
    assert main([str(each) for each in options]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1])["pictures"][0]["plan"] == "tuned 1.3x"
    assert "was tuned" not in printed.err


def test_a_tuned_plan_is_refused_elsewhere_without_force(model, tuned, fails, capsys, tmp_path):
    said = fails(*draw(model, tuned))
    assert "was tuned for sampler euler, not ddim" in said
    assert "--force" in said
    said = fails(
        "evaluate", model, "--plan", tuned / "plan.json", "--steps", 4, "--out", tmp_path / "e",
        "--prompts", make_prompts(tmp_path), "--count", 2,
    )  # fmt: skip
    assert "was tuned for sampler euler, not ddim" in said
    other = tmp_path / "other"
    tiny_pipeline(unet=small_unet(seed=1)).save_pretrained(other)
    assert "other weights" in fails(*draw(str(other), tuned, "--sampler", "euler"))
    assert main([str(each) for each in draw(model, tuned, "--force", "--guidance", 5)]) == 0
    told = capsys.readouterr().err
    assert "not ddim" in told
    assert "at guidance 3, not 5" in told


def make_prompts(folder):
    path = folder / "two.txt"
    path.write_text("a boat\na tree\n")
    return path


def test_generate_takes_a_plan_from_a_front(model, tuned, fails, capsys):
    shared = ["generate", "a", "--model", model, "--out", tuned / "out", "--sampler", "euler"]
    shared += ["--plan", tuned / "front.json", "--guidance", 3, "--json"]
    assert main([str(each) for each in (*shared, "--speedup", 1.2)]) == 0
    picture = json.loads(capsys.readouterr().out.splitlines()[-1])["pictures"][0]
    assert (picture["plan"], picture["steps"]) == ("tuned 1.3x", 4)
    assert "fastest is 1.30x" in fails(*shared, "--speedup", 3)
    assert "leave --steps out" in fails(*shared, "--speedup", 1.2, "--steps", 6)


def test_tune_starts_from_pictures(model, prompts, tmp_path, monkeypatch, fails):
    """Image-to-image: the calls hold a picture each, in turns, and the share of the steps."""
    for name in ("red", "blue"):
        Image.new("RGB", (50, 40), name).save(tmp_path / f"{name}.png")
    asked = {}

    class Enough(Exception):
        pass

    def keep(pipe, calls, **options):
        asked.update(options, calls=calls, kind=type(pipe).__name__)
        raise Enough

    monkeypatch.setattr(tuner, "tune", keep)
    shared = ["tune", model, "--prompts", prompts, "-o", tmp_path / "plan.json", "--steps", 6]
    assert "leaves no step" in fails(*shared, "--init", tmp_path, "--strength", 0.1)
    assert "no picture at" in fails(*shared, "--init", tmp_path / "none.png")
    with pytest.raises(Enough):
        main([str(each) for each in (*shared, "--init", tmp_path, "--strength", 0.5)])
    assert asked["kind"] == "StableDiffusionImg2ImgPipeline"
    assert asked["settings"]["strength"] == 0.5
    assert [call["prompt"] for call in asked["calls"]] == ["a boat", "a tree", "a cat", "a house"]
    first, second, third, _ = (call["image"] for call in asked["calls"])
    assert first.shape == (1, 3, 32, 32)
    assert not first.equal(second)
    assert first.equal(third)
