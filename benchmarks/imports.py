"""What importing costs: leansd and its plans beside torch, each in a process of its own, in turns.

    python benchmarks/imports.py [--rounds 5]

Records go to `benchmarks/results/imports.jsonl`; `benchmarks/tables.py` makes the table of
`docs/architecture.md` from them. Times are those of the processor, which other work on the machine
hardly changes; the first round, which fills the disk cache, does not count.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import median

import typer

from leansd.evaluation.records import Record, stamp, write_records

RESULTS = Path(__file__).parent / "results" / "imports.jsonl"
CASES = {
    "torch": "import torch",
    "leansd": "import leansd",
    "leansd.plans": "import leansd.plans",
    "a tuned plan": "import leansd; leansd.preset('balanced', 30, sampler='ddim')",
    "torch, then leansd": "import torch, leansd",
}
"""Statements by what they are called."""
TIMED = "import time; start = time.process_time(); {}; print(time.process_time() - start)"


def time_import(statement: str) -> float:
    """Processor seconds of a statement in a new process, the start of Python left out."""
    command = [sys.executable, "-c", TIMED.format(statement)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def main(rounds: int = 5) -> None:
    laps: dict[str, list[float]] = {name: [] for name in CASES}
    for number in range(rounds + 1):
        for name, statement in CASES.items():
            seconds = time_import(statement)
            if number:
                laps[name].append(seconds)
        print(f"round {number} of {rounds}", flush=True)
    records = [
        Record(
            **stamp(), subject="python", plan=name, metric="seconds", value=median(each), unit="s",
            rounds=rounds, low=min(each), high=max(each),
            share=median(a / b for a, b in zip(each, laps["torch"], strict=True)),
        )
        for name, each in laps.items()
    ]  # fmt: skip
    for record in records:
        print(f"{record.plan}: {1e3 * record.value:.1f} ms")
    write_records(RESULTS, records)


if __name__ == "__main__":
    typer.run(main)
