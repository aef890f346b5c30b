"""What the page does, without a page: folders, cells, jobs, runs, history."""

import json
import threading
from dataclasses import replace
from itertools import groupby

import pytest
import torch

from leansd.anatomy.counting import dissect
from leansd.cli import main
from leansd.drawing import Request, paint
from leansd.errors import LeansdError
from leansd.plans.liveness import GUIDANCE
from leansd.plans.methods import METHODS
from leansd.plans.plan import Plan
from leansd.plans.presets import preset
from leansd.ui import fragments
from leansd.ui.folders import Folders, Settings, find_inside, list_entries, read_entry
from leansd.ui.job_queue import Done, Job, JobQueue, Stopped, follow
from leansd.ui.plan_grid import (
    EDITED,
    change_cells,
    describe_cell,
    find_brush,
    lay_out_grid,
    list_brushes,
    turn_guidance,
    turn_key,
)
from leansd.ui.studio import SAVED, Studio
from tiny import LATENT, shallow_unet, tiny_pipeline, tiny_unet

STEPS = 10


@pytest.fixture(scope="module")
def anatomy():
    return dissect(tiny_unet(), latent=LATENT, tokens=77)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder of models with one in it."""
    home = tmp_path_factory.mktemp("models")
    tiny_pipeline(unet=shallow_unet()).save_pretrained(home / "tiny")
    return home


@pytest.fixture
def studio(shelf, tmp_path):
    return Studio(Folders.open(tmp_path / "home", shelf), "cpu")


def make_settings(**changes):
    given = {"model": "tiny", "prompt": "a red apple", "steps": STEPS, "guidance": 4.0}
    return Settings(**(given | changes))


def find_line(grid, at):
    return next(line for line in grid.lines if line.at == at)


# -- cells ---------------------------------------------------------------------------------------


def test_a_cell_is_changed_and_changed_back(anatomy):
    plan = Plan.full(STEPS)
    changed = change_cells(plan, anatomy, [("up3.l1", 3)], "reuse")
    assert find_line(lay_out_grid(changed, anatomy), "up3.l1").states[3] == "reuse"
    assert changed.keys == (0, 1, 2, *range(4, STEPS))
    assert changed.name == "full" + EDITED
    back = change_cells(changed, anatomy, [("up3.l1", 3)], "compute")
    assert back.fingerprint == plan.fingerprint


def test_a_change_leaves_what_globs_say_elsewhere(anatomy):
    plan = Plan.every(2, cut="up3", steps=STEPS)
    changed = change_cells(plan, anatomy, [("up3.l0.res", 3)], "compute")
    resolved, before = changed.resolve(anatomy), plan.resolve(anatomy)
    assert "up3.l0.res" not in resolved[3]
    assert set(before[3]) - set(resolved[3]) == {"up3.l0.res"}
    assert changed.rows[5] == plan.rows[5]


def test_idle_cells_that_the_plan_names_are_told_apart(anatomy):
    plan = Plan.every(2, cut="up3.l1", steps=STEPS).inherit("dn0.l0", at=[3])
    grid = lay_out_grid(plan, anatomy)
    assert find_line(grid, "dn0.l0").says[3]
    assert find_line(grid, "dn0.l0").states[3] == "idle"
    assert "would inherit" in describe_cell(grid, "dn0.l0", 3)
    assert not find_line(grid, "dn0.l1").says[3]


@pytest.mark.parametrize(
    ("cells", "brush", "told"),
    [
        ([("up3.l1", 0)], "reuse", "first step"),
        ([("up3.up", 2)], "reuse", "matches nothing"),
        ([("dn0.down", 2)], "residual", "changes the size"),
        ([("up3.l1", STEPS)], "reuse", "outside a plan"),
        ([("up3.l1", 2)], "magic", "no brush"),
    ],
)
def test_what_means_nothing_is_refused(anatomy, cells, brush, told):
    with pytest.raises(LeansdError, match=told):
        change_cells(Plan.full(STEPS), anatomy, cells, brush)


def test_an_inherited_head_drops_its_correction_and_what_it_was_tuned_for(anatomy):
    plan = preset("balanced", 30, sampler="ddim")
    step = next(step for step, row in enumerate(plan.rows) if any(row.correct))
    changed = change_cells(plan, anatomy, [("head", step)], "forecast")
    assert not any(changed.rows[step].correct)
    assert changed.tuned is None


def test_a_key_step_takes_turns(anatomy):
    plan = Plan.every(2, cut="up3.l1", steps=STEPS, how="forecast")
    skipped = turn_key(plan, anatomy, 2)
    assert skipped.keys == (0, 4, 6, 8)
    assert skipped.rows[2].inherit == plan.rows[1].inherit
    assert turn_key(skipped, anatomy, 2).keys == plan.keys
    assert turn_key(Plan.full(STEPS), anatomy, 2).resolve(anatomy)[2] == {"head": "forecast"}
    with pytest.raises(LeansdError, match="first step"):
        turn_key(plan, anatomy, 0)


def test_guidance_goes_round(anatomy):
    plan, seen = Plan.full(STEPS), []
    for _ in range(4):
        plan = turn_guidance(plan, anatomy, [3])
        seen.append(plan.rows[3].guidance)
    assert seen == ["inherit", "forecast", "drop", "compute"]
    with pytest.raises(LeansdError, match="first step"):
        turn_guidance(plan, anatomy, [0])


def test_a_click_takes_back_what_the_brush_has_done(anatomy):
    plan = change_cells(Plan.full(STEPS), anatomy, [("up3.l1", 3)], "reuse")
    assert find_brush(plan, anatomy, "up3.l1", 3, "reuse") == "compute"
    assert find_brush(plan, anatomy, "up3.l1", 3, "forecast") == "forecast"


@pytest.mark.parametrize("name", ["balanced", "deepcache", "tgate", "pab", "easycache", "full"])
@pytest.mark.parametrize("tier", ["block", "layer", "unit"])
def test_every_preset_is_a_grid(anatomy, name, tier):
    plan = preset(name, STEPS)
    grid = lay_out_grid(plan, anatomy, tier)
    assert all(len(line.states) == len(line.says) == STEPS for line in grid.lines)
    assert grid.lines[-1].at == GUIDANCE
    json.dumps([line.states for line in grid.lines])


def test_a_method_that_is_added_to_the_table_is_painted(anatomy, monkeypatch):
    toy = replace(METHODS["reuse"], label="toy way", colour="#abcdef")
    monkeypatch.setitem(METHODS, "toy", toy)
    assert list_brushes()["toy"] == "toy way"
    plan = change_cells(Plan.full(STEPS), anatomy, [("up3.l1", 3)], "toy")
    grid = lay_out_grid(plan, anatomy)
    assert find_line(grid, "up3.l1").states[3] == "toy"
    assert grid.labels["units"]["toy"] == "toy way"
    assert describe_cell(grid, "up3.l1", 3).endswith("toy way")
    pytest.importorskip("gradio", reason="pip install 'leansd[ui]'")
    from leansd.ui.page import lay_out
    from leansd.ui.serving import read_style

    parts = lay_out(["emoji"])
    assert ("toy way", "toy") in parts.brush.choices
    assert "td.cell.toy { background: var(--toy); }" in read_style()
    assert "--toy: #abcdef" in read_style()


# -- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "", ".", "x\0y"])
def test_names_that_lead_outside_are_refused(tmp_path, name):
    (tmp_path / "home").mkdir()
    with pytest.raises(LeansdError, match="outside"):
        find_inside(tmp_path / "home", name)


def test_links_that_lead_outside_are_refused(tmp_path):
    folders = Folders.open(tmp_path / "home")
    folders.plans.mkdir(parents=True)
    Plan.full(4).save(tmp_path / "secret.json")
    (folders.plans / "link.json").symlink_to(tmp_path / "secret.json")
    assert folders.list_plans() == []
    with pytest.raises(LeansdError, match="outside"):
        folders.load_plan("link")
    with pytest.raises(LeansdError, match="outside"):
        folders.save_plan(Plan.full(6), "link")
    assert Plan.load(tmp_path / "secret.json").steps == 4


@pytest.mark.parametrize(
    "name",
    ["../up", "a/b", "", ".hidden", "x" * 65, "a\nb", "nul\0", "NUL", "con.v2", "a.", "猫" * 90],
)
def test_names_of_plans_are_plain(tmp_path, name):
    with pytest.raises(LeansdError, match="no name for a plan"):
        Folders.open(tmp_path / "home").save_plan(Plan.full(4), name)
    assert not (tmp_path / "home").exists()


def test_names_that_are_one_file_on_some_disks_are_refused(tmp_path):
    folders = Folders.open(tmp_path / "home")
    folders.save_plan(Plan.full(4), "Mine")
    with pytest.raises(LeansdError, match="the same file"):
        folders.save_plan(Plan.full(6), "mine")
    folders.save_plan(Plan.full(6), "Mine")
    assert folders.load_plan("Mine").steps == 6


@pytest.mark.parametrize("name", ["my plan", "v1.5", "猫", "हिन्दी", "a - b"])
def test_plans_are_called_in_any_script(tmp_path, name):
    folders = Folders.open(tmp_path / "home")
    folders.save_plan(Plan.full(4), name)
    assert folders.list_plans() == [name]
    assert folders.load_plan(name).name == name


def test_plans_come_back_as_they_were_saved(tmp_path):
    folders = Folders.open(tmp_path / "home")
    plan = Plan.every(2, cut="up3", steps=STEPS)
    folders.save_plan(plan, "my plan")
    assert folders.list_plans() == ["my plan"]
    assert folders.load_plan("my plan").fingerprint == plan.fingerprint


def test_only_models_in_the_folder_given_are_opened(tmp_path, shelf):
    (tmp_path / "empty").mkdir()
    folders = Folders.open(tmp_path / "home", tmp_path)
    (tmp_path / "outside").symlink_to(shelf / "tiny")
    assert folders.list_models() == ["emoji"]
    for name in ("outside", "../etc", "empty", str(shelf / "tiny")):
        with pytest.raises(LeansdError):
            folders.find_model(name)
    assert Folders.open(tmp_path / "home", shelf).list_models() == ["emoji", "tiny"]
    with pytest.raises(LeansdError, match="--models"):
        Folders.open(tmp_path / "home").find_model("tiny")


# -- jobs -------------------------------------------------------------------------------------


def test_work_tells_its_latest_and_then_its_result():
    def work(tell):
        for each in range(100):
            tell(each)
        return "done"

    *told, last = follow(work)
    assert last == Done("done")
    assert told[-1] == 99
    assert told == sorted(told)


def test_what_work_raises_is_raised_to_who_follows():
    def work(tell):
        tell(1)
        raise LeansdError("no")

    with pytest.raises(LeansdError, match="no"):
        list(follow(work))


def test_a_queue_has_a_limit_and_one_job_a_session():
    jobs = JobQueue(2)
    first = jobs.add("a")
    with pytest.raises(LeansdError, match="not over"):
        jobs.add("a")
    jobs.add("b")
    with pytest.raises(LeansdError, match="limit"):
        jobs.add("c")
    assert jobs.stop("a")
    assert first.is_stopped
    assert jobs.find("a") is first
    jobs.close("a")
    assert not jobs.add("c").is_stopped
    assert jobs.find("a").is_stopped
    assert not jobs.stop("a")


def test_a_stopped_job_ends_a_run_at_its_next_step(studio):
    settings, job, steps = make_settings(), Job(), []
    plan = studio.resolve("deepcache", settings).plan

    def stop_late(progress):
        steps.append((progress.case, progress.step))
        if progress.case == "lean" and progress.step == 2:
            job.stop()

    with pytest.raises(Stopped):
        studio.draw(settings, plan, rounds=1, job=job, on_progress=stop_late)
    assert steps[-1] == ("lean", 2)
    assert not studio.folders.history.exists()
    # The pipeline is as it was, and asks its next job.
    drawn, _ = studio.draw(settings, plan, rounds=1, job=Job())
    assert drawn.numbers.calls == STEPS


# -- the studio ----------------------------------------------------------------------------------


def test_both_runs_draw_what_they_draw_alone(studio):
    settings = make_settings(seed=3)
    plan = studio.resolve("deepcache", settings).plan
    told = []
    drawn, _ = studio.draw(settings, plan, rounds=2, job=Job(), on_progress=told.append)
    full, lean = drawn.open_pictures()
    pipe = tiny_pipeline(unet=shallow_unet())
    request = Request(prompt="a red apple", steps=STEPS, guidance=4.0, seed=3)
    assert list(full.getdata()) == list(paint(pipe, request).image.getdata())
    assert list(lean.getdata()) == list(paint(pipe, request, plan).image.getdata())
    numbers = drawn.numbers
    assert len(numbers.full) == len(numbers.lean) == 2
    assert (numbers.calls, numbers.full_calls) == (STEPS, len(plan.keys))
    begun = [each.case for each in told if each.step == 0]
    assert begun == ["full", "lean", "lean", "full"]  # who begins changes from round to round


def test_a_full_plan_changes_nothing(studio):
    settings = make_settings()
    plan = studio.resolve("full", settings).plan
    drawn, _ = studio.draw(settings, plan, rounds=1, job=Job())
    assert drawn.numbers.psnr == 100
    assert drawn.numbers.speedup > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_run_in_half_precision(shelf, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(
        "leansd.ui.studio.load",
        lambda *given, **options: tiny_pipeline(unet=shallow_unet()).to(dtype),
    )
    monkeypatch.setattr("leansd.ui.studio.PROFILE_REPEATS", 1)
    studio, settings = Studio(Folders.open(tmp_path / "home", shelf), "cpu"), make_settings()
    model = studio.open("tiny")
    plan = studio.resolve("deepcache", settings).plan
    assert studio.forecast(plan, model).unet > 1
    drawn, _ = studio.draw(settings, plan, rounds=1, job=Job())
    assert drawn.numbers.predicted > 1
    fragments.show_anatomy(model)
    fragments.show_profile(studio.profile(settings, job=Job(), on_progress=print))


@pytest.mark.parametrize(
    ("first", "told"),
    [(0, "in the full run as well"), (STEPS, "with the plan")],
    ids=["both", "plan"],
)
@pytest.mark.filterwarnings("ignore:the UNet's outputs")
def test_pictures_of_no_numbers_are_told(studio, first, told):
    settings = make_settings()
    plan = studio.resolve("deepcache", settings).plan
    studio.open("tiny")
    pipe, calls = studio._opened.pipe, []

    def spoil(module, given, output):
        calls.append(1)
        # Two calls warm up, the full run has a call a step, the plan's run comes after it.
        return output * torch.nan if len(calls) > 2 + first else output

    handle = pipe.unet.conv_out.register_forward_hook(spoil)
    drawn, warnings = studio.draw(settings, plan, rounds=1, job=Job())
    handle.remove()
    assert len(warnings) == 1
    assert told in warnings[0]
    assert told in fragments.show_numbers(drawn, warnings)
    assert list_entries(studio.folders.history)[0].numbers == drawn.numbers


def test_what_could_not_be_counted_fails_nothing(studio, anatomy):
    settings, model = make_settings(), studio.open("tiny")
    model.anatomy = replace(model.anatomy, uncounted="not counted, because it is a test")
    plan = studio.resolve("deepcache", settings).plan
    assert studio.forecast(plan, model).unet is None
    assert "not counted" in fragments.show_forecast(plan, studio.forecast(plan, model))
    assert "because it is a test" in fragments.show_anatomy(model)
    assert [beat.share for beat in fragments.list_beats(plan, model.anatomy)] == [1] * STEPS


def test_the_history_gives_everything_back(studio):
    settings = make_settings(seed=5, negative="blue", sampler="euler")
    plan = change_cells(Plan.full(STEPS), studio.open("tiny").anatomy, [("up0.l1", 2)], "reuse")
    kept, _ = studio.draw(settings, plan, rounds=1, job=Job())
    (entry,) = list_entries(studio.folders.history)
    assert entry.settings == settings
    assert entry.plan.fingerprint == plan.fingerprint
    assert entry.numbers == kept.numbers
    (kept.folder / "entry.json").write_text("{")
    assert list_entries(studio.folders.history) == []
    for key in ("../../etc", "20260101-000000-000000", ""):
        with pytest.raises(LeansdError):
            read_entry(studio.folders.history, key)


def test_mistakes_are_told_before_anything_runs(studio):
    def draw(settings, plan):
        studio.draw(settings, plan, rounds=1, job=Job())

    with pytest.raises(LeansdError, match="no prompt"):
        draw(make_settings(prompt="  "), Plan.full(STEPS))
    with pytest.raises(LeansdError, match="for 5 steps"):
        draw(make_settings(), Plan.full(5))
    with pytest.raises(LeansdError, match="no model"):
        studio.open("other")
    with pytest.raises(LeansdError, match="switches to net"):
        studio.check_plan(Plan.full(4).switch("light", at=2), studio.open("tiny"))
    with pytest.raises(LeansdError, match="prompts to tune on"):
        studio.tune(make_settings(), ["a"], speedup=2, tries=0, job=Job(), on_progress=print)
    assert not studio.folders.history.exists()


def test_saved_plans_are_among_the_choices(studio):
    studio.folders.save_plan(Plan.every(2, cut="up0", steps=4), "mine")
    plans = studio.list_plans(studio.open("tiny"))
    assert SAVED + "mine" in plans
    assert plans[0] == "quality"
    assert not any(name in plans for name in ("light-early", "tstitch-exact"))
    assert studio.resolve(SAVED + "mine", make_settings()).plan.steps == STEPS


def test_a_profile_gives_forecasts_in_time(studio):
    settings = make_settings()
    model = studio.open("tiny")
    plan = studio.resolve("deepcache", settings).plan
    before = studio.forecast(plan, model)
    assert before.run is None
    told = []
    profiled = studio.profile(settings, job=Job(), on_progress=lambda *each: told.append(each))
    assert told[-1] == (3, 3)
    after = studio.forecast(plan, model)
    assert after.unet == before.unet
    assert after.seconds is not None
    assert after.seconds > 0
    assert studio.forecast(plan, model, guided=False).run is None
    page = fragments.show_profile(profiled)
    assert "dn0.l0.res" in page
    assert "<svg" in page


@pytest.mark.slow
def test_tuning_can_be_stopped_and_goes_on(studio):
    settings = make_settings(steps=8)
    prompts = ["a", "b", "c", "d"]
    job = Job()

    def stop_late(text, share):
        if "in full:" in text:
            job.stop()

    with pytest.raises(Stopped):
        studio.tune(settings, prompts, speedup=1.5, tries=0, job=job, on_progress=stop_late)
    told = []
    front, chosen = studio.tune(
        settings, prompts, speedup=1.5, tries=0, job=Job(),
        on_progress=lambda text, share: told.append(share),
    )  # fmt: skip
    assert told[-1] == 1
    assert chosen.speedup * 1.02 >= 1.5
    assert "<svg" in fragments.show_front(front, chosen)


# -- fragments -----------------------------------------------------------------------------------


def test_text_of_others_is_escaped(studio, anatomy):
    plan = replace(Plan.full(STEPS), name="<script>alert(1)</script>")
    shown = fragments.show_forecast(plan, studio.forecast(plan, studio.open("tiny")))
    assert "<script" not in shown
    assert "&lt;script" in shown
    assert "<b" not in fragments.show_note("<b onclick=x>")
    assert "<b" not in fragments.show_lanes([], None, "<b onclick=x>").split("</div>")[-1]


def test_bars_are_as_tall_as_what_a_step_computes(anatomy):
    plan = Plan.every(2, cut="head", steps=4)
    beats = fragments.list_beats(plan, anatomy)
    assert [beat.state for beat in beats] == ["compute", "reuse", "compute", "reuse"]
    assert beats[0].share == 1
    assert beats[1].share < 0.1


def test_one_run_at_a_time(studio):
    settings = make_settings()
    plan = studio.resolve("deepcache", settings).plan
    told = []

    def draw(number):
        note = lambda progress: told.append(number)  # noqa: E731
        studio.draw(settings, plan, rounds=1, job=Job(), on_progress=note)

    threads = [threading.Thread(target=draw, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([number for number, _ in groupby(told)]) == 3
    assert len(list_entries(studio.folders.history)) == 3


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--models", "nowhere"], "no folder nowhere"),
        (["--folder", "file"], "is not a folder"),
        (["--port", "0"], "port"),
        (["--device", "abacus"], "no device"),
    ],
)
def test_mistakes_of_the_command_are_one_line(options, told, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gradio", reason="pip install 'leansd[ui]'")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(["ui", *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told in line


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    from leansd.cli import ui

    with pytest.raises(LeansdError, match=r"pip install 'leansd\[ui\]'"):
        ui.serve_page()
