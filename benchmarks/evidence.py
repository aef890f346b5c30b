"""All that stands on the bundled model's weights, measured anew: one command that goes on.

    python benchmarks/evidence.py --list           what is made, and what is still to be made
    python benchmarks/evidence.py                  all of it, in turn
    python benchmarks/evidence.py nets presets     some of it

A part that is done with these weights is not done again. What is stopped goes on by the same
command, as far as its own script can. Records of other weights are deleted when a part begins.
Parts that time anything want a machine that does nothing else. Not here, since it needs a checkout
of ComfyUI: `benchmarks/comfyui.py`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from leansd.anatomy.reading import fingerprint_module
from leansd.emoji.location import model_folder
from leansd.files import write_file
from leansd.loading import load_unet

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RUNS = ROOT / "runs"
DONE = RUNS / "evidence.json"
"""Whose evidence `runs` holds, and which parts are done."""


@dataclass(frozen=True)
class Part:
    """One piece of evidence.

    Attributes:
        commands: what makes it, each the arguments of `python`.
        records: files of `benchmarks/results` that it writes.
        copies: what they leave elsewhere, and where it belongs.
        is_timed: it wants a quiet machine.
        needs: a folder that somebody has to bring; its page in docs says from where.
    """

    commands: Sequence[str]
    records: Sequence[str] = ()
    copies: Sequence[tuple[str, str]] = ()
    is_timed: bool = False
    needs: str = ""


NETS = "--data runs/pictures"
LEAN = "data.path=runs/pictures/train data.cache=runs/incubation/cache stages.0.steps=800"
SECOND = "--recipe second --out runs/second"
FAST = "--grid 1 --tries 3 --spare 1.03"
"""Of the search for fronts: plans of the full run's step count, with few moves of key steps."""
ONCE = "--grid 1 --tries 1"
"""The same with hardly any."""
SPEEDS = "benchmarks/fronts.py --grid 1 --tries 3 --spare 1.0 --results speeds"
"""Plans for what the benchmark compares at, by computing, which presets leave by a call or two."""
ELSEWHERE = (
    "benchmarks/fronts.py --model runs/second/model --results second-speeds --grid 1 --tries 2 "
    "--spare 1.0 --steps 30"
)
"""The same on the model that no preset was tuned on."""
AT_THIRTY = "--speed 1.45 --speed 1.87 --speed 2.65"
"""Those of 30 steps: 20, 15 and 10 UNet calls."""
FEW = "--speed 3.5 --speed 3.9 --speed 4.5"
"""7, 6 and 5 of 30."""
AT_TWENTY = "--speed 1.46 --speed 1.83 --speed 2.45 --speed 2.75 --speed 3.15"
"""Those of 20 steps: 13, 10, 7, 6 and 5 UNet calls."""
PARTS = {
    "nets": Part(
        (
            "-m models.emoji pictures --out runs/pictures",
            f"benchmarks/incubation.py {NETS} --seed 0 --arm light --arm assembled",
            f"-m leansd.cli incubate emoji-lean.yaml --out runs/incubation/lean-0 seed=0 {LEAN}",
            "-m models.emoji publish --nets runs/incubation",
        )
    ),
    "fronts of 30 steps": Part(
        (
            f"benchmarks/fronts.py --steps 30 {FAST}",
            f"benchmarks/fronts.py --sampler euler-a --sampler dpm++sde --steps 30 {FAST}",
            f"benchmarks/fronts.py --sampler unipc --steps 30 {ONCE} --spare 1.0",
            f"benchmarks/fronts.py --sampler dpm++2m-karras --steps 30 {ONCE} --spare 1.03",
        ),
        tuple(
            f"fronts/{sampler}-30.json"
            for sampler in (
                "dpm++2m",
                "ddim",
                "euler",
                "euler-a",
                "dpm++sde",
                "unipc",
                "dpm++2m-karras",
            )
        ),
    ),
    "fronts of 20 steps": Part(
        (
            f"benchmarks/fronts.py --steps 20 {FAST}",
            f"benchmarks/fronts.py --sampler dpm++2m-karras --steps 20 {ONCE} --spare 1.03",
        ),
        tuple(
            f"fronts/{sampler}-20.json"
            for sampler in ("dpm++2m", "ddim", "euler", "dpm++2m-karras")
        ),
    ),
    "fronts of 50 steps": Part(
        (f"benchmarks/fronts.py --steps 50 {FAST}",),
        ("fronts/dpm++2m-50.json", "fronts/ddim-50.json", "fronts/euler-50.json"),
    ),
    "fronts of other settings": Part(
        (
            f"benchmarks/fronts.py --sampler dpm++2m --steps 30 --guidance 7.5 {FAST}",
            f"benchmarks/fronts.py --sampler dpm++2m --steps 30 --strength 0.6 {FAST}",
        ),
        ("fronts/dpm++2m-30-g7.5.json", "fronts/dpm++2m-30-image-to-image.json"),
    ),
    "presets": Part(("benchmarks/presets.py",), ("presets.jsonl",), is_timed=True),
    "demo": Part(
        ("-m leansd.cli demo --out runs/demo --overwrite",),
        ("demo.jsonl",),
        (
            ("runs/demo/grid.png", "docs/images/grid.png"),
            ("runs/demo/records.jsonl", "benchmarks/results/demo.jsonl"),
        ),
        is_timed=True,
    ),
    "few calls": Part(
        (
            "benchmarks/few_calls.py --iterations 40",
            "benchmarks/few_calls.py --iterations 40 --guidance 7.5 "
            "--plans benchmarks/results/fronts/dpm++2m-30-g7.5.json",
        ),
        ("few-calls.jsonl",),
    ),
    "cuts": Part(("benchmarks/cuts.py",), ("cuts.jsonl",)),
    "prediction": Part(
        (
            "benchmarks/prediction.py --model emoji",
            "benchmarks/prediction.py --model sd15 --side 256 --repeats 3",
        ),
        ("prediction.jsonl",),
        is_timed=True,
    ),
    "bulk": Part(("benchmarks/bulk.py",), ("bulk.jsonl",), is_timed=True),
    "judged plans": Part(
        (
            "-m models.emoji plans --plans quality --plans balanced --plans fast --plans turbo "
            "--plans benchmarks/results/speeds",
        ),
        ("judged-plans.jsonl",),
        needs="runs/emoji/judge",
    ),
    "scale": Part(("benchmarks/scale.py",), ("scale.jsonl",)),
    "untuned": Part(
        (
            f"-m models.emoji train {SECOND} --steps 1200",
            f"-m models.emoji decay {SECOND} --steps 400",
            f"-m models.emoji assemble {SECOND}",
            "benchmarks/presets.py --model runs/second/model --results untuned",
            "benchmarks/fronts.py --model runs/second/model --results second --sampler dpm++2m "
            f"--steps 30 {ONCE} --spare 1.0 --speed 2.65 --speed 3.2",
            "benchmarks/few_calls.py --model runs/second/model --iterations 40 "
            "--plans benchmarks/results/second/dpm++2m-30.json",
            f"{ELSEWHERE} --sampler dpm++2m --mixes 96 {AT_THIRTY} --speed 3.3 "
            "--speed 3.75 --speed 4.25 --speed 5.0",
            f"{ELSEWHERE} --sampler ddim {AT_THIRTY}",
            "-m leansd.cli bench --model runs/second/model --guidance 4 --sampler ddim "
            "--sampler dpm++2m --steps 30 --plans quality --plans balanced --plans fast "
            "--plans turbo --plans benchmarks/results/second-speeds --count 24 "
            "--out benchmarks/results/second.jsonl --report runs/second/bench",
        ),
        ("untuned.jsonl", "second.jsonl"),
        is_timed=True,
    ),
    "joint": Part(("benchmarks/joint.py",), ("joint.jsonl",)),
    "incubation": Part(
        (f"benchmarks/incubation.py {NETS}", f"benchmarks/incubated.py {NETS}"),
        ("incubation.jsonl", "incubation-curves.jsonl"),
    ),
    "bench": Part(
        (
            f"{SPEEDS} --sampler dpm++2m --steps 30 --mixes 96 "
            f"--speed 1.45 --speed 1.87 --speed 2.3 --speed 2.65 --speed 3.2 {FEW}",
            f"{SPEEDS} --sampler dpm++2m-karras --sampler unipc --sampler euler --steps 30 "
            f"--mixes 96 {AT_THIRTY} {FEW}",
            f"{SPEEDS} --sampler ddim --steps 30 --mixes 96 --speed 1.45 --speed 1.87 {FEW}",
            f"{SPEEDS} --sampler dpm++2m --sampler ddim --sampler euler --steps 20 --mixes 96 "
            f"{AT_TWENTY}",
            f"{SPEEDS} --sampler euler-a --sampler dpm++sde --steps 30 "
            f"--speed 1.45 --speed 1.87 {FEW}",
            f"{SPEEDS} --sampler dpm++2m --steps 30 --guidance 7.5 {AT_THIRTY} {FEW}",
            f"{SPEEDS} --sampler dpm++2m --steps 30 --guidance 8 {AT_THIRTY}",
            f"{SPEEDS} --sampler dpm++2m --steps 30 --strength 0.6 --speed 1.43 --speed 1.84",
            f"{SPEEDS} --sampler dpm++2m --steps 30 --strength 0.8 --speed 1.42 --speed 1.8 "
            "--speed 2.45",
            "-m leansd.cli bench --plans benchmarks/results/fronts "
            "--plans benchmarks/results/speeds --count 24",
        ),
        ("bench.jsonl",),
        is_timed=True,
    ),
    "flow": Part(
        ("-m models.emoji flow --out runs/flow", "benchmarks/flow.py"),
        ("flow.jsonl", "flow/flow-euler-30.json", "flow/flow-dpm++2m-30.json"),
        is_timed=True,
    ),
    "pages": Part(
        (
            "benchmarks/tables.py",
            "benchmarks/figures.py",
            "notebooks/execute.py",
        )
    ),
}


