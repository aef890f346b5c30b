"""The GPU benchmark's logic, on a CPU; without a GPU it says so and measures nothing."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from leansd.plans import Plan
from tiny import tiny_unet

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_plan_in_every_mode_is_recorded() -> None:
    unet = tiny_unet(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
    )
    records = load_script().measure(
        unet,
        "cpu",
        subject="tiny",
        plans={"full": None, "halves": Plan.every(2, cut="up0", steps=2)},
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


def test_without_a_gpu_it_exits_with_2() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 2
    assert "no GPU" in done.stderr
