"""The path of a GPU user without a GPU: PyTorch's fake tensors on a device that is not there.

Reading a value, or mixing devices, raises there, so a run that gets through waits for nothing.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode

import leansd
from conformance.models import small_unet
from leansd.evaluation.inner_timing import time_units
from leansd.plans import Plan
from tiny import TOKENS, WIDTH

STEPS = 5
PLANS = {
    "full": Plan.full(STEPS),
    "reuse": Plan.every(2, cut="up1.l1", steps=STEPS),
    "residual": Plan.every(2, cut="*.attn", steps=STEPS, how="residual"),
    "forecast": Plan.between([0, 1, 3], cut="head", steps=STEPS, how="forecast"),
    "corrected": Plan.between([0, 1, 3], cut="head", steps=STEPS, how="forecast").correct(
        {3: (0.4, 0.2)}
    ),
    "gate": Plan.full(STEPS).inherit("*.ca", at=[2, 3, 4]),
    "gri": Plan.full(STEPS).attend("up1.l1.attn.t0.sa", by="gri", at=[1, 2]),
}


@pytest.fixture(autouse=True)
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """CUDA's events, doubled: what is done with them."""
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("record")

        def synchronize(self) -> None:
            done.append("wait")

        def elapsed_time(self, last: Any) -> float:
            return 10.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    return done


@pytest.fixture
def simulated() -> Iterator[FakeTensorMode]:
    with FakeTensorMode() as mode:
        yield mode


def make_unet(dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            return small_unet()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float16) for name in PLANS),
        # Weights of sums and what GRI makes are all that a precision of the run has a part in.
        *(
            (name, dtype)
            for name in ("corrected", "gri")
            for dtype in (torch.float32, torch.bfloat16)
        ),
    ],
)
def test_no_step_of_a_run_waits_for_the_device(
    name: str, dtype: torch.dtype, simulated: FakeTensorMode, events: list[str]
) -> None:
    unet = make_unet(dtype)
    sample = torch.randn(2, 4, 8, 8, device="cuda", dtype=dtype)
    text = torch.randn(2, TOKENS, WIDTH, device="cuda", dtype=dtype)
    with torch.no_grad(), leansd.inherit(unet, PLANS[name]) as run:
        for moment in range(900, 900 - 100 * STEPS, -100):
            noise = unet(sample, moment, text).sample
            assert noise.device.type == "cuda"
            assert noise.dtype == dtype
            sample = sample - 0.1 * noise
    assert "wait" not in events
    assert run._follower.last is not None
    assert len(run._follower.last.calls) == STEPS


def test_seconds_are_asked_of_the_device_when_the_run_is_over(
    simulated: FakeTensorMode, events: list[str]
) -> None:
    unet = make_unet()
    sample = torch.randn(1, 4, 8, 8, device="cuda")
    text = torch.randn(1, TOKENS, WIDTH, device="cuda")
    with torch.no_grad(), leansd.inherit(unet, Plan.full(1)) as run:
        unet(sample, 900, text)
    assert events == ["record", "record"]
    assert run._follower.last is not None
    assert run._follower.last.times[0]() == pytest.approx(0.01)
    assert events[-1] == "wait"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_and_reports_on_the_processor(dtype: torch.dtype) -> None:
    unet = small_unet().to(dtype)
    sample, text = torch.randn(2, 4, 8, 8, dtype=dtype), torch.randn(2, TOKENS, WIDTH, dtype=dtype)
    with torch.no_grad(), leansd.inherit(unet, PLANS["reuse"]) as run:
        for moment in range(900, 900 - 100 * STEPS, -100):
            noise = unet(sample, moment, text).sample
    assert noise.dtype == dtype
    assert "predicted" in str(run.report())


def test_units_are_timed_by_events_that_are_read_when_the_call_is_done(
    simulated: FakeTensorMode, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: events.append("synchronize"))
    unet = make_unet(torch.float16)
    seen: list[int] = []
    times = time_units(
        unet, batch=1, latent=8, tokens=5, repeats=2, on_call=lambda _: seen.append(len(events))
    )
    assert times.call.median == pytest.approx(0.01)
    assert set(times.medians) >= {unit.at for unit in leansd.dissect(small_unet())}
    first = events[: events.index("synchronize")]
    assert set(first) == {"record"}  # nothing is asked of the device within a call
    assert events.count("synchronize") == len(seen) == 3
