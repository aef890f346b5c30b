"""The speed presets against what a user would pick instead, on one model, in one interleaved run.

    python benchmarks/presets.py [--model emoji] [--prompts 16] [--steps 30] [--sampler ddim]
    python benchmarks/presets.py --model runs/second/model --results untuned

Full run, presets, DeepCache's schedule, and fewer steps of the same sampler at each preset's cost.
One round is one prompt drawn by every contestant, so ratios are paired. Records go to
`benchmarks/results/presets.jsonl`, or `untuned.jsonl` for a model that no preset was tuned on;
`benchmarks/tables.py` makes the tables from them.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from leansd.anatomy import dissect
from leansd.cli.terminal import hush_libraries
from leansd.emoji.prompts import PROMPTS
from leansd.evaluation.compare import Case, Rounds
from leansd.evaluation.demo import list_records, run_demo
from leansd.evaluation.extractors import find_embedder
from leansd.evaluation.prompt_sets import GUIDANCE
from leansd.evaluation.records import Record, get_field, put_records
from leansd.evaluation.runs import FULL, CallSet
from leansd.loading import load
from leansd.plans.anatomy import Anatomy
from leansd.plans.presets import SPEED_PRESETS, preset
from leansd.runtime.samplers import set_sampler
from leansd.unets import predict_gain

RESULTS = Path(__file__).parent / "results"
SAMPLERS = ["dpm++2m", "ddim", "euler", "dpm++2m-karras"]
INTERVALS = (2, 3, 5)


def list_cases(anatomy: Anatomy, steps: int, sampler: str) -> list[Case]:
    """Full run, presets, DeepCache's branch 0, and fewer steps at the cost of each of those."""
    blocks = anatomy.up_blocks
    plans = {name: preset(name, steps, blocks=blocks, sampler=sampler) for name in SPEED_PRESETS}
    for interval in INTERVALS:
        plan = preset("deepcache", steps, blocks=blocks, interval=interval)
        plans[f"deepcache 1:{interval}"] = plan
    counts = {max(1, round(steps / predict_gain(plan, anatomy))) for plan in plans.values()}
    return [
        Case(FULL, steps),
        *(Case(name, steps, plan) for name, plan in plans.items()),
        *(Case(f"{count} steps", count) for count in sorted(counts, reverse=True) if count < steps),
    ]


def get_sampler(record: Record) -> Hashable:
    return get_field(record, "sampler")


def main(
    model: str = "emoji",
    prompts: Annotated[int, typer.Option(help="rounds, a prompt and a seed each")] = 16,
    steps: int = 30,
    seed: int = 1000,
    guidance: float = GUIDANCE,
    sampler: Annotated[list[str], typer.Option()] = SAMPLERS,
    results: Annotated[str, typer.Option(help="presets or untuned")] = "presets",
) -> None:
    hush_libraries()
    pipe = load(model)
    anatomy = dissect(pipe.unet, tokens=pipe.tokenizer.model_max_length)
    chosen = [PROMPTS[index % len(PROMPTS)] for index in range(prompts)]
    for name in sampler:
        set_sampler(pipe, name)
        with Progress() as progress:
            task = progress.add_task(name, total=None)
            demo = run_demo(
                pipe,
                list_cases(anatomy, steps, name),
                CallSet(chosen, seed, 1, {"guidance_scale": guidance}),
                subject=Path(model).name,
                anatomy=anatomy,
                embedder=find_embedder(model),
                rounds=Rounds(1, budget=90.0),
                on_progress=lambda far, progress=progress, task=task: progress.update(
                    task, completed=far.done, total=far.total
                ),
            )
        put_records(RESULTS / f"{results}.jsonl", list_records(demo), get_sampler)


if __name__ == "__main__":
    typer.run(main)
