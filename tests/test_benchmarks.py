"""The tables of the README are what the committed records say."""

import sys
from pathlib import Path

import pytest
from models.emoji import flow

from leansd.evaluation.records import get_field, load_records
from loops import load_script
from tiny import shallow_unet, tiny_pipeline

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TABLES = BENCHMARKS / "tables.py"


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*.py")), ids=lambda script: script.stem)
def test_every_script_finds_what_it_imports(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    load_script(script)


def test_tables_are_generated_from_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(TABLES), "--check"])
    load_script(TABLES).main()


def test_other_tables_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "README.md"
    page.write_text("<!-- table: gpu -->\nby hand\n<!-- end of table -->\n")
    script = load_script(TABLES)
    monkeypatch.setattr(script, "PAGES", (page,))
    monkeypatch.setattr(sys, "argv", [str(TABLES), "--check"])
    with pytest.raises(SystemExit, match=r"README\.md is not what the records say"):
        script.main()


def test_figures_are_drawn_from_the_committed_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load_script(BENCHMARKS / "figures.py")
    monkeypatch.setattr(script, "IMAGES", tmp_path)
    (tmp_path / "concepts").mkdir()
    script.main()
    drawn = {str(path.relative_to(tmp_path).with_suffix("")) for path in tmp_path.rglob("*.svg")}
    assert drawn == set(script.FIGURES)
    contests = {
        get_field(each, "settings") for each in load_records(script.RESULTS / "bench.jsonl")
    }
    assert (tmp_path / "bench.svg").read_text().count("steps, guidance") == len(contests)


def test_the_flow_model_is_called_as_it_was_trained() -> None:
    script = load_script(BENCHMARKS / "flow.py")
    assert script.ARGUMENTS == {"max_sequence_length": flow.BLANKS}


def test_few_calls_are_measured_with_one_ingredient_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load_script(BENCHMARKS / "few_calls.py")
    monkeypatch.setattr(script, "load", lambda name: tiny_pipeline(unet=shallow_unet()))
    monkeypatch.setattr(script, "RESULTS", tmp_path / "few-calls.jsonl")
    monkeypatch.setattr(script, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(script, "FEW", 4)
    script.main(
        plans="turbo", steps=12, calls=12, iterations=2, guidance=7.5,
        ingredients="mixing,lanes,calls,start",
    )  # fmt: skip
    records = [each for each in load_records(script.RESULTS) if each.metric == "psnr"]
    assert {get_field(each, "guidance") for each in records} == {7.5}
    fitted = {each.plan: each for each in records if "mixed" in each.plan}
    assert [name.removeprefix("turbo, mixed, ") for name in fitted] == [
        "nothing else", "lanes alone", "calls alone", "start alone"
    ]  # fmt: skip
    assert [get_field(each, "fitted") for each in fitted.values()] == [4, 4, 8, 4]
    by_lane = {
        name: any(row.mix.difference for row in plan.rows if row.mix is not None)
        for name, plan in (
            (name, script.Plan.load(tmp_path / "runs" / f"{name}-g7.5.json")) for name in fitted
        )
    }
    assert [name for name, told in by_lane.items() if told] == ["turbo, mixed, lanes alone"]
    with pytest.raises(script.LeansdError, match="no ingredient 'carrier'"):
        script.main(plans="turbo", steps=12, calls=12, ingredients="carrier")
    with pytest.raises(script.LeansdError, match="no beginning 'carrier'"):
        script.main(plans="turbo", steps=12, calls=12, begin="carrier")
    script.main(plans="turbo", steps=12, calls=12, iterations=1, begin="plan,steps,lines")
    keys = len(script.preset("turbo", 12, sampler="dpm++2m").keys)
    begun = {"turbo, mixed", f"{keys} steps, mixed", f"lines, {keys} calls, mixed"}
    assert begun <= {each.plan for each in load_records(script.RESULTS)}
