"""The same words mean the same plan wherever they are said: in the API, the commands, the page.

Every face is asked for every preset at every sampler and step count. The model is opened once, and
nothing is drawn or exported; what lies between the words and the plan is real, and so are files,
records and pages that carry its fingerprint. Hosts are asked beside their doubles: ComfyUI in
`comfyui/test_playing.py`, Forge in `test_forge.py`, the server in `test_serving.py`; what SD.Next
and InvokeAI make of a name is asked here.
"""

import json
import pickle
import warnings
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import leansd
from hosts import open_in_host
from leansd.anatomy import read_anatomy
from leansd.bulk.jobs import DRAWING, BulkJob
from leansd.cli import main
from leansd.drawing import Painting, Request
from leansd.evaluation.compare import CONVERGED, Case, Compared, Comparison, Drawings
from leansd.evaluation.evaluation import list_cases
from leansd.evaluation.fidelity import Measure
from leansd.evaluation.prediction import Profiled
from leansd.evaluation.prompt_sets import GUIDANCE
from leansd.evaluation.records import get_field, load_records, stamp
from leansd.evaluation.rivals import OURS
from leansd.evaluation.runs import FULL, CallSet
from leansd.evaluation.timing import Ratio, Timing
from leansd.hosting import HostedRun
from leansd.loading import load_outline
from leansd.plans.anatomy import WHOLE, Anatomy
from leansd.plans.presets import PRESETS, SPEED_PRESETS
from leansd.plans.resolve import PlanContext, Resolved, resolve_plan
from leansd.report.page import Drawing, ReportPage
from leansd.runtime.context import describe_runs
from leansd.runtime.report import Report
from leansd.runtime.samplers import set_sampler
from leansd.shards import read_shard
from leansd.unets import open_anatomy
from test_profile import make_cost
from tiny import tiny_pipeline, tiny_unet

UNTUNED = "deis"
DPM = diffusers.DPMSolverMultistepScheduler
SAMPLERS = ("ddim", "euler", "dpm++2m", UNTUNED)
STEPS = (8, 20, 30, 50)
RUNS = list(product(SAMPLERS, STEPS))
ALONE = [name for name in PRESETS if not leansd.preset(name, 20).nets]
PICTURE = Image.linear_gradient("L").resize((32, 32)).convert("RGB")


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


# The same nets are asked for again and again.
READ = cache(read_anatomy)
OPENED = cache(open_anatomy)
OUTLINED = cache(load_outline)


@cache
def expect(pipe, name: str, sampler: str, steps: int, anatomy: Anatomy | None = None) -> Resolved:
    """What every face must make of a preset's name."""
    set_sampler(pipe, sampler)
    nets = {} if name in ALONE else {"light": READ(pipe.unet)}
    known = PlanContext(steps, anatomy=anatomy or READ(pipe.unet), nets=nets)
    return resolve_plan(name, describe_runs(pipe, known))


