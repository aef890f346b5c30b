"""Runs that give NaN or Inf: told once, by the step, and never measured as if they were sound."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import leansd
from leansd.cli import main
from leansd.errors import LeansdError
from leansd.evaluation.compare import Case, compare_runs
from leansd.evaluation.evaluation import evaluate
from leansd.evaluation.runs import FULL, CallSet
from leansd.incubation.training_log import LossLog
from leansd.plans import Plan
from leansd.text import encode_json
from leansd.tuning.cutting import keep_calls
from leansd.tuning.error_model import calibrate
from leansd.tuning.host import PipelineHost
from loops import sample
from tiny import shallow_unet, tiny_pipeline
from watching import watch

STEPS = 5
REUSE = Plan.every(2, cut="up0.l0", steps=STEPS, name="reuse")
WHOLE = Plan.between([0, 2, 4], cut="head", steps=STEPS, name="whole")
NO_NUMBERS = [float("nan"), float("inf"), float("-inf")]


@pytest.fixture
def pipe() -> Any:
    return tiny_pipeline(unet=shallow_unet())


@contextmanager
def spoil(pipe: Any, call: int, value: float = float("nan")) -> Iterator[None]:
    """From a call on, counted from 0, the UNet's output has a number that is none."""
    calls = 0

    def hook(module: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > call:
            output[-1, 0, 0, 0] = value
        return output

    # Of no unit: what others have hooked is always computed.
    handle = watch(pipe.unet.conv_norm_out, hook)
    try:
        yield
    finally:
        handle.remove()


def draw(pipe: Any) -> None:
    pipe("a", num_inference_steps=STEPS, output_type="latent")


# plan, the computed call that is spoilt first, the step that is told, whether the plan had a part
CASES = [
    (Plan.full(STEPS), 0, 1, False),
    (Plan.full(STEPS), 3, 4, False),
    (REUSE, 0, 1, False),
    (REUSE, 2, 3, True),
    (WHOLE, 1, 3, True),
]


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize(("plan", "call", "step", "is_planned"), CASES)
def test_a_run_says_at_which_step_its_numbers_ended(
    pipe: Any, plan: Plan, call: int, step: int, is_planned: bool, value: float
) -> None:
    with leansd.inherit(pipe, plan) as run:
        with spoil(pipe, call, value), pytest.warns(UserWarning, match="NaN") as told:
            draw(pipe)
        report = run.report()
        draw(pipe)  # a sound one
        assert run.report().fault == ""
        with spoil(pipe, call, value), warnings.catch_warnings():
            warnings.simplefilter("error")  # once is enough
            draw(pipe)
    (said,) = [str(each.message) for each in told]
    blamed = "a run without the plan tells" if is_planned else "the model itself fails in float32"
    assert f"from step {step} of {STEPS} on" in said
    assert blamed in said
    assert report.fault in said
    assert report.fault in str(report)


def test_a_bare_unet_is_told_of_on_leaving() -> None:
    class Loop:
        unet = shallow_unet()

    with (
        pytest.warns(UserWarning, match=f"from step 2 of {STEPS}"),
        spoil(Loop, 1),
        leansd.inherit(Loop.unet, Plan.full(STEPS)),
    ):
        sample(Loop.unet, STEPS)


@pytest.mark.filterwarnings("ignore:the UNet's outputs")
def test_what_gives_no_numbers_is_not_measured(pipe: Any) -> None:
    """Two black pictures are equal, and no plan is good because its model is broken."""
    cases = [Case(FULL, STEPS), Case("reuse", STEPS, REUSE), Case("whole", STEPS, WHOLE)]

    def compare() -> Any:
        return compare_runs(pipe, cases, CallSet(["a", "b"], batch=2), rounds=None)

    assert not compare().require_finite().left_out
    with spoil(pipe, 0):
        broken = compare()
    assert set(broken.faults) == {"full", "reuse", "whole"}
    with pytest.raises(LeansdError, match=r"the latents of the full run .*fails in float32"):
        broken.require_finite()
    with spoil(pipe, STEPS + 3):  # after the full run
        partly = compare().require_finite()
    assert [each.case.name for each in partly] == [FULL]
    assert "1 of 2 latents of whole are not finite" in partly.left_out["whole"]
    assert set(partly.left_out) == {"reuse", "whole"}
    with spoil(pipe, 0), pytest.raises(LeansdError, match="so nothing can be held against"):
        evaluate(pipe, REUSE, ["a", "b"], steps=STEPS, references=[FULL])


def test_nothing_is_tuned_or_cut_on_a_model_without_numbers(pipe: Any) -> None:
    with spoil(pipe, 0), pytest.raises(LeansdError, match="fails in float32"):
        calibrate(PipelineHost(pipe), ["a"], STEPS, seed=0)
    with spoil(pipe, 0), pytest.raises(LeansdError, match="fails in float32"):
        keep_calls(pipe, CallSet(["a"]), STEPS)


def test_json_has_null_for_what_is_no_number(tmp_path: Path) -> None:
    found = {"a": float("nan"), "b": [1.5, float("inf"), {"c": (float("-inf"), 2)}], "d": "NaN"}
    assert json.loads(encode_json(found)) == {
        "a": None, "b": [1.5, None, {"c": [None, 2]}], "d": "NaN",
    }  # fmt: skip
    log = LossLog(tmp_path / "losses.jsonl")
    log.add({"step": 1, "loss": float("nan")})
    assert json.loads(log.path.read_text()) == {"step": 1, "loss": None}
    assert log.load()[0]["loss"] != log.load()[0]["loss"]


def test_a_prediction_that_cannot_be_made_is_null(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("leansd.unets.predict_gain", lambda *_: float("nan"))
    assert main(["plan", "balanced", "--steps", "9", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["predicted_speedup"] is None
