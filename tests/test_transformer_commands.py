"""Commands on a model whose denoiser is a transformer, from its folder as users have it."""

import functools
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import QwenImagePipeline, ZImagePipeline
from PIL import Image

import leansd
from leansd.cli import main
from leansd.drawing import Request, paint
from leansd.errors import LeansdError
from leansd.evaluation.records import get_field, load_records
from leansd.plans import Plan
from leansd.runtime.samplers import set_sampler
from leansd.ui import fragments
from leansd.ui.folders import OWN_SAMPLER, Folders, Settings
from leansd.ui.job_queue import Job, JobQueue
from leansd.ui.plan_grid import lay_out_grid, turn_key
from leansd.ui.studio import Studio
from tiny_transformers import TEXTS, save_model

STEPS = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 3 without its third text encoder, in a folder."""
    return save_model("sd3", tmp_path_factory.mktemp("models") / "sd3")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command line; gives exit code, standard output and standard error."""

    def call(*words: Any) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def test_generate_draws_by_a_plan_and_says_what_ran(run: Any, model: Path, tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    for plan in ("balanced", "full"):
        code, out, err = run(
            "generate", "a pear", "--model", model, "--plan", plan, "--steps", 12,
            "--out", tmp_path / plan, "--json",
        )  # fmt: skip
        assert code == 0, err
        (found[plan],) = json.loads(out.splitlines()[-1])["pictures"]
        assert ("balanced is not tuned for" in " ".join(err.split())) == (plan == "balanced")
    assert found["full"]["computed"] == 12
    assert found["balanced"]["computed"] + found["balanced"]["inherited"] == 12
    assert found["balanced"]["computed"] < 12
    told = run(
        "generate", "a pear", "--model", model, "--steps", 12, "--out", tmp_path, "--compare"
    )  # fmt: skip
    assert told[0] == 0, told[2]
    assert "a pear" in (tmp_path / "report.html").read_text()
    pictures = [Image.open(each["path"]).tobytes() for each in found.values()]
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize("name", TEXTS)
def test_every_kind_of_transformer_draws_and_its_guidance_reaches_it(
    run: Any, tmp_path: Path, name: str
) -> None:
    """Rows together are drawn as prompts alone; guidance is on without a negative prompt."""
    folder = save_model(name, tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    asked = ({"id": word, "prompt": f"a {word}", "seed": 0} for word in ("pear", "plum"))
    rows.write_text("\n".join(map(json.dumps, asked)))
    shared = ("--model", folder, "--steps", 10, "--size", 64, "--json")
    facts: list[dict[str, Any]] = []
    for guidance in (1, 3, 6):
        code, out, err = run(
            "generate", "a pear", "a plum", "--guidance", guidance, "--plan", "balanced",
            "--out", tmp_path / str(guidance), *shared,
        )  # fmt: skip
        assert code == 0, err
        facts += json.loads(out.splitlines()[-1])["pictures"]
    assert [each["guidance"] for each in facts] == [1, 1, 3, 3, 6, 6]
    assert all(each["computed"] < 10 == each["calls"] for each in facts)
    drawn = [_read_pixels(Path(each["path"]).read_bytes()) for each in facts]
    assert len({each.tobytes() for each in drawn}) == 6
    code, _, err = run(
        "generate", "--prompts", rows, "--guidance", 3, "--plan", "balanced",
        "--out", tmp_path / "shards", *shared,
    )  # fmt: skip
    assert code == 0, err
    with tarfile.open(tmp_path / "shards" / "shard-000000.tar") as shard:
        files = {each.name: shard.extractfile(each).read() for each in shard}
    for own, (name, content) in zip(drawn[2:4], _list_pngs(files), strict=True):
        furthest = int(np.abs(_read_pixels(content) - own).max())
        assert furthest <= 1, name


@pytest.mark.parametrize("name", ["qwen", "z-image"])
def test_the_page_draws_and_tunes_what_has_guidance_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    kind = {"qwen": QwenImagePipeline, "z-image": ZImagePipeline}[name]
    plain = kind.__call__

    @functools.wraps(plain)
    def draw_small(self: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(self, *args, height=64, width=64, **kwargs)

    monkeypatch.setattr(kind, "__call__", draw_small)
    save_model(name, tmp_path / "models" / name)
    studio = Studio(Folders.open(tmp_path / "home", tmp_path / "models"), "cpu")
    known = studio.open(name)
    assert (known.guidance, known.size) == ({"qwen": 4, "z-image": 5}[name], (1024, 1024))
    plan = Plan.full(6).inherit("head", at=[2, 4], how="forecast")
    shown: list[bytes] = []
    for guidance in (1, 4):
        settings = Settings(model=name, prompt="a", steps=6, guidance=guidance)
        drawn, _ = studio.draw(settings, plan, rounds=1, job=Job())
        assert (drawn.numbers.full_calls, drawn.numbers.calls) == (4, 6)
        shown.append(drawn.open_pictures()[0].tobytes())
    assert shown[0] != shown[1]
    front, _ = studio.tune(
        settings, ["a", "b", "c", "d"], speedup=1.01, tries=0, job=Job(),
        on_progress=lambda text, share: None,
    )  # fmt: skip
    assert front.points


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("generate", "a pear", "--plan", "deepcache", "--steps", 12), "is for UNets"),
        (("profile",), "without a UNet2DConditionModel"),
        (("tune", "--calls", 40), "--calls is for UNets"),
        (("tune", "--drift", "drift.jsonl"), "--drift is for UNets"),
        (("generate", "a pear", "--sampler", "ddim"), "choose from flow-euler, flow-heun"),
        (
            ("bench", "--quick", "--sampler", "dpm++2m"),
            "Pipeline predicts a flow",
        ),
    ],
)
def test_what_is_for_unets_is_refused_by_one_sentence(
    run: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: Any, why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.txt").write_text("a pear\n")
    given = ("--model", model) if words[0] in ("generate", "bench") else (model,)
    code, out, err = run(*words, *given)
    assert (code, out) == (2, "")
    *notes, sentence = err.splitlines()
    assert why in sentence
    assert notes in ([], [f"opening {model}"])


def test_what_is_tuned_is_evaluated_and_held_against_rivals(
    run: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a pear\na plum\na quince\na medlar\n")
    shared = ("--prompts", "prompts.txt", "--guidance", 3)
    code, out, err = run(
        "tune", model, "--steps", 8, "--tries", 0, "--speeds", "2", "--psnr", 1,
        "--out", "plan.json", "--json", *shared,
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["sampler"] == "flow-euler"
    assert "The chosen plan" in Path("plan.html").read_text()
    # How fast a call was decides which plan it is.
    assert leansd.Plan.load("plan.json").steps <= 8
    plan = leansd.Plan.full(8, name="own").inherit("head", at=[3, 5, 7], how="forecast")
    plan.save("own.json")

    code, out, err = run(
        "evaluate", model, "--plan", "own.json", "--plan", "full", "--rival", "flow-dpm++2m:4",
        "--steps", 8, "--converged-steps", 12, "--count", 2, "--json", *shared,
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    values = {(each["plan"], each["metric"], each.get("reference")): each["value"]
              for each in found["results"]}  # fmt: skip
    assert values["full plan", "psnr", "full"] > 99
    assert values["own", "predicted_speedup", None] == 8 / 5

    code, out, err = run(
        "bench", "--model", model, "--quick", "--steps", 8, "--plans", "own.json",
        "--converged-steps", 12, "--count", 2, "--out", "bench.jsonl", "--json", *shared,
    )  # fmt: skip
    assert code == 0, err
    (contest,) = json.loads(out.splitlines()[-1])["contests"]
    assert contest["sampler"] == "flow-euler"
    records = load_records(Path("bench.jsonl"))
    families = {each.get("family") for each in map(vars, records)} | {
        get_field(r, "family") for r in records
    }
    assert {"ours", "fewer", "samplers", "spectrum"} <= families
    assert any("is for UNets" in each for each in contest["left_out"])


# -- the page --------------------------------------------------------------------------------------


@pytest.fixture
def studio(model: Path, tmp_path: Path) -> Studio:
    return Studio(Folders.open(tmp_path / "home", model.parent), "cpu")


@pytest.mark.filterwarnings("ignore:plan balanced was tuned for sampler euler")
def test_the_page_draws_by_plans_of_whole_steps(studio: Studio) -> None:
    known = studio.open("sd3")
    assert known.samplers == ("flow-euler", "flow-heun", "flow-dpm++2m", "flow-unipc")
    assert "SD3Transformer2DModel" in fragments.show_anatomy(known)
    choices = studio.list_plans(known)
    assert {"balanced", "full"} <= set(choices)
    assert not {"deepcache", "easycache", "tgate", "guidance-cutoff"} & set(choices)
    for sampler in (OWN_SAMPLER, "flow-unipc"):
        settings = Settings(
            model="sd3", prompt="a", steps=STEPS, guidance=4, sampler=sampler, seed=3
        )
        plan = studio.resolve("balanced", settings).plan
        grid = lay_out_grid(plan, known.anatomy)
        assert [line.at for line in grid.lines] == ["head"]
        drawn, _ = studio.draw(settings, plan, rounds=1, job=Job())
        numbers = drawn.numbers
        assert numbers.full_calls == len(plan.keys) < numbers.calls == STEPS
        assert numbers.predicted == pytest.approx(studio.forecast(plan, known).unet)
        assert "balanced" in fragments.show_forecast(plan, studio.forecast(plan, known))
        assert len(fragments.list_beats(plan, known.anatomy)) == STEPS
    # What the page draws in full is what the pipeline draws.
    full, _ = drawn.open_pictures()
    pipe = leansd.load(studio.folders.find_model("sd3"), device="cpu")
    set_sampler(pipe, "flow-unipc")
    request = Request(prompt="a", steps=STEPS, guidance=4, seed=3)
    assert full.tobytes() == paint(pipe, request).image.tobytes()


def test_a_step_of_a_transformer_is_turned_on_the_page(studio: Studio) -> None:
    known, plan = studio.open("sd3"), Plan.full(STEPS)
    turned = turn_key(plan, known.anatomy, 3)
    assert turned.keys == (0, 1, 2, *range(4, STEPS))
    settings = Settings(model="sd3", prompt="a", steps=STEPS, guidance=1)
    kept, _ = studio.draw(settings, turned, rounds=1, job=Job())
    assert kept.numbers.full_calls == STEPS - 1
    assert studio.forecast(turned.guide("drop", at=[4]), known).unet == pytest.approx(20 / 19)


@pytest.mark.parametrize(
    ("source", "sampler", "why"),
    [
        ("deepcache", OWN_SAMPLER, "only whole steps"),
        ("easycache", OWN_SAMPLER, "decides as it runs"),
        ("balanced", "ddim", "predict noise"),
    ],
)
def test_the_page_refuses_by_one_sentence_what_is_for_unets(
    studio: Studio, source: str, sampler: str, why: str
) -> None:
    settings = Settings(model="sd3", prompt="a", steps=STEPS, guidance=4, sampler=sampler)

    def draw() -> None:
        plan = studio.resolve(source, settings).plan
        studio.draw(settings, plan, rounds=1, job=Job())

    with pytest.raises(LeansdError, match=why):
        draw()
    with pytest.raises(LeansdError, match="units are timed in UNets"):
        studio.profile(settings, job=Job(), on_progress=print)


def test_the_page_tunes_a_transformer(studio: Studio) -> None:
    settings = Settings(model="sd3", prompt="a", steps=8, guidance=4)
    front, chosen = studio.tune(
        settings, ["a", "b", "c", "d"], speedup=1.01, tries=0, job=Job(),
        on_progress=lambda text, share: None,
    )  # fmt: skip
    assert "<svg" in fragments.show_front(front, chosen)


def test_the_page_goes_over_from_one_model_to_another(studio: Studio) -> None:
    """A sampler or a plan that does not suit the other one is left."""
    pytest.importorskip("gradio", reason="pip install 'leansd[ui]'")
    from leansd.ui.handlers import Handlers
    from leansd.ui.page import lay_out

    parts = lay_out(studio.folders.list_models())
    handlers = Handlers(studio, JobQueue(2), parts)
    shown = {part: part.value for part in parts.inputs}
    shown[parts.model] = "emoji"
    shown |= {part: _read(each) for part, each in handlers.begin(shown).items()}
    shown |= {parts.plan_name: "deepcache", parts.sampler: "ddim", parts.model: "sd3"}
    changes = handlers.pick_model(shown)
    assert changes[parts.plan_name]["value"] == "balanced"
    assert changes[parts.sampler]["value"] == OWN_SAMPLER
    assert "ddim" not in changes[parts.sampler]["choices"]
    shown |= {part: _read(each) for part, each in changes.items()}
    shown[parts.sampler] = "flow-heun"
    shown |= {parts.model: "emoji"}
    changes = handlers.pick_model(shown)
    assert changes[parts.sampler]["value"] == OWN_SAMPLER
    assert "deepcache" in changes[parts.plan_name]["choices"]


def _read_pixels(content: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(content))).astype(int)


def _list_pngs(files: dict[str, bytes]) -> list[tuple[str, bytes]]:
    return sorted(each for each in files.items() if each[0].endswith(".png"))


def _read(change: Any) -> Any:
    return change.get("value") if isinstance(change, dict) and "__type__" in change else change
