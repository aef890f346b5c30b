"""Tunes the embedded model for every sampler and step count; the presets are made of these fronts.

    python benchmarks/fronts.py [--sampler dpm++2m] [--steps 30] [--guidance 8]

Fronts go to `benchmarks/results/fronts/SAMPLER-STEPS.json`, those of another guidance scale than
the model's own to `SAMPLER-STEPS-gSCALE.json`, and make no presets. What was tried is kept in
journals under `runs/fronts`, and the profile that all of them go by, so that a stopped run goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from leansd.faces.cli.terminal import hush_libraries
from leansd.faces.contests import SCALE
from leansd.faces.prompts import GUIDANCE, THINGS
from leansd.loading import load
from leansd.measuring.cost import CostModel
from leansd.measuring.files import write_file
from leansd.measuring.profile import profile
from leansd.measuring.records import load_records, stamp, write_records
from leansd.plans import house
from leansd.plans.document import make_document
from leansd.plans.plan import Plan
from leansd.runtime.samplers import make_scheduler
from leansd.tuning import Front, tune
from leansd.tuning.tuner import GRIDS

RESULTS = Path(__file__).parent / "results" / "fronts"
JOURNALS = Path(__file__).parent.parent / "runs" / "fronts"
SEED = 2_000_000
"""Far from the seeds of the benchmark."""
CALLS = 8
SPEEDS = (1.5, 2.0, 2.5, 3.0)
PRESETS = 30
"""The step count that all presets are tuned at; at others, only what the benchmark compares."""
COMPARED = (1.5, 2.0, 3.0)
SPARES = [1.03, 1.07]
"""Plans are sought faster than they shall be, by little and by more: predictions are off by as
much, and a plan that misses its speed counts for nothing."""


def main(
    model: str = "emoji",
    sampler: Annotated[list[str], typer.Option()] = ["dpm++2m", "ddim", "euler"],  # noqa: B006
    steps: Annotated[list[int], typer.Option()] = [30, 20, 50],  # noqa: B006
    guidance: float = GUIDANCE,
    tries: int = 6,
    spare: Annotated[list[float], typer.Option()] = SPARES,
) -> None:
    hush_libraries()
    pipe = load(model)
    settings = {"guidance_scale": guidance}
    suffix = "" if guidance == GUIDANCE else f"-g{guidance:g}"
    cost = keep_profile(pipe, settings)
    start = time.time()

    def tell(text: str, share: float = 0.0) -> None:
        print(f"{time.time() - start:7.1f} s  {text}", flush=True)

    for count in steps:
        for name in sampler:
            tell(f"{name}, {count} steps")
            pipe.scheduler = make_scheduler(pipe, name)

            def search(
                grids: Sequence[float],
                speeds: Sequence[float],
                name: str = name,
                count: int = count,
            ) -> Front:
                return tune(
                    pipe,
                    THINGS[: 8 * CALLS : 8],
                    held_out=THINGS[4 : 8 * CALLS : 8],
                    steps=count,
                    settings=settings,
                    speeds=sorted({speed * share for speed in speeds for share in spare}),
                    grids=grids,
                    tries=tries,
                    seed=SEED,
                    cost=cost,
                    sampler=name,
                    journal=JOURNALS / f"{name}-{count}{suffix}.jsonl",
                    tell=tell,
                )

            speeds = SPEEDS if count == PRESETS else COMPARED
            front = search(GRIDS, speeds)
            # A preset must not change the step count: where the best plan does, seek another.
            missing = [speed for speed in speeds if find_preset(front, speed) is None]
            points = [*front.points, *(search((1.0,), missing).points if missing else ())]
            whole = Front(front.subject, name, count, tuple(points))
            whole.save(RESULTS / f"{name}-{count}{suffix}.json")
            tell(f"\n{whole.tabulate()}")
            if not suffix:
                write_presets()


def keep_profile(pipe: Any, settings: dict[str, Any]) -> CostModel:
    """What everything costs: measured once, and then what was measured."""
    path = JOURNALS / "cost.jsonl"
    if path.exists():
        return CostModel.from_records(load_records(path))
    cost = profile(pipe, call=settings, pictures=CALLS, repeats=3)
    write_records(path, cost.list_records(stamp(pipe.device)))
    return cost


def find_preset(front: Front, speed: float) -> Plan | None:
    """The closest plan of the front's own step count that is so fast."""
    plans = [
        (point.psnr, point.plan)
        for point in front.points
        if point.plan.steps == front.steps and not point.is_plain and point.speedup >= speed
    ]
    return max(plans, key=lambda each: each[0])[1] if plans else None


def write_presets() -> None:
    """The house presets of all fronts there are."""
    rows: list[dict[str, Any]] = []
    for path in sorted(RESULTS.glob("*.json")):
        if SCALE.search(path.stem):
            continue
        front = Front.load(path)
        found = {name: find_preset(front, speed) for name, speed in house.SPEEDS.items()}
        plans = {
            # What a preset was tuned on is no reason to refuse it elsewhere.
            name: make_document(replace(plan, name=name, tuned=None)).model_dump(
                exclude_defaults=True
            )
            for name, plan in found.items()
            if plan is not None
        }
        rows.append({"sampler": front.sampler, "steps": front.steps, "plans": plans})
    lines = ",\n".join(json.dumps(row) for row in rows)
    write_file(house.TUNED, f"[\n{lines}\n]\n")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    typer.run(main)
