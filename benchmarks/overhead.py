"""What the engine itself costs: DeepCache's plan here against the DeepCache package, in turns.

    python benchmarks/overhead.py [--model sd15] [--rounds 3]

On a UNet of Stable Diffusion 1.5's size with random weights: the speed-up of DeepCache's branch 0
by this package and by its own, of the same paired rounds; what the times of the units that a plan
runs predict; and the microseconds that the wrapper adds to a unit's call. Records go to
`benchmarks/results/overhead.jsonl`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import typer
from torch import nn

import leansd
from leansd.anatomy.reading import read_anatomy
from leansd.cli.terminal import hush_libraries
from leansd.evaluation.inner_timing import time_run
from leansd.evaluation.random_pipelines import build_stand_in
from leansd.evaluation.records import Record, stamp, write_records
from leansd.evaluation.rivals import apply_deepcache
from leansd.evaluation.timing import compare_timings, time_cases
from leansd.loading import load
from leansd.plans.compile import compile_plan
from leansd.plans.plan import Plan
from leansd.plans.presets import preset
from leansd.runtime.engine import Engine
from leansd.runtime.hooks import ForwardHooks

RESULTS = Path(__file__).parent / "results" / "overhead.jsonl"
GUIDANCE = 7.5


def predict_from_units(pipe: Any, plan: Plan, arguments: dict[str, Any]) -> float:
    """The UNet's speed-up that follows from the times of its units in one full run.

    What a call spends besides its units is taken to be in proportion to them.
    """
    anatomy = read_anatomy(pipe.unet)
    laps = time_run(pipe, Plan.full(plan.steps), arguments, anatomy=anatomy)
    times = {unit.at: median(call.inside[unit.at] for call in laps.calls) for unit in anatomy.units}
    whole = sum(times.values())
    spent = [
        sum(times[at] for at in call.pattern.computed) for call in compile_plan(plan, anatomy).calls
    ]
    return plan.steps * whole / sum(spent)


def time_wrapper(calls: int = 100_000) -> float:
    """Microseconds that a hooked unit's call takes longer than a bare one, in a full call."""
    pipe = load("emoji")
    unit, given = nn.Identity(), torch.zeros(1)
    with leansd.inherit(pipe.unet, Plan.full(2)) as run:
        engine: Engine = run._engine  # pyright: ignore[reportAssignmentType]
        latents, text = torch.zeros(1, 4, 16, 16), torch.zeros(1, 24, 128)
        laps: list[float] = []

        def measure(name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            """Inside a UNet call, where the engine has a pass to ask."""
            with ForwardHooks({"mid.l0.res": unit}, engine._around):
                hooked, bare = unit.forward, nn.Identity().forward
                laps.append(_time_calls(hooked, given, calls) - _time_calls(bare, given, calls))
            return forward(*args, **kwargs)

        with torch.no_grad(), ForwardHooks({"probe": pipe.unet.conv_act}, measure):
            pipe.unet(latents, 10, text)
    return min(laps) * 1e6


def _time_calls(forward: Callable[..., Any], given: torch.Tensor, calls: int) -> float:
    """Seconds of a call, the least of five repeats."""
    laps: list[float] = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls // 5):
            forward(given)
        laps.append((time.perf_counter() - start) / (calls // 5))
    return min(laps)


def main(model: str = "sd15", rounds: int = 3, steps: int = 2, interval: int = 2) -> None:
    hush_libraries()
    wrapper = time_wrapper()
    print(f"wrapper: {wrapper:.2f} microseconds a call")
    pipe: Any = build_stand_in(model)
    pipe.set_progress_bar_config(disable=True)
    arguments = {
        "prompt": "a red apple",
        "num_inference_steps": steps,
        "guidance_scale": GUIDANCE,
        "output_type": "latent",
    }
    plan = preset("deepcache", steps, blocks=len(pipe.unet.up_blocks), interval=interval)

    def run_plan(_: int) -> None:
        with leansd.inherit(pipe, plan):
            pipe(**arguments)

    def run_package(_: int) -> None:
        with apply_deepcache(interval, 0)(pipe):
            pipe(**arguments)

    cases = {"full": lambda _: pipe(**arguments), "leansd": run_plan, "DeepCache": run_package}
    timings = time_cases(cases, rounds=rounds)
    predicted = median(predict_from_units(pipe, plan, arguments) for _ in range(2))
    shared: dict[str, Any] = {
        **stamp(pipe.device), "subject": model, "steps": steps, "interval": interval,
        "rounds": rounds, "guidance": GUIDANCE,
    }  # fmt: skip
    records = [Record(**shared, plan="full", metric="wrapper", value=wrapper, unit="us")]
    for name in ("leansd", "DeepCache"):
        gain = compare_timings(timings["full"], timings[name])
        print(f"{name}: {gain}")
        records.append(
            Record(
                **shared, plan=name, metric="speedup", value=gain.median, unit="x",
                low=gain.low, high=gain.high,
            )
        )  # fmt: skip
    ours = compare_timings(timings["DeepCache"], timings["leansd"])
    print(f"leansd against DeepCache: {ours}; predicted from units {predicted:.3f}x")
    records += [
        Record(**shared, plan="leansd", metric="predicted_speedup", value=predicted, unit="x"),
        Record(
            **shared, plan="leansd", metric="speedup_over_package", value=ours.median, unit="x",
            low=ours.low, high=ours.high,
        ),
    ]  # fmt: skip
    write_records(RESULTS, records)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    typer.run(main)
