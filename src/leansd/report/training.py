"""Reports of a training: under way, stopped or at its end; and what one would take."""

from __future__ import annotations

import json
from functools import partial

from leansd.incubation.estimate import GIB, Estimate, StageCost
from leansd.incubation.training_log import StageLog, TrainingLog, read_grid
from leansd.report.drawings import Bar, draw_bars
from leansd.report.page import (
    AttachedFile,
    Chart,
    Drawing,
    Listing,
    PictureGrid,
    Prose,
    ReportPage,
    Section,
    count,
    show_differences,
)
from leansd.report.plots import Curve, plot_curves
from leansd.text import Table, describe_duration

AGAIN = 60
"""Seconds after which the page of a training that is under way opens itself again."""
TITLES = {
    "under way": "Training {name}: under way",
    "stopped": "Training {name}: stopped",
    "finished": "Training {name}",
}


def report_training(log: TrainingLog, recipe: str) -> ReportPage:
    """Curves, pictures on the way, a row a stage; the page carries the text of the recipe."""
    drawings = _draw_curves(log)
    seen = [stage for stage in log.stages if stage.grids and log.prompts]
    nothing = Prose("Nothing yet", ["No steps are on record; they come every ten."])
    sections: list[Section] = [
        *([Chart("Training curves", drawings, _explain(log))] if drawings else []),
        *(_show_grid(log, stage) for stage in seen),
        Listing("Stages", log.tabulate()),
        *([] if drawings else [nothing]),
    ]
    return ReportPage(
        title=TITLES[log.state].format(name=log.name),
        summary=summarise_training(log),
        measured=f"the training of {log.name} on {log.subject}, "
        f"{count(len(log.stages), 'stage')}: {', '.join(stage.name for stage in log.stages)}",
        sections=sections,
        attachments=[
            AttachedFile("losses.jsonl", log.write_rows(), "all that was logged"),
            AttachedFile("recipe.yaml", recipe, "the recipe"),
        ],
        reload=AGAIN if log.state == "under way" else 0,
    )


def summarise_training(log: TrainingLog) -> str:
    """How far it came and whether it learns, in a sentence."""
    begun = [stage for stage in log.stages if stage.rows]
    if not begun:
        return "The training has just begun: nothing is on record yet."
    stage = begun[-1]
    first, last = stage.rows[0]["loss"], stage.rows[-1]["loss"]
    moved = f"what it gets wrong went from {first:.3g} to {last:.3g} in stage {stage.name}"
    if stage.psnr:
        step = max(stage.psnr)
        moved += f", and its pictures are {stage.psnr[step]:.0f} dB close to the original's"
    if log.state == "finished":
        return f"The network is trained: {moved}."
    place = f"stage {log.stages.index(stage) + 1} of {len(log.stages)}"
    done = f"{stage.done} of {stage.steps} steps of {place}"
    return f"The training is {log.state} after {done}: {moved}."


def _explain(log: TrainingLog) -> list[str]:
    notes = [
        "Loss: what the training makes smaller, the weighed sum of its parts; each is shown before "
        "it is weighed. Losses of different stages measure different things.",
    ]
    if len(log.starts) > 1:
        notes.append("A dashed line is the beginning of a stage.")
    if any(stage.psnr for stage in log.stages):
        notes.append(
            "PSNR: of the trained network's pictures to the original's from the same seeds; 6 dB "
            "more are half the error."
        )
    return notes


