"""Plans of whole steps on a flow model that draws: tuned, then held against every rival.

    python -m models.emoji flow --out runs/flow     trains it: about an hour of one core
    python benchmarks/flow.py [--model runs/flow/model] [--sampler flow-euler] [--steps 30]

Fronts go to `benchmarks/results/flow/SAMPLER-STEPS.json`, records to `benchmarks/results/
flow.jsonl`. What was tried is kept under `runs/flow`; a front that is there is not sought again,
nor is a contest that is on record held again.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from fronts import SEED, choose_calls, hasten

from leansd.cli.terminal import hush_libraries
from leansd.emoji.prompts import PROMPTS
from leansd.evaluation.bench import (
    FLOW,
    BenchSettings,
    choose_plans,
    drop_done,
    hold,
    list_contests,
    list_settings,
    prepare,
)
from leansd.evaluation.prompt_sets import choose_prompts
from leansd.evaluation.rivals import Contest, choose_rivals
from leansd.loading import load
from leansd.runtime.samplers import make_scheduler
from leansd.tuning import tune
from leansd.tuning.front import read_plans

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FRONTS = RESULTS / "flow"
SPEEDS = (1.5, 2.0, 3.0, 3.7)
ARGUMENTS = {"max_sequence_length": 1}
"""Of every call, as the model was trained (`models/emoji/flow.py`)."""


def main(
    model: Path = ROOT / "runs" / "flow" / "model",
    sampler: Annotated[list[str], typer.Option()] = list(FLOW.samplers),  # noqa: B006
    steps: Annotated[list[int], typer.Option()] = [30],  # noqa: B006
    guidance: float = 4.0,
    count: Annotated[int, typer.Option(help="pictures")] = 24,
    tries: int = 2,
) -> None:
    hush_libraries()
    pipe: Any = load(str(model))
    pipe.set_progress_bar_config(disable=True)
    began = time.time()

    def tell(text: str, share: float = 0.0) -> None:
        print(f"{time.time() - began:7.1f} s  {text}", flush=True)

    contests = list_contests(sampler, steps, guidance)
    contests = [each for each in contests if each.task == "text-to-image"]
    for contest in contests:
        if contest.guidance == guidance and not place_front(contest).exists():
            tell(str(contest))
            find_front(pipe, contest, tries=tries, tell=tell).save(place_front(contest))
    settings = BenchSettings(
        model="flow",
        prompts=choose_prompts("flow", count, PROMPTS),
        rivals=choose_rivals("all"),
        choose_plans=partial(choose_plans, [str(FRONTS)], read_front=read_plans),
        seed=500_000,
        arguments=ARGUMENTS,
    )
    waiting = drop_done(prepare(pipe, settings, contests), RESULTS / "flow.jsonl")
    hold(
        waiting,
        settings,
        RESULTS / "flow.jsonl",
        on_end=lambda each, records: tell(f"on record: {each.contest}"),
    )


def place_front(contest: Contest) -> Path:
    """Where a contest's front lies."""
    return FRONTS / f"{contest.sampler}-{contest.steps}.json"


def find_front(pipe: Any, contest: Contest, *, tries: int, tell: Any) -> Any:
    """Tune for a contest, on every second thing, held out on the others."""
    pipe.scheduler = make_scheduler(pipe, contest.sampler)
    calls, held_out = (choose_calls(pipe, contest, first) for first in (0, 1))
    return tune(
        pipe,
        calls,
        held_out=held_out,
        steps=contest.steps,
        settings=list_settings(contest, ARGUMENTS),
        speeds=hasten(SPEEDS, [1.03]),
        grids=(1.0,),
        tries=tries,
        seed=SEED,
        sampler=contest.sampler,
        journal=ROOT / "runs" / "flow" / f"{contest.sampler}-{contest.steps}.jsonl",
        tell=tell,
    )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    typer.run(main)
