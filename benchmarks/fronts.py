"""Tunes the embedded model for every sampler and step count; the presets are made of these fronts.

    python benchmarks/fronts.py [--sampler dpm++2m] [--steps 30]

Fronts go to `benchmarks/results/fronts/SAMPLER-STEPS.json`. What was tried is kept in a journal
beside them, which git ignores, so that a stopped run goes on.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from leansd.faces.cli.terminal import hush_libraries
from leansd.faces.prompts import GUIDANCE, THINGS
from leansd.loading import load
from leansd.measuring.profile import profile
from leansd.runtime.samplers import make_scheduler
from leansd.tuning import Front, tune

RESULTS = Path(__file__).parent / "results" / "fronts"
JOURNALS = Path(__file__).parent.parent / "runs" / "fronts"
SEED = 2_000_000
"""Far from the seeds of the benchmark."""
CALLS = 8
SPEEDS = (1.5, 2.0, 2.5, 3.0)
SPARE = 1.03
"""Plans are sought a little faster than they shall be, since predictions are off by as much."""


def main(
    model: str = "emoji",
    sampler: Annotated[list[str], typer.Option()] = ["dpm++2m", "ddim", "euler"],  # noqa: B006
    steps: Annotated[list[int], typer.Option()] = [30, 20, 50],  # noqa: B006
    tries: int = 5,
) -> None:
    hush_libraries()
    pipe = load(model)
    settings = {"guidance_scale": GUIDANCE}
    cost = profile(pipe, call=settings, pictures=CALLS, repeats=2)
    start = time.time()

    def tell(text: str) -> None:
        print(f"{time.time() - start:7.1f} s  {text}", flush=True)

    for name in sampler:
        pipe.scheduler = make_scheduler(pipe, name)
        for count in steps:
            tell(f"{name}, {count} steps")
            points = []
            # With any step count, and, for presets, which do not change it, with this one alone.
            for grids, speeds in (((1.0, 0.85, 0.7, 0.55), SPEEDS), ((1.0,), SPEEDS)):
                front = tune(
                    pipe,
                    THINGS[: 8 * CALLS : 8],
                    held_out=THINGS[4 : 8 * CALLS : 8],
                    steps=count,
                    settings=settings,
                    speeds=[speed * SPARE for speed in speeds],
                    grids=grids,
                    tries=tries,
                    seed=SEED,
                    cost=cost,
                    sampler=name,
                    journal=JOURNALS / f"{name}-{count}.jsonl",
                    tell=tell,
                )
                points += front.points
            whole = Front(front.subject, name, count, tuple(points))
            whole.save(RESULTS / f"{name}-{count}.json")
            tell(f"\n{whole.tabulate()}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    typer.run(main)
