"""What a step of incubation takes in each of its modes, for SD 1.5's size: counted, nothing runs.

    python benchmarks/modes.py

Records go to `benchmarks/results/modes.jsonl`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import typer

from leansd.anatomy.builtin import open_builtin
from leansd.cli.terminal import hush_libraries
from leansd.evaluation.records import Record, stamp, write_records
from leansd.incubation.estimate import StageCost, estimate
from leansd.incubation.recipe import Recipe, load_recipe

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "modes.jsonl"
RECIPE = "sd15-asdm.yaml"
ASSEMBLED = {"surgery": "asdm-1222", "nets": {"original": "teacher"}, "train": ["dn0", "up3"]}
MODES: Mapping[str, Mapping[str, object]] = {
    "bk-base, end to end": {"surgery": "bk-base", "train": "*"},
    "assembled, end to end": ASSEMBLED,
    "assembled, decoupled": {**ASSEMBLED, "mode": "decoupled"},
    "assembled, all of it": {**ASSEMBLED, "train": "*"},
}
LOSSES = {"denoising": {}, "output": {}, "normalised-features": {}}


def count(mode: Mapping[str, object], checkpointing: bool) -> StageCost:
    """One step of one sample."""
    losses = {key: value for key, value in LOSSES.items() if mode.get("mode") != "decoupled"}
    stage = {
        "name": "only",
        "steps": 1,
        "losses": losses or {"normalised-features": {}},
        **mode,
    }
    base = load_recipe(RECIPE).to_document()
    trainer = {**base["trainer"], "gradient_checkpointing": checkpointing, "batch": 1}
    recipe = Recipe.model_validate({**base, "trainer": trainer, "stages": [stage]})
    teacher = open_builtin("sd15")
    (cost,) = estimate(recipe, teacher, macs_per_second=1.0, device="").stages
    return cost


def main() -> None:
    hush_libraries()
    records: list[Record] = []
    for name, mode in MODES.items():
        own, checkpointed = count(mode, False), count(mode, True)
        values = {
            "trained": own.trained,
            "teacher_macs": own.teacher_macs,
            "student_macs": own.student_macs,
            "backward_macs": own.backward_macs,
            "weights": own.weights,
            "activations": own.activations,
            "activations_checkpointed": checkpointed.activations,
        }
        base = {**stamp("cpu"), "subject": "sd15", "plan": name, "unit": ""}
        records += [Record(**base, metric=key, value=value) for key, value in values.items()]
    write_records(RESULTS, records)


if __name__ == "__main__":
    typer.run(main)
