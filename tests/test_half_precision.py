"""The library's verbs in half precision, as everybody with a GPU uses them, on the CPU.

Commands are in `test_cli.py`, pictures of every kind of pipeline in the conformance suite.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import leansd
from leansd.errors import LeansdError
from leansd.evaluation.bench import BenchSettings, PreparedContest, compare_contest, list_records
from leansd.evaluation.compare import Case
from leansd.evaluation.records import stamp
from leansd.evaluation.rivals import Contest
from leansd.evaluation.runs import FULL, CallSet
from leansd.plans import Plan
from leansd.tuning.drift import measure_drift
from tiny import shallow_unet, tiny_pipeline

STEPS = 4
CALLS = ["a", "b", "c", "d"]
REUSE = Plan.every(2, cut="up0.l0", steps=STEPS, name="reuse")
WHOLE = Plan.between([0, 1, 3], cut="head", steps=STEPS, how="forecast").correct({3: (0.4, 0.2)})
NARROW: dict[str, Any] = {"block_out_channels": (16,)}
"""A CPU convolves in half precision seven times as slowly."""
DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def pipe(request: Any) -> Any:
    return tiny_pipeline(unet=shallow_unet(**NARROW)).to(request.param)


def draw(pipe: Any, plan: Plan, **options: Any) -> torch.Tensor:
    # What is compiled has a suite of its own; its arithmetic around the graphs runs here.
    stance = torch.compiler.set_stance("force_eager")
    with stance, leansd.inherit(pipe, plan, **options) as run:
        drawn = pipe(
            "a", num_inference_steps=STEPS, output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip
    assert "predicted" in str(run.report())
    assert run.report().fault == ""
    return drawn


PLANS: dict[str, Callable[[], tuple[Plan, dict[str, Any]]]] = {
    "reuse": lambda: (REUSE, {}),
    "residual": lambda: (Plan.every(2, cut="mid.l0.attn", steps=STEPS, how="residual"), {}),
    "whole": lambda: (WHOLE, {}),
    "guidance": lambda: (Plan.full(STEPS).guide("forecast", at=[2, 3]), {}),
    "adaptive": lambda: (REUSE.guard("stem", threshold=0.5), {}),
    "gri": lambda: (Plan.full(STEPS).attend("mid.l0.attn.t0.sa", by="gri", at=[1, 2]), {}),
    "nets": lambda: (Plan.full(STEPS).switch("light", at=[1, 2]), {"nets": None}),
    "compiled": lambda: (REUSE, {"compile": {"backend": "eager"}}),
}


@pytest.mark.parametrize("name", PLANS)
def test_every_way_to_inherit_runs(pipe: Any, name: str) -> None:
    plan, options = PLANS[name]()
    if "nets" in options:
        options["nets"] = {"light": shallow_unet(1, **NARROW).to(pipe.dtype)}
    drawn = draw(pipe, plan, **options)
    assert drawn.dtype == pipe.dtype
    assert drawn.isfinite().all()


def test_what_measures_measures(pipe: Any) -> None:
    records = leansd.evaluate(pipe, [REUSE, WHOLE], CALLS, steps=STEPS, references=[FULL])
    assert {each.plan for each in records} == {FULL, "reuse", WHOLE.name}
    cost = leansd.profile(pipe, repeats=1)
    assert cost.predict_speedup is not None
    assert measure_drift(pipe, CallSet(CALLS[:1]), STEPS)
    settings = BenchSettings(
        "tiny", CALLS, [], lambda contest, blocks: (), batch=1, spread_sets=0, converged_steps=6
    )
    prepared = PreparedContest(
        Contest("text-to-image", "ddim", STEPS, 3.0),
        pipe,
        (Case(FULL, STEPS, family=FULL), Case("reuse", STEPS, REUSE, family="ours")),
        CALLS,
        0,
        {},
    )
    compared = compare_contest(prepared, settings)
    assert list_records(prepared, settings, compared, stamp("cpu"))


def test_what_searches_finds(pipe: Any) -> None:
    front = leansd.tune(pipe, CALLS, steps=STEPS, speeds=(1.5,), grids=(1.0,), tries=0)
    assert front.points
    found = leansd.cut(pipe, CALLS[:1], budget=0.9, of="macs", steps=2, moments=1, tries=0)
    assert found.measured_error < 10


def test_what_makes_nets_makes_them_in_their_precision(pipe: Any, tmp_path: Path) -> None:
    surgery = leansd.Surgery("light").drop("mid.l0.attn")
    assert leansd.preview(pipe.unet, surgery).after.macs < leansd.dissect(pipe.unet).macs
    student, _ = leansd.operate(pipe.unet, surgery)
    assert student.dtype == pipe.dtype
    student.save_pretrained(tmp_path / "light")
    opened = leansd.load_unet(tmp_path / "light", device="cpu", dtype=pipe.dtype)
    assert opened.dtype == pipe.dtype
    leansd.export(pipe.unet, tmp_path / "plain", to="diffusers")
    assert leansd.load_unet(tmp_path / "plain", device="cpu").conv_in.weight.isfinite().all()
    with pytest.raises(LeansdError, match="export it in float32"):
        leansd.export(pipe.unet, tmp_path / "onnx", to="onnx")
