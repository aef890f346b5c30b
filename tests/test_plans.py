"""Plans, key steps and addresses as data."""

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from itertools import product
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest

import leansd
from leansd.anatomy import read_anatomy
from leansd.anatomy.builtin import open_builtin
from leansd.errors import LeansdError
from leansd.plans import Anatomy, Plan, address, keysteps, presets
from leansd.plans.compile import compile_plan
from leansd.plans.grid import draw_picture, list_states
from leansd.plans.liveness import Kept, Net, find_pattern
from leansd.plans.methods import METHODS, Method, lagrange
from leansd.plans.plan import Tuned
from leansd.plans.resolve import find_source


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    return read_anatomy(open_builtin("sd15"))


# -- addresses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("dn0", 5), ("mid", 3), ("up0", 4), ("stem", 1), ("*", 46), ("*.attn", 16), ("up*.attn", 9),
        ("dn*.l1", 7), ("dn?.down", 3), ("up3.l[01]", 4), ("dn0.l1.attn", 1),
        ("*.ca", 16), ("*.t0", 48), ("dn*.sa", 6), ("mid.l0.attn.t0.ff", 1),
    ],
)  # fmt: skip
def test_patterns_select_what_lies_under_them(anatomy: Anatomy, pattern: str, count: int) -> None:
    selection = anatomy.select(pattern).expect(count)
    assert all(address.covers(pattern, unit.at) for unit in selection)


def test_selection_states_its_size(anatomy: Anatomy) -> None:
    with pytest.raises(LeansdError, match=r"expected 4 units, selected 5: dn0\.l0\.res"):
        anatomy.select("dn0").expect(4)


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [("up4", "up3"), ("dn0.l1.atn", "dn0.l1.attn"), ("nonsense", "its blocks are stem dn0")],
)
def test_pattern_without_match_is_an_error_with_an_offer(
    anatomy: Anatomy, pattern: str, hint: str
) -> None:
    with pytest.raises(LeansdError, match=f"'{pattern}' matches nothing.*{hint}"):
        anatomy.select(pattern)


# -- key steps -----------------------------------------------------------------------------


def test_key_step_modes() -> None:
    assert keysteps.uniform(10, 4) == (0, 4, 8)
    assert keysteps.quadratic(20, 5) == (0, 1, 3, 7, 13)
    assert keysteps.quadratic(20, 5, dense="late") == (0, 7, 13, 17, 19)
    assert keysteps.staged(10, {0: 1, 3: 2, 7: 3}) == (0, 1, 2, 3, 5, 7)
    assert keysteps.window(8, (0, 4), start=2, stop=7) == (0, 1, 4, 7)
    assert keysteps.explicit(9, [4, 0, 4]) == (0, 4)


@pytest.mark.parametrize("power", [1, 1.2, 1.4, 2, 3])
@pytest.mark.parametrize("centre", [0, 7, 15, 50])
def test_centred_power_is_densest_at_its_centre(centre: float, power: float) -> None:
    keys = keysteps.centred_power(50, 10, centre, power)
    assert len(keys) == 10
    gaps = [after - before for before, after in zip(keys, (*keys[1:], 50), strict=True)]
    assert all(gap > 0 for gap in gaps)
    if power >= 1.4:
        middles = [key + gap / 2 for key, gap in zip(keys, gaps, strict=True)]
        nearest = min(range(10), key=lambda index: abs(middles[index] - centre))
        assert gaps[nearest] <= min(gaps) + 1


@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_every_mode_gives_distinct_rising_steps_from_zero(steps: int) -> None:
    for count in range(1, steps + 1):
        for keys in (
            keysteps.quadratic(steps, count),
            keysteps.quadratic(steps, count, dense="late"),
            keysteps.centred_power(steps, count, steps / 2),
        ):
            assert keys[0] == 0
            assert list(keys) == sorted(set(keys))
            assert len(keys) == count
            assert keys[-1] < steps


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: keysteps.uniform(10, 0), "interval must be at least 1"),
        (lambda: keysteps.quadratic(10, 11), "1 to 10 key steps, not 11"),
        (lambda: keysteps.explicit(10, [1, 2]), "first step, 0, must be a key step"),
        (lambda: keysteps.explicit(10, [0, 10]), "key step 10 lies outside"),
        (lambda: keysteps.staged(10, {2: 2}), "starts at step 0"),
        (lambda: keysteps.window(10, [0], 5, 11), "does not lie in a run of 10"),
        (lambda: keysteps.centred_power(10, 3, 11), "centre must lie in the run"),
    ],
)
def test_bad_key_steps_say_why(make: object, message: str) -> None:
    with pytest.raises(LeansdError, match=message):
        make()  # type: ignore[operator]


