"""Tunes the embedded model for every sampler and step count; the presets are made of these fronts.

    python benchmarks/fronts.py [--sampler dpm++2m] [--steps 30] [--guidance 8] [--strength 0.6]

Fronts go to `benchmarks/results/fronts/SAMPLER-STEPS.json`, those of another guidance scale than
the model's own to `SAMPLER-STEPS-gSCALE.json`, those of image-to-image (a strength under 1) to
`SAMPLER-STEPS-image-to-image[-sSTRENGTH].json`; the latter two make no presets. What was tried is
kept in journals under `runs/fronts`, and the profile that all of them go by, so that a stopped run
goes on; `--results` names another folder for both.

    python benchmarks/fronts.py --model MODEL --results fronts-of-mine
        --sampler dpm++2m --steps 30 --grid 1 --speed 1.5 --speed 2 --tries 2 --spare 1.03
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from leansd.cli.terminal import hush_libraries
from leansd.emoji.prompts import THINGS
from leansd.evaluation.bench import (
    OWN_SETTING,
    draw_inputs,
    list_settings,
    name_own_front,
)
from leansd.evaluation.cost import CostModel
from leansd.evaluation.profile import profile
from leansd.evaluation.prompt_sets import GUIDANCE
from leansd.evaluation.records import load_records, stamp, write_records
from leansd.evaluation.rivals import Contest, Task
from leansd.evaluation.runs import PipelineCall, expand_calls
from leansd.files import write_file
from leansd.loading import as_image_to_image, load
from leansd.plans.plan import Plan
from leansd.plans.presets import tuned
from leansd.runtime.samplers import make_scheduler
from leansd.tuning import Front, tune
from leansd.tuning.front import Point
from leansd.tuning.tuner import GRIDS

RESULTS = Path(__file__).parent / "results"
FRONTS = "fronts"
RUNS = Path(__file__).parent.parent / "runs"
SEED, INPUT_SEED = 2_000_000, 12_000_000
"""Of pictures, and of those that image-to-image starts from; far from the benchmark's."""
CALLS = 24
"""To tune on, and as many held out. With 8, corrections learn the pictures: at
2x, 45 dB where they were fitted and 35 elsewhere; with 24, 43 and 44."""
SPEEDS = [each.speedup for each in tuned.SPEED_PRESETS.values()]
SPARES = [1.03, 1.07]
"""Plans are sought faster than they shall be, by little and by more: predictions are off by as
much, and a plan that misses its speed counts for nothing."""


def main(
    model: str = "emoji",
    sampler: Annotated[list[str], typer.Option()] = ["dpm++2m", "ddim", "euler"],  # noqa: B006
    steps: Annotated[list[int], typer.Option()] = [30, 20, 50],  # noqa: B006
    guidance: float = GUIDANCE,
    speed: Annotated[list[float], typer.Option()] = SPEEDS,
    tries: int = 6,
    spare: Annotated[list[float], typer.Option()] = SPARES,
    strength: Annotated[float, typer.Option(help="under 1: pictures from pictures")] = 1.0,
    grid: Annotated[list[float], typer.Option(help="step counts, as shares")] = list(GRIDS),  # noqa: B006
    mixes: Annotated[int, typer.Option(help="further runs, to fit mixes of few calls on")] = 0,
    results: Annotated[str, typer.Option(help="another folder, which makes no presets")] = FRONTS,
) -> None:
    hush_libraries()
    pipe = load(model)
    task: Task = "image-to-image" if strength < 1 else "text-to-image"
    drawer = as_image_to_image(pipe) if strength < 1 else pipe
    start = time.time()

    def tell(text: str, share: float = 0.0) -> None:
        print(f"{time.time() - start:7.1f} s  {text}", flush=True)

    for count in steps:
        for name in sampler:
            contest = Contest(task, name, count, guidance, strength=strength)
            usual = guidance == GUIDANCE and strength == 1
            stem = f"{name}-{count}" if usual else name_own_front(contest)
            tell(stem)
            pipe.scheduler = drawer.scheduler = make_scheduler(pipe, name)
            calls, held_out = (choose_calls(pipe, contest, first) for first in (0, 1))
            search = partial(
                tune,
                drawer,
                calls,
                held_out=held_out,
                steps=count,
                settings=list_settings(contest),
                tries=tries,
                mixes=mixes,
                seed=SEED,
                cost=keep_profile(drawer, contest, calls[0], RUNS / results),
                sampler=name,
                journal=RUNS / results / f"{stem}.jsonl",
                tell=tell,
            )
            found = search(speeds=hasten(speed, spare), grids=grid)
            points = (*found.points, *found.dominated)
            # A preset must not change the step count: where the best plan does, seek another.
            missing = [each for each in speed if find_preset(points, count, each) is None]
            if missing:
                more = search(speeds=hasten(missing, spare), grids=(1.0,))
                points += (*more.points, *more.dominated)
            front = Front.of(found.subject, name, count, points)
            front.save(RESULTS / results / f"{stem}.json")
            tell(f"\n{front.tabulate()}")
            if results == FRONTS:
                write_presets()


def choose_calls(pipe: Any, contest: Contest, first: int) -> Sequence[PipelineCall]:
    """Every second thing from one on; for image-to-image, each on a picture of another."""
    things = THINGS[first::2][:CALLS]
    if contest.task == "text-to-image":
        return things
    seed, guidance = INPUT_SEED + first, contest.guidance
    return draw_inputs(pipe, things, pipe.scheduler, guidance=guidance, batch=CALLS, seed=seed)


def hasten(speeds: Sequence[float], spare: Sequence[float]) -> list[float]:
    """The speeds to seek, for those that shall be had."""
    return sorted({speed * share for speed in speeds for share in spare})


def keep_profile(drawer: Any, contest: Contest, call: PipelineCall, folder: Path) -> CostModel:
    """What everything costs: measured once for each task, and then what was measured."""
    path = folder / f"cost-{contest.task}.jsonl"
    if path.exists():
        return CostModel.from_records(load_records(path))
    arguments = {**expand_calls([call])[0], **list_settings(contest)}
    cost = profile(drawer, call=arguments, pictures=CALLS, repeats=3)
    write_records(path, cost.list_records(stamp(drawer.device)))
    return cost


def find_preset(points: Sequence[Point], steps: int, speed: float) -> Plan | None:
    """The closest plan of the full run's step count that is so fast, and slower than the next."""
    limit = min((other for other in SPEEDS if other > speed), default=math.inf)
    plans = [
        (point.psnr, point.plan)
        for point in points
        if point.plan.steps == steps and not point.is_plain and speed <= point.speedup < limit
    ]
    return max(plans, key=lambda each: each[0])[1] if plans else None


def write_presets() -> None:
    """The speed presets of all fronts there are."""
    rows: list[dict[str, Any]] = []
    for path in sorted((RESULTS / FRONTS).glob("*.json")):
        if OWN_SETTING.search(path.stem):
            continue
        front = Front.load(path)
        found = {
            name: find_preset(front.points, front.steps, speed.speedup)
            for name, speed in tuned.SPEED_PRESETS.items()
        }
        plans = {
            # What a preset was tuned on is no reason to refuse it elsewhere.
            name: replace(plan, name=name, tuned=None).to_dict()
            for name, plan in found.items()
            if plan is not None
        }
        rows.append({"sampler": front.sampler, "steps": front.steps, "plans": plans})
    lines = ",\n".join(json.dumps(row) for row in rows)
    write_file(tuned.TUNED, f"[\n{lines}\n]\n")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    typer.run(main)
