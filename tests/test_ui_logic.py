"""What the page does, without a page: folders, cells, tickets, duels, history."""

import json
import threading
from dataclasses import replace
from itertools import groupby

import pytest
import torch

from leansd.anatomy.cost import dissect
from leansd.cli import main
from leansd.drawing import Request, paint
from leansd.errors import LeansdError
from leansd.plans.liveness import GUIDANCE
from leansd.plans.plan import Plan
from leansd.plans.presets import preset
from leansd.ui import fragments
from leansd.ui.cells import (
    EDITED,
    change_cells,
    describe_cell,
    find_brush,
    lay_out_grid,
    turn_guidance,
    turn_key,
)
from leansd.ui.duels import hold_duel
from leansd.ui.folders import Folders, find_inside
from leansd.ui.history import Settings, list_entries, read_entry
from leansd.ui.studio import SAVED, Studio
from leansd.ui.tickets import Desk, Done, Stopped, Ticket, follow, stopping
from tiny import LATENT, tiny_pipeline, tiny_unet

STEPS = 6


@pytest.fixture(scope="module")
def anatomy():
    return dissect(tiny_unet(), latent=LATENT, tokens=77)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder of models with one in it."""
    home = tmp_path_factory.mktemp("models")
    tiny_pipeline().save_pretrained(home / "tiny")
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
    assert changed.keys == (0, 1, 2, 4, 5)
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
    assert skipped.keys == (0, 4)
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


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "x" * 65, "a\nb", "nul\0"])
def test_names_of_plans_are_plain(tmp_path, name):
    with pytest.raises(LeansdError, match="no name for a plan"):
        Folders.open(tmp_path / "home").save_plan(Plan.full(4), name)
    assert not (tmp_path / "home").exists()


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


# -- tickets -------------------------------------------------------------------------------------


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


def test_a_desk_has_a_limit_and_one_ticket_a_session():
    desk = Desk(2)
    first = desk.issue("a")
    with pytest.raises(LeansdError, match="not over"):
        desk.issue("a")
    desk.issue("b")
    with pytest.raises(LeansdError, match="limit"):
        desk.issue("c")
    assert desk.stop("a")
    assert first.is_stopped
    assert desk.find("a") is first
    desk.close("a")
    assert not desk.issue("c").is_stopped
    assert desk.find("a").is_stopped
    assert not desk.stop("a")


def test_a_stopped_ticket_ends_a_duel_at_its_next_step():
    pipe, ticket, steps = tiny_pipeline(), Ticket(), []

    def tell(progress):
        steps.append((progress.side, progress.done["full"], progress.done["lean"]))
        if progress.done["lean"] == 2:
            ticket.stop()

    plan = preset("deepcache", STEPS)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    with pytest.raises(Stopped):
        hold_duel(pipe, Request(prompt="a", steps=STEPS), plan, ticket=ticket, tell=tell)
    assert steps[-1] == ("lean", STEPS, 2)
    # The pipeline is as it was, and draws as before.
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
    again = hold_duel(pipe, Request(prompt="a", steps=STEPS), plan)
    assert again.calls == STEPS


def test_a_unet_asks_its_ticket_and_forgets_it():
    pipe, ticket = tiny_pipeline(), Ticket()
    request = Request(prompt="a", steps=2)
    with stopping(pipe.unet, ticket):
        paint(pipe, request)
        ticket.stop()
        with pytest.raises(Stopped):
            paint(pipe, request)
    paint(pipe, request)


# -- the studio ----------------------------------------------------------------------------------


def test_a_duel_draws_what_the_runs_draw_alone(studio):
    settings = make_settings(seed=3)
    plan = studio.make_plan("deepcache", settings)
    told = []
    drawn = studio.draw(settings, plan, rounds=2, ticket=Ticket(), tell=told.append)
    full, lean = drawn.entry.open_pictures()
    pipe = tiny_pipeline()
    request = Request(prompt="a red apple", steps=STEPS, guidance=4.0, seed=3)
    assert list(full.getdata()) == list(paint(pipe, request).image.getdata())
    assert list(lean.getdata()) == list(paint(pipe, request, plan).image.getdata())
    numbers = drawn.entry.numbers
    assert len(numbers.full) == len(numbers.lean) == 2
    assert (numbers.calls, numbers.full_calls) == (STEPS, len(plan.keys))
    sides = [each.side for each in told if each.done["full"] + each.done["lean"] == 1]
    assert sides == ["full", "lean"]  # who begins changes from round to round


def test_a_full_plan_changes_nothing(studio):
    settings = make_settings()
    plan = studio.make_plan("full", settings)
    drawn = studio.draw(settings, plan, rounds=1, ticket=Ticket(), tell=lambda told: None)
    assert drawn.entry.numbers.psnr == 100
    assert drawn.entry.numbers.speedup > 0


def test_the_history_gives_everything_back(studio):
    settings = make_settings(seed=5, negative="blue", sampler="euler")
    plan = change_cells(Plan.full(STEPS), studio.open("tiny").anatomy, [("up3.l1", 2)], "reuse")
    kept = studio.draw(settings, plan, rounds=1, ticket=Ticket(), tell=lambda told: None).entry
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
        studio.draw(settings, plan, rounds=1, ticket=Ticket(), tell=lambda told: None)

    with pytest.raises(LeansdError, match="no prompt"):
        draw(make_settings(prompt="  "), Plan.full(STEPS))
    with pytest.raises(LeansdError, match="for 5 steps"):
        draw(make_settings(), Plan.full(5))
    with pytest.raises(LeansdError, match="no model"):
        studio.open("other")
    with pytest.raises(LeansdError, match="switches to net"):
        studio.check_plan(Plan.full(4).switch("light", at=2), studio.open("tiny"))
    with pytest.raises(LeansdError, match="prompts to tune on"):
        studio.tune(
            make_settings(), ["a"], speedup=2, tries=0, ticket=Ticket(), tell=lambda *told: None
        )
    assert not studio.folders.history.exists()


def test_saved_plans_are_among_the_choices(studio):
    studio.folders.save_plan(Plan.every(2, cut="up3", steps=4), "mine")
    assert SAVED + "mine" in studio.list_plans()
    assert studio.list_plans()[0] == "quality"
    assert not any(name in studio.list_plans() for name in ("light-early", "tstitch-exact"))
    assert studio.make_plan(SAVED + "mine", make_settings()).steps == STEPS


def test_a_profile_gives_forecasts_in_time(studio):
    settings = make_settings()
    model = studio.open("tiny")
    plan = studio.make_plan("deepcache", settings)
    before = studio.forecast(plan, model)
    assert before.run is None
    told = []
    profiled = studio.profile(settings, ticket=Ticket(), tell=lambda *each: told.append(each))
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
    ticket = Ticket()

    def stop_late(text, share):
        if "in full:" in text:
            ticket.stop()

    with pytest.raises(Stopped):
        studio.tune(settings, prompts, speedup=1.5, tries=0, ticket=ticket, tell=stop_late)
    told = []
    tuned = studio.tune(
        settings, prompts, speedup=1.5, tries=0, ticket=Ticket(),
        tell=lambda text, share: told.append(share),
    )  # fmt: skip
    assert told[-1] == 1
    assert tuned.chosen.speedup * 1.02 >= 1.5
    assert "<svg" in fragments.show_front(tuned)


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
    plan = studio.make_plan("deepcache", settings)
    told = []

    def draw(number):
        note = lambda progress: told.append(number)  # noqa: E731
        studio.draw(settings, plan, rounds=1, ticket=Ticket(), tell=note)

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
