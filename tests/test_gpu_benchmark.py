"""The GPU benchmark's logic, on a CPU; without a GPU it says so and measures nothing."""

from pathlib import Path

import pytest
import torch
import typer

from leansd.plans import Plan
from loops import load_script
from tiny import shallow_unet

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


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


def test_without_a_gpu_it_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(typer.Exit) as left:
        load_script(SCRIPT).main()
    assert left.value.exit_code == 2
    assert "no GPU" in capsys.readouterr().err
