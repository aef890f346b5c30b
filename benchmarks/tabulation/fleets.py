"""Pictures by the ten thousand: measured here, calculated for many machines."""

from __future__ import annotations

from leansd.evaluation.records import Record, load_records
from tabulation.cells import RESULTS, get, get_number


def tabulate_bulk() -> str:
    """What drawing in bulk took, here: in one process, and on Ray with one worker and with two."""
    path = RESULTS / "bulk.jsonl"
    if not path.exists():
        return "Not measured yet: `python benchmarks/bulk.py`.\n"
    records = load_records(path)
    cells = {(each.plan, each.metric): each for each in records}
    first = records[0]
    parts = [
        f"{first.subject}, {get(first, 'pictures')} pictures by the plan {get(first, 'drawn_by')}, "
        f"{get(first, 'steps')} steps, rounds: {get(first, 'rounds')}; {first.device}; torch "
        f"{first.torch}:\n",
        "| | a picture | to start |",
        "|---|---|---|",
    ]
    for plan in dict.fromkeys(each.plan for each in records):
        each, start = (cells[plan, m].value for m in ("seconds_a_picture", "seconds_to_start"))
        parts.append(f"| {plan} | {each:.2f} s | {start:.1f} s |")
    return "\n".join([*parts, ""])


def tabulate_host() -> str:
    """What the host does for a picture, as measured."""
    records = read_scale(calculated=False)
    first = records[0]
    parts = [
        f"{first.device}; torch {first.torch}:\n",
        "| for a picture of 512 px | |",
        "|---|---|",
    ]
    for each in records:
        if each.metric == "processor_seconds":
            parts.append(f"| {each.plan} | {each.value * 1000:.2g} ms |")
        else:
            parts.append(f"| the picture, as a PNG | {each.value:.2f} MB |")
    return "\n".join([*parts, ""])


def tabulate_scale() -> str:
    """What fleets would do with one job, as calculated."""
    records = read_scale(calculated=True)
    first = records[0]
    parts = [
        f"{get(first, 'pictures'):,} pictures of {first.subject}, "
        f"{get_number(first, 'seconds'):.2f} s each on a GPU in full, speed-up "
        f"{get(first, 'speedup'):g}x, {get(first, 'euro'):g} € an hour:\n",
        "| GPUs | shard | in all | pictures/s | pictures/€ | most waiting for |",
        "|" + "---|" * 6,
    ]
    cells = {(get(r, "gpus"), get(r, "shard"), r.metric): r for r in records}
    for gpus, shard in dict.fromkeys((get(each, "gpus"), get(each, "shard")) for each in records):
        job = cells[gpus, shard, "job_seconds"]
        rate, yielded = (
            cells[gpus, shard, f"pictures_a_{each}"].value for each in ("second", "euro")
        )
        parts.append(
            f"| {gpus:,} | {shard} | {show_time(job.value)} | {rate:.3g} | {yielded:,.0f} | "
            f"{get(job, 'limit')} |"
        )
    return "\n".join([*parts, ""])


def tabulate_steady() -> str:
    """What a job without an end asks of the driver, as calculated."""
    records = read_scale(calculated=True)
    cells = {(get(each, "gpus"), each.metric): each.value for each in records}
    first = records[0]
    parts = [
        f"| GPUs | pictures/s | of the driver's network ({get(first, 'line'):g} GB/s) | "
        "of a core of the driver |",
        "|" + "---|" * 4,
    ]
    for gpus in dict.fromkeys(get(each, "gpus") for each in records):
        rate, line, driver = (
            cells[gpus, f"steady_{each}"] for each in ("pictures_a_second", "line", "driver")
        )
        parts.append(f"| {gpus:,} | {rate:,.4g} | {line:.1%} | {driver:.1%} |")
    return "\n".join([*parts, ""])


def read_scale(*, calculated: bool) -> list[Record]:
    """What `benchmarks/scale.py` calculated, or what it measured."""
    records = load_records(RESULTS / "scale.jsonl")
    return [each for each in records if get(each, "calculated") == calculated]


def show_time(seconds: float) -> str:
    """`5 h 8 min` or `3 min 20 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left} min" if hours else f"{minutes} min {rest} s"
