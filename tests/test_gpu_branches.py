"""What only a GPU does, with the calls doubled; every such branch is named here, with its test."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import leansd
from leansd.anatomy import read_anatomy
from leansd.evaluation.inner_timing import measure_peaks
from leansd.evaluation.records import name_device
from leansd.evaluation.timing import time_cases
from leansd.loading import find_device, find_dtype
from leansd.tuning.run_starts import find_free_memory
from loops import sample
from tiny import shallow_unet

HOME = Path(leansd.__file__).parent
TESTS = Path(__file__).parent
BRANCHES = {
    "core/devices.py": {
        "Event": "test_simulated_device.py::test_seconds_are_asked_of_the_device",
    },
    "evaluation/inner_timing.py": {
        "reset_peak_memory_stats": "test_gpu_branches.py::test_peaks_are_read",
        "memory_allocated": "test_gpu_branches.py::test_peaks_are_read",
        "max_memory_allocated": "test_gpu_branches.py::test_peaks_are_read",
    },
    "evaluation/records.py": {
        "get_device_name": "test_gpu_branches.py::test_records_name_the_device",
    },
    "evaluation/timing.py": {
        "synchronize": "test_gpu_branches.py::test_a_clock_is_read_after_the_device_is_done",
    },
    "incubation/estimate.py": {
        "synchronize": "test_incubation_harm.py::test_the_rate_of_a_gpu_is_read_after",
    },
    "incubation/training_state.py": {
        "max_memory_allocated": "test_incubation_parts.py::test_the_memory_of_a_gpu",
        "reset_peak_memory_stats": "test_incubation_parts.py::test_the_memory_of_a_gpu",
    },
    "tuning/run_starts.py": {
        "mem_get_info": "test_gpu_branches.py::test_free_memory_is_that_of_the_device",
    },
    "loading.py": {
        "is_available": "test_loading.py::test_accelerators_that_are_not_there_are_told",
        "device_count": "test_loading.py::test_a_gpu_of_too_high_a_number_is_told",
    },
}  # fmt: skip
"""Calls of `torch.cuda` by file and name, and where each is tried."""


def test_every_call_of_the_device_has_a_test() -> None:
    found: dict[str, set[str]] = {}
    for path in HOME.rglob("*.py"):
        names = set(re.findall(r"torch\.cuda\.(\w+)", path.read_text(encoding="utf-8")))
        if names:
            found[path.relative_to(HOME).as_posix()] = names
    assert found == {file: set(names) for file, names in BRANCHES.items()}
    for names in BRANCHES.values():
        for place in names.values():
            file, _, test = place.partition("::")
            assert f"def {test}" in (TESTS / file).read_text(encoding="utf-8"), place


def test_a_clock_is_read_after_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: order.append("wait"))
    time_cases({"a": lambda _: order.append("work")}, rounds=2, warmup=0, device="cuda:0")
    assert order == ["wait", "work", "wait"] * 2


def test_peaks_are_read_of_every_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each unit's own: what it allocates on top of what there was."""
    state = {"now": 100, "peak": 0, "resets": 0}

    def reset(_: Any) -> None:
        state["peak"] = state["now"]
        state["resets"] += 1

    def peak(_: Any) -> int:
        return state["peak"] + 7

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: state["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peak)
    unet = shallow_unet()

    class Loop:
        device = torch.device("cuda")

        def __init__(self) -> None:
            self.unet = unet

        def __call__(self) -> None:
            sample(unet, 1)

    anatomy, seen = read_anatomy(unet), []
    peaks = measure_peaks(Loop(), {}, anatomy, seen.append)
    assert peaks == {unit.at: 7 for unit in anatomy.units}
    assert state["resets"] == len(seen) == len(anatomy.units)


def test_records_name_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    name_device.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A Card")
    assert name_device("cuda:0") == "cuda: A Card"
    name_device.cache_clear()


def test_free_memory_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5, 9))
    assert find_free_memory(torch.device("cuda:0")) == 5


def test_a_gpu_is_the_default_and_its_precision_is_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device() == torch.device("cuda")
    assert find_dtype(torch.device("cuda", 1)) == torch.float16
    assert find_dtype(torch.device("cpu")) == find_dtype(torch.device("mps")) == torch.float32
