"""What drawing by the ten thousand costs: in one process, and on Ray with one worker and with two.

    python benchmarks/bulk.py [--pictures 96] [--rounds 3] [--shard 16]

The same job, a model on one core each, drawn into new folders in turns; every folder must hold the
same bytes. Seconds are those of the whole command: opening the model, and for Ray starting its
cluster's actors, are in them; so the time that a picture takes by itself is found from two sizes
of job. Records go to `benchmarks/results/bulk.jsonl`.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import typer

from leansd.bulk.jobs import DRAWING, BulkJob, ShardTask, Work, cut_parts, read_sheet, run_job
from leansd.cli.terminal import hush_libraries
from leansd.cluster import connect
from leansd.emoji.prompts import THINGS
from leansd.evaluation.prompt_sets import GUIDANCE
from leansd.evaluation.records import Record, stamp, write_records
from leansd.plans.presets import preset
from leansd.shards import list_shards

RESULTS = Path(__file__).parent / "results" / "bulk.jsonl"
SHARD = 16
"""Pictures of a shard; a third of the job must be a shard for each of two workers at least."""


def write_prompts(path: Path, count: int) -> Path:
    """So many rows of the embedded model's prompts."""
    rows = [{"id": f"{n:05d}", "prompt": THINGS[n % len(THINGS)]} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(job: BulkJob, parts: list[ShardTask], work: Work) -> tuple[float, list[bytes]]:
    """Seconds of a whole job, and what came out."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run_job(job, parts, Path(folder), work=work)
        spent = time.perf_counter() - start
        return spent, [path.read_bytes() for path in list_shards(Path(folder))]


def main(
    pictures: int = 96, rounds: int = 3, steps: int = 30, plan: str = "balanced", shard: int = SHARD
) -> None:
    hush_libraries()
    followed = preset(plan, steps, sampler="dpm++2m")
    job = BulkJob(
        "emoji", steps=steps, plan=followed.to_dict(),
        guidance=GUIDANCE, batch=8, shard=shard, threads=1, device="cpu",
    )  # fmt: skip
    ways: Mapping[str, Callable[[], Work]] = {
        "one process": lambda: DRAWING.run_here,
        "Ray, 1 worker": partial(DRAWING.place, "local", 1),
        "Ray, 2 workers": partial(DRAWING.place, "local", 2),
    }
    connect("local")
    with tempfile.TemporaryDirectory() as home:
        parts = cut_parts(read_sheet(write_prompts(Path(home) / "p.jsonl", pictures)).rows, job)
    seconds: dict[tuple[str, int], list[float]] = {}
    expected: dict[int, list[bytes]] = {}
    few = parts[: max(1, len(parts) // 3)]
    for turn in range(rounds):
        order = list(ways)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            for some in (few, parts):
                spent, drawn = run(job, some, ways[name]())
                assert drawn == expected.setdefault(len(some), drawn), f"{name} draws otherwise"
                seconds.setdefault((name, len(some)), []).append(spent)
                print(f"{name}: {len(some) * shard} pictures in {spent:.1f} s", flush=True)
    records: list[Record] = []
    shared: dict[str, Any] = {**stamp("cpu"), "subject": "emoji", "steps": steps, "rounds": rounds}
    for name in ways:
        least, most = (seconds[name, len(some)] for some in (few, parts))
        more = (len(parts) - len(few)) * shard
        each = sorted((b - a) / more for a, b in zip(least, most, strict=True))
        start = sorted(a - len(few) * shard * e for a, e in zip(least, each, strict=True))
        for metric, values, unit in (
            ("seconds_a_picture", each, "s"),
            ("seconds_to_start", start, "s"),
        ):
            records.append(
                Record(
                    **shared, plan=name, metric=metric, value=values[len(values) // 2], unit=unit,
                    low=values[0], high=values[-1], drawn_by=plan, pictures=len(parts) * shard,
                )
            )  # fmt: skip
    write_records(RESULTS, records)


if __name__ == "__main__":
    typer.run(main)