def _draw_curves(log: TrainingLog) -> list[Drawing]:
    starts = log.starts
    if not starts:
        return []
    # One stage alone needs no border.
    borders: dict[str, float] = dict(starts) if len(starts) > 1 else {}
    draw = partial(plot_curves, x_name="step", borders=borders)
    names = dict.fromkeys(name for stage in log.stages for name in stage.losses)
    losses = [
        Curve(name, log.list_values(name), is_main=name == "loss")
        for name in sorted(names, key=lambda each: each != "loss")
    ]
    closeness = [
        [(starts[stage.name] + step, value) for step, value in sorted(stage.psnr.items())]
        for stage in log.stages
        if stage.psnr and stage.name in starts
    ]
    drawings = [draw(losses, y_name="loss", name="losses", caption="Losses.", is_log=True)]
    for name, parts, label, y_name, caption in (
        ("learning-rate", log.list_values("learning_rate"), "learning rate", "learning rate",
         "Learning rate."),
        ("norm", log.list_values("norm"), "norm of the gradient", "norm of the gradient",
         "Norm of the gradient, before it is clipped."),
        ("validation", closeness, "PSNR", "PSNR to the original, dB", "Pictures on the way."),
    ):  # fmt: skip
        if parts:
            drawings.append(draw([Curve(label, parts)], y_name=y_name, name=name, caption=caption))
    return drawings


def _show_grid(log: TrainingLog, stage: StageLog) -> PictureGrid:
    """Teacher, student and their difference, at the last grid of a stage."""
    step = max(stage.grids)
    teacher, student = read_grid(stage.grids[step], len(log.prompts))
    close = f"{stage.psnr[step]:.1f} dB" if step in stage.psnr else ""
    return show_differences(
        f"Pictures of stage {stage.name}",
        log.prompts,
        ("original", "", teacher),
        [("trained", f"step {step} {close}".rstrip(), student)],
    )


# -- incubate --dry-run --------------------------------------------------------------------------


def report_estimate(estimate: Estimate) -> ReportPage:
    """What a recipe takes, before anything is trained: hours, memory, disk, work of every stage."""
    stages = estimate.stages
    hours = sum(estimate.hours(stage) for stage in stages)
    memory = max(estimate.memory(stage) for stage in stages)
    times: list[Bar] = []
    memories: list[Bar] = []
    for stage in stages:
        took = estimate.hours(stage)
        times.append(Bar(stage.name, (took,), describe_duration(3600 * took)))
        parts = stage.weights / GIB, estimate.batch * stage.activations / GIB
        memories.append(Bar(stage.name, parts, f"{sum(parts):.2f} GiB"))
    return ReportPage(
        title=f"What training {estimate.recipe} takes",
        summary=(
            f"Training {estimate.recipe} would take about {describe_duration(3600 * hours)} "
            f"on this machine and {memory / GIB:.1f} GiB of memory."
        ),
        measured=f"{count(len(stages), 'stage')} in batches of {estimate.batch}, counted "
        "without training; only the speed of this machine is measured",
        sections=[
            Chart(
                "By stage",
                [
                    draw_bars(times, names=("time",), name="hours", caption="Time."),
                    draw_bars(
                        memories,
                        names=("weights and optimizer", "activations"),
                        name="memory",
                        caption="Memory.",
                    ),
                ],
            ),
            Listing("Everything that was counted", tabulate_estimate(estimate)),
            Prose(
                "How this was counted",
                [
                    "One step of every stage is run on a device without memory, forward and "
                    "backward: products are counted as they come, and what is kept for the way "
                    "back is what the step needs. Hours follow from the rate of the original's "
                    f"forward, measured here: {estimate.macs_per_second / 1e9:.3g} G "
                    "multiply-accumulates a second.",
                ],
            ),
        ],
        attachments=[
            AttachedFile("estimate.json", json.dumps(estimate.to_fields(), indent=1), "all numbers")
        ],
    )


def tabulate_estimate(estimate: Estimate) -> Table:
    columns = (
        *("stage", "steps", "samples", "trained, M", "of, M", "G MACs a sample"),
        *("memory, GiB", "disk, GiB", "hours"),
    )
    return Table(columns, tuple(_show_cost(estimate, stage) for stage in estimate.stages))


def _show_cost(estimate: Estimate, stage: StageCost) -> tuple[str, ...]:
    numbers = (
        *(stage.trained / 1e6, stage.parameters / 1e6, stage.macs / 1e9),
        *(estimate.memory(stage) / GIB, stage.disk / GIB, estimate.hours(stage)),
    )
    return (
        stage.name,
        str(stage.steps),
        str(stage.samples),
        *(f"{number:.3g}" for number in numbers),
    )
