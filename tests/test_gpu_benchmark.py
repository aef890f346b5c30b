"""The GPU benchmark's logic, on a CPU; without a GPU it says so and measures nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer

from leansd.anatomy import read_anatomy
from leansd.anatomy.builtin import open_builtin
from leansd.evaluation.records import load_records
from leansd.plans import Plan
from loops import load_script
from tiny import shallow_unet, tiny_pipeline

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


@pytest.fixture(autouse=True)
def traced() -> Iterator[None]:
    """Nothing: what is compiled has a suite of its own, and tracing takes long."""
    with torch.compiler.set_stance("force_eager"):
        yield


def test_every_plan_in_every_mode_is_recorded() -> None:
    records = load_script(SCRIPT).measure(
        shallow_unet(),
        "cpu",
        subject="tiny",
        plans={"full": None, "halves": Plan.every(2, cut="up0.l0", steps=2)},
        modes={"eager": False, "compiled": {"backend": "eager"}},
        steps=2,
        rounds=2,
        latent=8,
    )
    told = [(each.plan, each.model_extra["mode"], each.metric) for each in records]
    assert told == [
        (plan, mode, metric)
        for plan in ("full", "halves")
        for mode in ("eager", "compiled")
        for metric in ("seconds", "speedup")
    ]
    assert records[1].value == 1.0


def test_a_dry_run_checks_measures_and_leaves_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load_script(SCRIPT)
    monkeypatch.setattr(script, "DRY_MODES", {"eager": False})
    monkeypatch.setattr(script, "STEPS", 4)
    monkeypatch.setattr(
        script, "make_unet", lambda name, device, dtype, **_: shallow_unet().to(device, dtype)
    )
    model = tmp_path / "secret" / "mine"
    tiny_pipeline(unet=shallow_unet()).save_pretrained(model)
    out = tmp_path / "gpu.jsonl"
    options = {"steps": 3, "rounds": 1, "latent": None, "seed": 0}
    script.main(str(model), out=out, dry_run=True, **options)
    records = load_records(out)
    checks = [each for each in records if each.metric == "check"]
    assert {each.subject for each in checks} == {"tiny sd15", "tiny sdxl", "mine"}
    assert len(checks) == 2 * 2 * (2 + 3 * 3) + 2
    assert all(each.value for each in checks)
    timed = {each.subject for each in records if each.metric == "speedup"}
    assert timed == {"tiny sd15", "tiny sdxl", "mine"}
    assert "secret" not in out.read_text()
    assert "says nothing about a GPU" in capsys.readouterr().out


def test_a_check_that_fails_or_raises_is_told_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script(SCRIPT)
    monkeypatch.setattr(script, "_same", lambda *_: (False, ""))
    checks = script.Checks("net")
    script.check_bits(checks, shallow_unet(), 8)
    checks.add("it raises", lambda: 1 / 0)
    assert [each.holds for each in checks.done] == [False, True, False]
    assert "FAILED  net: it raises  ZeroDivisionError" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_tiny_nets_have_the_units_of_the_large_ones(name: str) -> None:
    tiny = load_script(SCRIPT).make_unet(name, "cpu", torch.float32, is_tiny=True)
    small, large = read_anatomy(tiny), read_anatomy(open_builtin(name))
    assert small.blocks == large.blocks
    assert {unit.at for unit in small.units} < {unit.at for unit in large.units}


def test_without_a_gpu_it_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(typer.Exit) as left:
        load_script(SCRIPT).main()
    assert left.value.exit_code == 2
    assert "no GPU" in capsys.readouterr().err
