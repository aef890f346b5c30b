"""Cuts that are chosen against the published ones, at equal cost, before any training.

    python benchmarks/cuts.py [--model emoji] [--pictures 16]

One study measures every removal on calibration prompts. For each preset that fits the UNet, a cut
is chosen whose multiply-accumulates are at most the preset's own: the knapsack's answer as it is,
and the best of its neighbours. On held-out prompts and seeds: the squared error of the UNet's
guided output, and the PSNR of pictures to the full UNet's of the same seeds. Records go to
`benchmarks/results/cuts.jsonl`. What training makes of a cut is not measured here.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress

import leansd
from leansd.cli.terminal import hush_libraries
from leansd.emoji.prompts import THINGS
from leansd.errors import LeansdError
from leansd.evaluation.fidelity import psnr
from leansd.evaluation.prompt_sets import GUIDANCE
from leansd.evaluation.records import Record, stamp, write_records
from leansd.evaluation.runs import CallSet, run_calls
from leansd.surgery.edits import Surgery
from leansd.surgery.presets import PRESETS
from leansd.text import Table
from leansd.tuning.cutting import (
    Prices,
    Study,
    keep_calls,
    list_prices,
    measure_error,
    study_removals,
)
from leansd.tuning.removals import Removal

RESULTS = Path(__file__).parent / "results" / "cuts.jsonl"
HELD_OUT = 500_000
"""First seed of what had no part in choosing."""


def list_contestants(
    study: Study, presets: Sequence[str], tries: int
) -> dict[str, tuple[str, Surgery]]:
    """By name: the preset at whose cost it stands, and the surgery."""
    contestants: dict[str, tuple[str, Surgery]] = {}
    seen: set[str] = set()
    for name in presets:
        if PRESETS[name].surgery.fingerprint in seen:  # the same cut under another name
            continue
        seen.add(PRESETS[name].surgery.fingerprint)
        try:
            plan = leansd.preview(study.unet, name)
        except LeansdError as error:
            print(f"{name} is left out: {error}")
            continue
        share = plan.after.macs / plan.before.macs
        contestants[name] = name, PRESETS[name].surgery
        for kind, count in (("knapsack", 0), ("cut", tries)):
            found = study.choose(share, tries=count, name=f"{kind} at {name}")
            print(found)
            contestants[found.surgery.name] = name, found.surgery
    return contestants


def predict_ms(study: Study, prices: Prices, gone: Sequence[str]) -> float:
    """Milliseconds of a guided call without some units."""
    saved = prices.price(Removal(tuple(gone)), study.anatomy) if gone else 0.0
    return 1000 * (prices.whole - saved)


def main(
    model: str = "emoji",
    calibration: Annotated[int, typer.Option(help="prompts that cuts are chosen on")] = 8,
    pictures: Annotated[int, typer.Option(help="held-out prompts")] = 16,
    steps: int = 20,
    moments: int = 6,
    tries: int = 16,
    guidance: float = GUIDANCE,
    results: Path = RESULTS,
) -> None:
    hush_libraries()
    pipe: Any = leansd.load(model)
    pipe.set_progress_bar_config(disable=True)
    settings = {"guidance_scale": guidance}
    shared: dict[str, Any] = {"settings": settings, "batch": 8}
    chosen_on = [THINGS[(place * 7) % len(THINGS)] for place in range(calibration)]
    held_out = [thing for thing in THINGS if thing not in chosen_on][::3][:pictures]
    with Progress() as progress:
        task = progress.add_task("study", total=100)
        study = study_removals(
            pipe.unet,
            keep_calls(pipe, CallSet(chosen_on, **shared), steps, moments=moments),
            "macs",
            tell=lambda text, share: progress.update(
                task, description=text, completed=round(100 * share)
            ),
        )
    contestants = list_contestants(study, list(PRESETS), tries)
    times = list_prices(pipe.unet, study.anatomy, "ms")
    asked = CallSet(held_out, HELD_OUT, **shared)
    kept = keep_calls(pipe, asked, steps, moments=moments)
    full = run_calls(pipe, asked, steps).pictures
    stood = stamp(pipe.device)
    records: list[Record] = []
    rows: list[tuple[str, ...]] = []
    for name, (at_cost_of, surgery) in {"full": ("full", Surgery("full")), **contestants}.items():
        plan = leansd.preview(pipe.unet, surgery)
        student, _ = leansd.operate(pipe.unet, surgery)
        light = copy.copy(pipe)
        light.unet = student
        drawn = run_calls(light, asked, steps).pictures
        ratios = psnr(drawn, full)
        error = measure_error(student, kept)
        values = {
            "output_error": (error, ""),
            "psnr": (float(ratios.mean()), "dB"),
            "params": (plan.after.params, ""),
            "macs": (plan.after.macs, ""),
            "predicted_ms": (predict_ms(study, times, plan.gone), "ms"),
        }
        records += [
            Record(
                **stood, subject=model, plan=name, fingerprint=surgery.fingerprint, metric=metric,
                value=value, unit=unit, seed=HELD_OUT, steps=steps, guidance=guidance,
                pictures=len(held_out), moments=moments, calibration=len(chosen_on),
                at_cost_of=at_cost_of, gone=" ".join(plan.gone),
            )
            for metric, (value, unit) in values.items()
        ]  # fmt: skip
        rows.append(
            (
                name, f"{plan.after.macs / plan.before.macs:.1%}",
                f"{plan.after.params / plan.before.params:.1%}", f"{error:.4f}",
                f"{float(ratios.mean()):.2f}", " ".join(plan.gone),
            )
        )  # fmt: skip
        print(rows[-1], flush=True)
        write_records(results, records)
    print(Table(("surgery", "MACs", "params", "output error", "PSNR", "without"), tuple(rows)))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    typer.run(main)
