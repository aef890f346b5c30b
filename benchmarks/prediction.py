"""Predicted against measured: how right the cost model is, on plans that it was not made from.

    python benchmarks/prediction.py --model emoji [--repeats 8] [--steps 12]
    python benchmarks/prediction.py --model sd15 --side 256 --repeats 3

The embedded model, and a pipeline of Stable Diffusion 1.5's size with random weights. Probing runs
and held-out runs take turns; records go to `benchmarks/results/prediction.jsonl`, those of each
model as soon as it is done.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from leansd.anatomy.builtin import BUILTIN
from leansd.cli.terminal import hush_libraries
from leansd.evaluation.prediction import (
    check_predictions,
    find_worst,
    hold_out,
    list_prediction_records,
)
from leansd.evaluation.profile import Probe, prepare_probe
from leansd.evaluation.random_pipelines import build_stand_in
from leansd.evaluation.records import Record, put_records, stamp
from leansd.loading import load
from leansd.plans.plan import Plan
from leansd.plans.presets import preset
from leansd.runtime.samplers import name_sampler

RESULTS = Path(__file__).parent / "results" / "prediction.jsonl"


def list_plans(probe: Probe, steps: int) -> dict[str, Plan]:
    """The command's held-out plans, and one that mixes guidance, a cut and forecasts."""
    sampler = name_sampler(probe.pipe)
    plans = hold_out(probe.anatomy, steps, guided=probe.is_guided, sampler=sampler)
    cut = f"up{probe.anatomy.up_blocks - 1}.l1"
    others = [step for step in range(steps) if step % 3]
    mixed = Plan.every(3, cut=cut, steps=steps, how="forecast").guide("inherit", at=others)
    plans["mixed"] = mixed.rename("mixed")
    plans["tgate"] = preset("tgate", steps, blocks=probe.anatomy.up_blocks)
    return plans


def measure_model(
    model: str, *, repeats: int, steps: int, side: int | None, device: str | None
) -> list[Record]:
    """Records of the cost model and of every held-out plan."""
    pipe: Any = (
        build_stand_in(model, device=device) if model in BUILTIN else load(model, device=device)
    )
    pipe.set_progress_bar_config(disable=True)
    probe = prepare_probe(pipe, subject=model, size=(side, side) if side else None)
    plans = list_plans(probe, steps)
    with Progress() as progress:
        task = progress.add_task(model, total=1.0)
        cost, predictions = check_predictions(
            probe,
            plans,
            rounds=repeats,
            on_progress=lambda name, share: progress.update(task, completed=share),
        )
    circumstances = stamp(pipe.device)
    width, height = probe.size
    shared = {**circumstances, "subject": model, "pictures": 1, "width": width, "height": height}
    print(f"{model}: largest error of a predicted speed-up {find_worst(predictions):.1%}")
    return [*cost.list_records(circumstances), *list_prediction_records(predictions, shared)]


def main(
    model: Annotated[list[str], typer.Option(help="repeat for several")] = ["emoji", "sd15"],  # noqa: B006
    repeats: int = 8,
    steps: int = 12,
    side: Annotated[int | None, typer.Option(help="pixels; the model's own by default")] = None,
    device: str | None = None,
    out: Path = RESULTS,
) -> None:
    hush_libraries()
    for name in model:
        records = measure_model(name, repeats=repeats, steps=steps, side=side, device=device)
        put_records(out, records, lambda record: record.subject)


if __name__ == "__main__":
    typer.run(main)