# -- plans ---------------------------------------------------------------------------------


def test_every_and_inherit_join() -> None:
    plan = Plan.every(3, cut="up2.up", steps=9, how="forecast").inherit("mid", at=[4, 6])
    assert plan.steps == 9
    assert plan.keys == (0, 3)
    assert plan.rows[4].inherit == {"up2.up": "forecast", "mid": "reuse"}
    assert plan.rows[6].inherit == {"mid": "reuse"}


def test_later_inherit_overrules(anatomy: Anatomy) -> None:
    plan = Plan.full(3).inherit("mid", at=1).inherit("mid.l1", at=1, how="residual")
    resolved = plan.resolve(anatomy)[1]
    assert resolved["mid.l0.attn"] == "reuse"
    assert resolved["mid.l1.res"] == "residual"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plan.full(0), "at least one step"),
        (lambda: Plan.full(3).inherit("mid", at=0), "step 0 cannot inherit mid"),
        (lambda: Plan.full(3).inherit("mid", at=[1, 3]), "step 3 lies outside a plan of 3 steps"),
        (
            lambda: Plan.full(3).inherit("mid", at=1, how="magic"),
            "step 1, mid: unknown how 'magic'",
        ),
    ],
)
def test_impossible_plans_name_step_and_address(make: object, message: str) -> None:
    with pytest.raises(LeansdError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("pattern", "how", "message"),
    [
        ("dn0.*.sa", "residual", "step 1: dn0.l0.attn.t0.sa is itself added to its input"),
        ("up3", "residual", "step 1: up3.l0.res cannot inherit its residual: it takes 960"),
        ("dn0.down", "residual", "step 1: dn0.down cannot inherit its residual: it changes"),
        ("dn9", "reuse", "step 1: address 'dn9' matches nothing"),
    ],
)
def test_plans_are_checked_against_the_anatomy(
    anatomy: Anatomy, pattern: str, how: str, message: str
) -> None:
    plan = Plan.full(3).inherit(pattern, at=1, how=how)  # type: ignore[arg-type]
    with pytest.raises(LeansdError, match=message):
        compile_plan(plan, anatomy)


def test_fit_keeps_density_and_is_exact_for_uniform_plans() -> None:
    plan = Plan.every(3, cut="mid", steps=30)
    assert plan.fit(30) is plan
    assert plan.fit(60).keys == tuple(range(0, 60, 3))
    assert plan.fit(15).keys == tuple(range(0, 15, 3))
    assert plan.fit(1).keys == (0,)
    assert Plan.full(30).fit(50).keys == tuple(range(50))
    early = presets.preset("turbo", steps=30)
    assert len(early.fit(50).keys) == round(len(early.keys) * 50 / 30)


def test_fingerprint_is_of_what_the_plan_does() -> None:
    plan = Plan.every(3, cut="mid", steps=6)
    assert plan.fingerprint == plan.rename("other").fingerprint
    assert plan.fingerprint != Plan.every(2, cut="mid", steps=6).fingerprint
    one = Plan.full(2).inherit("mid", "dn3", at=1)
    assert one.fingerprint == Plan.full(2).inherit("dn3", "mid", at=1).fingerprint


# -- liveness ------------------------------------------------------------------------------


@pytest.mark.parametrize(("cut", "computed"), [("up3.l1", 4), ("up2", 12), ("stem dn* mid", 25)])
def test_what_nobody_reads_is_idle(anatomy: Anatomy, cut: str, computed: int) -> None:
    """Four of 46 units run for DeepCache's shallowest branch, 25 for encoder propagation."""
    inherits = Plan.full(2).inherit(*cut.split(), at=1).resolve(anatomy)[1]
    pattern = find_pattern(anatomy, inherits)
    assert len(pattern.computed) == computed
    assert pattern.computed | set(pattern.inherited) | pattern.idle == set(anatomy.addresses)


def test_forecast_keeps_two_outputs_of_distinct_moments(anatomy: Anatomy) -> None:
    plan = Plan.between([0, 1, 2, 4], cut="mid", steps=6, how="forecast")
    calls = compile_plan(plan, anatomy, moments=[900, 800, 800, 600, 400, 200]).calls
    assert [kept.call for kept in calls[3].sources["mid.l1.res"][0]] == [2, 0]
    assert [kept.call for kept in calls[5].sources["mid.l1.res"][0]] == [4, 2]
    assert calls[1].keeps == {}