@pytest.fixture
def opened(pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens the model, or another net, is given what is open."""
    light = tiny_unet()
    for at in ("loading.load", "bulk.jobs.load", "ui.studio.load"):
        monkeypatch.setattr(f"leansd.{at}", lambda *_, **__: pipe)
    for at in ("loading.load_unet", "bulk.jobs.load_unet"):
        monkeypatch.setattr(f"leansd.{at}", lambda *_, **__: light)
    monkeypatch.setattr("leansd.exporting.exporter.load_unet", lambda *_, **__: pipe.unet)
    for at in ("runtime.context", "exporting.exporter", "anatomy.reading"):
        monkeypatch.setattr(f"leansd.{at}.read_anatomy", READ)
    monkeypatch.setattr("leansd.unets.open_anatomy", OPENED)
    monkeypatch.setattr("leansd.loading.load_outline", OUTLINED)


def paint_nothing(
    pipe: Any, requests: Sequence[Request], plan: Any = None, *_: Any, **__: Any
) -> list[Painting]:
    """What runs under a plan give, without a run."""
    counts = dict.fromkeys(("calls", "full_calls", "computed", "inherited", "idle"), 1)
    sizes = {"bytes_kept": 0, "predicted_speedup": 1.0, "measured_speedup": 1.0, "seconds": 1.0}
    run: Any = SimpleNamespace(report=lambda: Report(plan, **counts, **sizes))
    return [Painting(PICTURE, 1.0, run) for _ in requests]


def compare_nothing(pipe: Any, cases: Sequence[Case], calls: CallSet, **_: Any) -> Comparison:
    """What a comparison gives, without one."""
    drawn = Drawings(
        torch.zeros(len(calls), 4, 8, 8), torch.zeros(len(calls), 3, 32, 32, dtype=torch.uint8)
    )
    close = Measure("psnr", "dB", torch.full([len(calls)], 40.0), {"reference": FULL})
    found = {
        each.name: Compared(each, drawn.pictures, (close,), Timing((1.0,)), Ratio(1.0, 1.0, 1.0))
        for each in cases
    }
    return Comparison(found, {FULL: drawn, CONVERGED: drawn})


def write_nothing(unet: Any, folder: Path, *_: Any) -> float:
    folder.mkdir(exist_ok=True)
    return 0.0


def draw_nothing(plan: Any, anatomy: Any, caption: str = "", *, name: str = "plan") -> Drawing:
    return Drawing(name, Figure(), "", caption)


@pytest.fixture
def idle(opened: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is drawn, compared or exported."""
    monkeypatch.setattr("leansd.drawing.paint_together", paint_nothing)
    monkeypatch.setattr("leansd.bulk.jobs.paint_together", paint_nothing)
    for at in ("evaluation", "demo", "bench", "compare"):
        monkeypatch.setattr(f"leansd.evaluation.{at}.compare_runs", compare_nothing)
    monkeypatch.setattr("leansd.exporting.exporter.write_onnx", write_nothing)
    for at in ("plans", "nets"):
        monkeypatch.setattr(f"leansd.report.{at}.draw_plan", draw_nothing)


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> dict[Path, ReportPage]:
    """The pages that commands write, by their paths, as they are before they are HTML."""
    written: dict[Path, ReportPage] = {}

    def keep(path: Path, page: ReportPage, _: Any) -> Path:
        written[path] = page
        return path

    monkeypatch.setattr("leansd.report.page.write_report", keep)
    return written


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Run a command; gives the object that it ends with, and standard error on one line."""

    def call(*arguments: object) -> tuple[dict, str]:
        assert main([str(each) for each in arguments]) == 0
        printed = capsys.readouterr()
        return json.loads(printed.out.splitlines()[-1]), " ".join(printed.err.split())

    return call


def give_net(name: str, model: Path) -> list[str]:
    """The option that a preset needs for its other net."""
    return [] if name in ALONE else ["--net", f"light={model}"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_names_mean_tuned_plans_where_there_are_some(pipe, sampler: str) -> None:
    for name, steps in product(SPEED_PRESETS, STEPS[1:]):
        found = expect(pipe, name, sampler, steps)
        tuned = leansd.preset(name, steps, sampler=sampler)
        assert found.plan.fingerprint == tuned.fingerprint
        assert len(found.notes) == (sampler == UNTUNED)
        assert (tuned.tuned is None) == (sampler == UNTUNED)
        if sampler == "dpm++2m":
            assert leansd.preset(name, steps) == tuned


@pytest.mark.parametrize(
    ("kind", "options", "meant"),
    [
        (DPM, {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}, "dpm++2m-karras"),
        (DPM, {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}, "dpm++sde"),
        (DPM, {"solver_order": 3, "use_karras_sigmas": True}, UNTUNED),
        (DPM, {"use_exponential_sigmas": True}, UNTUNED),
        (diffusers.EulerDiscreteScheduler, {"use_exponential_sigmas": True}, UNTUNED),
        (diffusers.UniPCMultistepScheduler, {"use_karras_sigmas": True}, UNTUNED),
        (diffusers.UniPCMultistepScheduler, {}, "unipc"),
        (diffusers.KDPM2AncestralDiscreteScheduler, {}, "euler-a"),
    ],
)
def test_presets_know_what_a_scheduler_does(kind: Any, options: dict, meant: str) -> None:
    pipe = tiny_pipeline()
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
    found = resolve_plan("balanced", describe_runs(pipe, PlanContext(20))).plan
    assert found.fingerprint == leansd.preset("balanced", 20, sampler=meant).fingerprint


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
        set_sampler(pipe, sampler)
        pipe.scheduler.set_timesteps(steps)
        told: list[warnings.WarningMessage]
        with warnings.catch_warnings(record=True) as told, torch.no_grad():
            warnings.simplefilter("always")
            with leansd.inherit(pipe, name, nets=nets) as following:
                pipe.unet(latents, pipe.scheduler.timesteps[0], text)
        assert following.report().plan.fingerprint == expected.plan.fingerprint, (name, steps)
        assert [str(each.message) for each in told] == list(expected.notes), (name, steps)


@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_plan_command_shows_the_plan_that_names_mean(pipe, model, run, sampler: str) -> None:
    for name, steps in product(PRESETS, STEPS):
        expected = expect(pipe, name, sampler, steps)
        asked = ("plan", name, "--model", model, "--steps", steps, "--sampler", sampler, "--json")
        shown, told = run(*asked, *give_net(name, model))
        assert shown["fingerprint"] == expected.plan.fingerprint, (name, steps)
        assert shown["plan"] == expected.plan.name
        assert shown["notes"] == list(expected.notes)
        assert all(note in told for note in expected.notes)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_export_writes_the_plan_that_names_mean(pipe, model, run, tmp_path, sampler: str) -> None:
    """From Python and by the command."""
    pytest.importorskip("onnx")
    out = tmp_path / "out"
    for name, steps in product(ALONE, STEPS):
        expected = expect(pipe, name, sampler, steps)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            exported = leansd.export(model, out, to="onnx", plan=name, steps=steps, sampler=sampler)
        assert exported.plan is not None
        assert exported.plan.fingerprint == expected.plan.fingerprint, (name, steps)
        assert [str(each.message) for each in told] == list(expected.notes)
        asked = ("export", model, "--to", "onnx", "--plan", name, "--out", out, "--json")
        shown, told = run(*asked, "--steps", steps, "--sampler", sampler)
        assert shown["fingerprint"] == expected.plan.fingerprint, (name, steps)
        assert all(told.count(note) == 1 for note in expected.notes)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_generated_pictures_carry_the_plan_that_names_mean(
    pipe, model, run, tmp_path, sampler: str
) -> None:
    for name, steps in product(PRESETS, STEPS):
        expected = expect(pipe, name, sampler, steps)
        drawn, told = run(
            "generate", "a pizza", "--model", model, "--plan", name, "--steps", steps, "--sampler",
            sampler, *give_net(name, model), "--out", tmp_path, "--overwrite", "--json",
        )  # fmt: skip
        (picture,) = drawn["pictures"]
        assert picture["plan_fingerprint"] == expected.plan.fingerprint, (name, steps)
        with Image.open(picture["path"]) as image:
            assert image.text["plan_fingerprint"] == expected.plan.fingerprint
        assert all(told.count(note) == 1 for note in expected.notes)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_shards_carry_the_plan_that_names_mean(
    pipe, model, run, pages, tmp_path, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    """Drawn here; what workers on Ray are sent is the same job."""
    (rows := tmp_path / "rows.jsonl").write_text('{"id": "a", "prompt": "a pizza"}\n')
    sent: list[BulkJob] = []

    def draw(job: BulkJob, parts: Any) -> Any:
        sent.append(pickle.loads(pickle.dumps(job)))
        return DRAWING.run_here(job, parts)

    monkeypatch.setattr(type(DRAWING), "place", lambda *_: draw)
    for name, steps in product(PRESETS, STEPS):
        expected, out = expect(pipe, name, sampler, steps), tmp_path / f"{name}-{steps}"
        _, told = run(
            "generate", "--prompts", rows, "--model", model, "--plan", name, "--steps", steps,
            "--sampler", sampler, *give_net(name, model), "--out", out, "--json",
        )  # fmt: skip
        plan = leansd.Plan.from_dict(sent.pop().plan)
        assert plan.fingerprint == expected.plan.fingerprint, (name, steps)
        (inside,) = read_shard(out / "shard-000000.tar")
        assert inside.facts["plan_fingerprint"] == expected.plan.fingerprint
        assert expected.plan.fingerprint in str(pages[out / "report.html"].sections)
        assert all(told.count(note) == 1 for note in expected.notes)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_records_of_evaluate_carry_the_plans_that_names_mean(
    pipe, model, run, pages, tmp_path, sampler: str
) -> None:
    """From Python and by the command, all presets at once."""
    (prompts := tmp_path / "prompts.txt").write_text("a pizza\na cat\n")
    for steps in STEPS:
        every = {name: expect(pipe, name, sampler, steps) for name in ALONE}
        set_sampler(pipe, sampler)
        wanted = {
            f"{FULL} plan" if each.plan.name == FULL else name: each.plan.fingerprint
            for name, each in every.items()
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cases = list_cases(pipe, ALONE, steps)
        assert {each.name: each.fingerprint for each in cases if each.plan} == wanted
        measured, told = run(
            "evaluate", model, "--steps", steps, "--sampler", sampler, "--prompts", prompts,
            *(word for name in ALONE for word in ("--plan", name)), "--count", 2,
            "--reference", FULL, "--out", tmp_path, "--overwrite", "--json",
        )  # fmt: skip
        records = load_records(tmp_path / "records.jsonl")
        assert {each.plan: each.fingerprint for each in records} == {FULL: "", **wanted}
        shown = {each["plan"]: each["fingerprint"] for each in measured["results"]}
        assert shown == {FULL: "", **wanted}
        page = pages[tmp_path / "report.html"]
        assert all(each in page.attachments[0].content for each in wanted.values())
        assert all(told.count(note) == 1 for each in every.values() for note in each.notes)


@pytest.mark.usefixtures("idle")
def test_records_of_bench_carry_the_plans_that_names_mean(
    pipe, model, run, pages, tmp_path
) -> None:
    """Every contest at once; a preset that means the full run has no part in one."""
    (prompts := tmp_path / "prompts.txt").write_text("a pizza\na cat\n")
    _, told = run(
        "bench", "--model", model, "--prompts", prompts, "--count", 2, "--rivals", "fewer",
        *(word for name in ALONE for word in ("--plans", name)),
        *(word for sampler in SAMPLERS for word in ("--sampler", sampler)),
        *(word for steps in STEPS for word in ("--steps", steps)),
        "--out", tmp_path / "bench.jsonl", "--report", tmp_path, "--json",
    )  # fmt: skip
    found: dict[tuple[str, int], dict[str, str]] = {each: {} for each in RUNS}
    for each in load_records(tmp_path / "bench.jsonl"):
        if get_field(each, "family") == OURS and get_field(each, "task") == "text-to-image":
            contest = get_field(each, "sampler"), get_field(each, "steps")
            found[contest][each.plan] = each.fingerprint
    for contest, plans in found.items():
        every = [expect(pipe, name, *contest) for name in ALONE]
        assert plans == {
            each.plan.name: each.plan.fingerprint for each in every if each.plan.name != FULL
        }, contest
        assert all(told.count(note) == 1 for each in every for note in each.notes)
    page = pages[tmp_path / "report.html"].attachments[0].content
    assert all(each in page for plans in found.values() for each in plans.values())


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_records_of_demo_carry_the_plans_that_names_mean(
    pipe, model, run, pages, tmp_path, sampler: str
) -> None:
    for steps in STEPS:
        every = {name: expect(pipe, name, sampler, steps) for name in SPEED_PRESETS}
        wanted = {
            name: each.plan.fingerprint for name, each in every.items() if each.plan.name != FULL
        }
        shown, told = run(
            "demo", "--model", model, "--steps", steps, "--sampler", sampler, "--prompts",
            "a pizza", "--out", tmp_path, "--overwrite", "--json",
        )  # fmt: skip
        found = {each["name"]: each["fingerprint"] for each in shown["plans"]}
        assert {name: each for name, each in found.items() if each} == wanted
        records = load_records(tmp_path / "records.jsonl")
        assert {each.plan: each.fingerprint for each in records if each.fingerprint} == wanted
        page = pages[tmp_path / "report.html"]
        assert all(each in page.attachments[0].content for each in wanted.values())
        assert all(told.count(note) == 1 for each in every.values() for note in each.notes)


@pytest.mark.parametrize(("sampler", "steps"), RUNS)
def test_profile_predicts_the_plans_that_names_mean(pipe, sampler: str, steps: int) -> None:
    gains = Profiled(
        make_cost(), READ(pipe.unet), steps, (), 1, stamp("cpu"), sampler=sampler
    ).gains
    for name, gain in zip(("full", *SPEED_PRESETS, "deepcache"), gains, strict=True):
        expected = expect(pipe, name, sampler, steps)
        assert gain.plan.fingerprint == expected.plan.fingerprint, name


@pytest.mark.usefixtures("idle")
def test_pages_that_are_asked_for_say_the_plan_that_names_mean(
    pipe, model, run, pages, tmp_path
) -> None:
    pytest.importorskip("onnx")
    expected = expect(pipe, "turbo", "euler", 20).plan
    said = f"turbo ({expected.fingerprint})"
    shared = ("--steps", 20, "--sampler", "euler", "--json")
    page = tmp_path / "page.html"
    for asked in (
        ("plan", "turbo", "--model", model, "--report", page),
        ("export", model, "--to", "onnx", "--plan", "turbo", "--out", tmp_path / "onnx",
         "--report", page),
        ("generate", "a pizza", "--model", model, "--plan", "turbo", "--compare", "--out",
         tmp_path),
    ):  # fmt: skip
        run(*asked, *shared)
        path, written = pages.popitem()
        assert said in written.measured, path
        assert leansd.Plan.from_dict(json.loads(written.attachments[0].content)) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sampler", "steps"),
    [("balanced", "dpm++2m", 9), ("turbo", "euler", 8), ("fast", UNTUNED, 9)],
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


@pytest.mark.usefixtures("idle")
def test_every_command_draws_a_model_at_the_same_guidance(pipe, model, run, tmp_path) -> None:
    """Where none is named: what the bundled model is measured at, another's pipeline's own."""
    (rows := tmp_path / "rows.jsonl").write_text('{"id": "a", "prompt": "a pizza"}\n')
    (prompts := tmp_path / "prompts.txt").write_text("a pizza\na cat\n")
    for name, scale in (("emoji", GUIDANCE), (str(model), 7.5)):
        out = tmp_path / str(scale)
        shared = ("--model", name, "--steps", 20, "--json")
        drawn, _ = run("generate", "a pizza", *shared, "--out", out)
        with Image.open(drawn["pictures"][0]["path"]) as image:
            assert float(image.text["guidance"]) == scale
        run("generate", "--prompts", rows, *shared, "--out", out / "shards")
        (inside,) = read_shard(out / "shards" / "shard-000000.tar")
        assert inside.facts["guidance"] == scale
        run("demo", *shared, "--prompts", "a pizza", "--out", out / "demo")
        run(
            "evaluate", name, *shared[2:], "--plan", "fast", "--prompts", prompts, "--count", 2,
            "--reference", FULL, "--out", out / "evaluate",
        )  # fmt: skip
        for folder in ("demo", "evaluate"):
            records = load_records(out / folder / "records.jsonl")
            assert {get_field(each, "guidance") for each in records} == {scale}, folder


@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_page_means_the_same(pipe, model, tmp_path, sampler: str) -> None:
    pytest.importorskip("gradio")
    from leansd.ui.folders import Folders, Settings
    from leansd.ui.studio import Studio

    studio = Studio(Folders.open(tmp_path, model.parent), "cpu")
    for name, steps in product(ALONE, STEPS):
        settings = Settings(model="tiny", prompt="a", steps=steps, sampler=sampler)
        expected = expect(pipe, name, sampler, steps)
        found = studio.resolve(name, settings)
        assert found.plan.fingerprint == expected.plan.fingerprint, (name, steps)
        assert found.notes == expected.notes, (name, steps)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_hosts_with_pipelines_follow_the_plan_that_names_mean(pipe, sampler: str) -> None:
    """SD.Next's panel, and InvokeAI's usual way to denoise."""
    for name, steps in product(ALONE, STEPS):
        expected = expect(pipe, name, sampler, steps).plan
        set_sampler(pipe, sampler)
        run = HostedRun(pipe, name, steps)
        try:
            assert run.identity == expected.identity, (name, steps, run.reason)
        finally:
            run.close()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_invokeais_own_loop_follows_the_plan_that_names_mean(pipe, sampler: str, caplog) -> None:
    """It follows what whole steps inherit, and says of any other plan that it cannot."""
    following = Path(__file__).parent.parent / "integrations/invokeai/lean_plan/following.py"
    asked = SimpleNamespace(conditioning_data=SimpleNamespace(guidance_scale=4.0))
    with open_in_host(following, {}) as opened:
        for name, steps in product(ALONE, STEPS):
            set_sampler(pipe, sampler)
            pipe.scheduler.set_timesteps(steps)
            asked.timesteps = pipe.scheduler.timesteps
            caplog.clear()
            run = opened.DenoisingRun(name)
            run.begin(SimpleNamespace(inputs=asked, scheduler=pipe.scheduler))
            if run.reason and name not in SPEED_PRESETS:
                assert "for UNets" in run.reason or "only whole steps" in run.reason, run.reason
                continue
            expected = expect(pipe, name, sampler, steps, WHOLE)
            assert run.plan.fingerprint == expected.plan.fingerprint, (name, steps)
            said = [each.getMessage() for each in caplog.records]
            assert said == [f"Lean Plan: {note}" for note in expected.notes]


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