def read_done(weights: str) -> list[str]:
    """The parts that are done with these weights."""
    found = json.loads(DONE.read_text()) if DONE.exists() else {"weights": weights, "done": []}
    if found["weights"] != weights:
        sys.exit(f"{RUNS} holds what was made with other weights: move it away, and begin again")
    return found["done"]


def make(name: str, part: Part, done: Sequence[str], weights: str) -> None:
    """Run a part's commands; note that it was begun, then that it is done."""
    if part.needs and not (ROOT / part.needs).exists():
        print(f"-- {name}: left out, as there is no {part.needs}; its page says from where")
        return
    begun = f"{name}, begun"
    if begun not in done:
        for each in part.records:
            (RESULTS / each).unlink(missing_ok=True)
        write_done(weights, [*done, begun])
    for command in part.commands:
        print(f"-- {name}: python {command}", flush=True)
        subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=True)
    for source, target in part.copies:
        shutil.copyfile(ROOT / source, ROOT / target)
    write_done(weights, [*done, begun, name])


def write_done(weights: str, done: Sequence[str]) -> None:
    """Keep what is done."""
    RUNS.mkdir(exist_ok=True)
    write_file(DONE, json.dumps({"weights": weights, "done": list(dict.fromkeys(done))}))


def main(
    parts: Annotated[list[str] | None, typer.Argument(help="Some parts only.")] = None,
    show: Annotated[bool, typer.Option("--list", help="Say what is to be made.")] = False,
) -> None:
    """Make what is not made yet."""
    weights = fingerprint_module(load_unet(model_folder(), device="cpu"))
    if unknown := [name for name in parts or () if name not in PARTS]:
        sys.exit(f"no part {unknown[0]!r}: choose from {', '.join(PARTS)}")
    for name in parts or PARTS:
        done = read_done(weights)
        if show:
            quiet = ", wants a quiet machine" if PARTS[name].is_timed else ""
            print(f"{name}: {'done' if name in done else 'to do'}{quiet}")
        elif name not in done:
            make(name, PARTS[name], done, weights)


if __name__ == "__main__":
    typer.run(main)