def test_program_keeps_no_longer_than_read(anatomy: Anatomy) -> None:
    plan = Plan.every(3, cut="up2.up", steps=7)
    alive = [len(kept) for kept in compile_plan(plan, anatomy).alive]
    assert alive == [1, 1, 0, 1, 1, 0, 0]


# -- presets -------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_every_preset_fits_every_step_count_and_model(model: str) -> None:
    anatomy = read_anatomy(open_builtin(model))
    for name, steps in product(presets.PRESETS, [1, 2, 8, 30, 50]):
        plan = leansd.preset(name, steps=steps, blocks=anatomy.up_blocks)
        assert plan.name == name
        nets = {net: Net(anatomy) for net in plan.nets}
        assert len(compile_plan(plan, anatomy, nets=nets).calls) == steps, (name, steps)


@pytest.mark.parametrize("given", [None, 3, {"balanced": 1}])
def test_what_is_no_plan_is_told(given: Any) -> None:
    with pytest.raises(LeansdError, match=r"a plan is a leansd\.Plan, the name of a preset or"):
        find_source(given)


def test_unknown_presets_and_options_say_what_there_is() -> None:
    with pytest.raises(LeansdError, match="no preset 'balansed'; did you mean balanced"):
        leansd.preset("balansed")
    with pytest.raises(LeansdError, match=r"preset fast has no option 'cut'; it has none"):
        leansd.preset("fast", cut="mid")
    with pytest.raises(LeansdError, match="branch 12 does not exist"):
        leansd.preset("deepcache", branch=12)


ODD_VALUES = ["x", "", None, 0, -1, -5, 100, 2.5, nan, inf, 10**20, True, {}]
ODD_VALUES += [[], [0], [-1], [99], ["x"], [None]]


@pytest.mark.parametrize("name", presets.PRESETS)
def test_any_value_of_an_option_gives_a_plan_or_a_sentence(name: str) -> None:
    for option in presets.PRESETS[name].options:
        for value in ODD_VALUES:
            with contextlib.suppress(LeansdError):
                assert leansd.preset(name, 6, **{option: value}).steps == 6
        with pytest.raises(LeansdError, match=rf"preset {name}: {option}"):
            leansd.preset(name, 6, **{option: object()})


def test_stretching_keeps_what_is_no_inheritance() -> None:
    for count in (8, 20, 45):
        stretched = leansd.preset("guidance-cutoff", 30).fit(count)
        assert stretched.fingerprint == leansd.preset("guidance-cutoff", count).fingerprint
    tuned = Tuned("ddim", "ab12")
    plan = replace(Plan.full(10), tuned=tuned).guide("forecast", at=range(1, 10, 2))
    stretched = plan.fit(20)
    assert stretched.tuned == tuned
    assert sum(row.guidance == "forecast" for row in stretched.rows) == 10
    guarded = Plan.full(6).guard("sample", threshold=0.1).correct({3: 0.5}).fit(12)
    assert guarded.drift is not None
    assert sum(any(row.correct) for row in guarded.rows) == 2


def test_a_new_way_to_inherit_is_one_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anatomy: Anatomy
) -> None:
    toy = Method(
        "twice the last", 1, lambda now, then, calls: (2.0,), "2", "doubled", "#101010", ""
    )
    with pytest.raises(LeansdError, match="unknown how 'toy'"):
        Plan.every(2, cut="mid", steps=4, how="toy")
    monkeypatch.setitem(METHODS, "toy", toy)
    plan = Plan.every(2, cut="mid", steps=4, how="toy")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    call = compile_plan(plan, anatomy).calls[1]
    assert call.sources["mid.l1.res"] == ((Kept("mid.l1.res", 0, "output"),),)
    assert "2" in plan.draw(anatomy)
    legend = draw_picture(plan, anatomy).axes[0].get_legend().get_texts()
    assert "doubled" in [text.get_text() for text in legend]


def test_what_a_summary_says_can_be_chosen_in_python_can_be() -> None:
    said = {
        name: each.summary.partition("(in Python: ")[2].rstrip(")")
        for name, each in presets.PRESETS.items()
    }
    assert said["deepcache"] == "interval, branch"
    for name, options in said.items():
        assert set(filter(None, options.split(", "))) <= set(presets.PRESETS[name].options)
        assert "option" not in presets.PRESETS[name].summary, "the command line takes none"


@pytest.mark.parametrize("name", METHODS)
def test_weights_of_exact_methods_add_up_and_follow_a_line(name: str) -> None:
    method, then = METHODS[name], (2.5, 1.0, -0.5)[: METHODS[name].depth]
    weights = method.weights(4, then if method.axis == "log_snr" else (3, 1, 0), 9)
    if method.is_exact:
        assert sum(weights) == pytest.approx(1)
    if method.weights is lagrange:
        line = [3 * place + 2 for place in then]
        read = sum(weight * value for weight, value in zip(weights, line, strict=True))
        assert read == pytest.approx(3 * 4 + 2)
        assert lagrange(4, (1.0, 1.0)) == (1.0, 0.0)


# -- files ---------------------------------------------------------------------------------


def test_plans_survive_a_file(tmp_path: Path) -> None:
    for name in presets.PRESETS:
        plan = leansd.preset(name, steps=9)
        plan.save(tmp_path / "plan.json")
        loaded = Plan.load(tmp_path / "plan.json")
        assert loaded == plan
        assert loaded.fingerprint == plan.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("rows"), "rows is missing"),
        (lambda d: d.update(format="x"), "format"),
        (lambda d: d.update(version=99), "has plan format 99, this leansd reads up to 2"),
        (lambda d: d.update(steps=3), "says 3 steps and has 4 rows"),
        (lambda d: d["rows"][1]["inherit"].update(mid="magic"), "step 1, mid: unknown how 'magic'"),
        (lambda d: d["rows"][0].update(inherit={"mid": "reuse"}), "step 0 cannot inherit mid"),
        (lambda d: d.update(colour="red"), "colour: there is no such key"),
    ],
)
def test_corrupt_plan_files_say_where(tmp_path: Path, change: object, message: str) -> None:
    path = tmp_path / "plan.json"
    Plan.every(2, cut="mid", steps=4).save(path)
    document = json.loads(path.read_text())
    change(document)  # type: ignore[operator]
    path.write_text(json.dumps(document))
    with pytest.raises(LeansdError, match=message):
        Plan.load(path)


def test_unreadable_plan_files(tmp_path: Path) -> None:
    with pytest.raises(LeansdError, match="cannot read the plan"):
        Plan.load(tmp_path / "none.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{"steps": 3, ')
    with pytest.raises(LeansdError, match=r"broken\.json is not a valid plan file"):
        Plan.load(broken)
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LeansdError, match="it is not text"):
        Plan.load(broken)
    with pytest.raises(LeansdError, match="cannot write into"):
        Plan.full(2).save(broken / "below" / "plan.json")


# -- drawing -------------------------------------------------------------------------------


def test_grid_shows_every_unit_and_step(anatomy: Anatomy) -> None:
    plan = Plan.every(3, cut="up3.l1", steps=7, how="forecast").inherit("mid", at=3)
    lines = {line.split()[0]: line.split()[-1] for line in plan.draw(anatomy).splitlines()[2:-1]}
    assert list(lines) == list(anatomy.addresses)
    assert lines["up3.l1.attn"] == "#~~#~~#"
    assert lines["mid.l1.res"] == "#..=..#"
    assert lines["mid.l0.res"] == "#.....#"
    assert lines["head"] == "#######"
    assert "up3.l1" in str(plan)


def test_grid_has_lines_for_parts_and_guidance_where_they_matter(anatomy: Anatomy) -> None:
    plan = Plan.full(4).inherit("mid.*.ca", at=[1, 2]).guide("drop", at=3)
    lines = {line.split()[0]: line.split()[-1] for line in plan.draw(anatomy).splitlines()[2:-1]}
    assert lines["mid.l0.attn.t0.ca"] == "#==#"
    assert lines["guidance"] == "###."
    assert len(lines) == 46 + 2
    assert "guidance ###." in str(plan)


def test_picture_has_a_cell_for_every_state(anatomy: Anatomy) -> None:
    plan = Plan.between([0, 1, 4, 8], cut="head", steps=10, how="forecast")
    axes = draw_picture(plan, anatomy).axes[0]
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 10), (46, 0))
    used = [text.get_text() for text in axes.get_legend().get_texts()]
    assert used == ["computed", "forecast", "idle"]
    assert {state for row in list_states(plan, anatomy).values() for state in row} == {
        "compute", "forecast", "idle",
    }  # fmt: skip


def test_draw_needs_no_unet_and_writes_pictures(tmp_path: Path, anatomy: Anatomy) -> None:
    plan = leansd.preset("balanced", steps=10).guide("drop", at=9)
    assert plan.draw() == str(plan)
    assert plan.draw(anatomy, picture=tmp_path / "units.png") == plan.draw(anatomy)
    plan.draw(picture=tmp_path / "rows.svg")
    Plan.full(3).draw(picture=tmp_path / "full.png")
    assert all(path.stat().st_size > 1000 for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 3


def test_plans_import_no_torch() -> None:
    code = "import sys, leansd, leansd.plans; assert not {'torch', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
