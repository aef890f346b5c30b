"""A training as a report: while it is under way, when it was stopped, and at its end."""

from __future__ import annotations

from functools import partial

from leansd.incubation.training_log import StageLog, TrainingLog
from leansd.incubation.validation import read_grid
from leansd.report.differences import NOTE, list_differences
from leansd.report.plots import Curve, plot_curves
from leansd.report.sections import (
    Attachment,
    Chart,
    Drawing,
    Grid,
    Listing,
    Origin,
    Prose,
    Report,
    Section,
)
from leansd.report.words import count

AGAIN = 60
"""Seconds after which the page of a training that is under way opens itself again."""
TITLES = {
    "under way": "Training {name}: under way",
    "stopped": "Training {name}: stopped",
    "finished": "Training {name}",
}


def make_report(log: TrainingLog, origin: Origin, recipe: str = "") -> Report:
    """Curves, pictures on the way, a row a stage.

    Args:
        recipe: its text, which the page then carries.
    """
    sections: list[Section] = []
    drawings = _draw_curves(log)
    if drawings:
        sections.append(Chart("Training curves", drawings, _explain(log)))
    seen = [stage for stage in log.stages if stage.grids and log.prompts]
    sections += [_show_grid(log, stage) for stage in seen]
    sections.append(Listing("Stages", log.tabulate()))
    if not drawings:
        sections.append(Prose("Nothing yet", ["No steps are on record; they come every ten."]))
    attachments = [Attachment("losses.jsonl", log.write_rows(), "all that was logged")]
    attachments += [Attachment("recipe.yaml", recipe, "the recipe")] if recipe else []
    return Report(
        title=TITLES[log.state].format(name=log.name),
        summary=summarise(log),
        measured=f"the training of {log.name} on {log.subject}, "
        f"{count(len(log.stages), 'stage')}: {', '.join(stage.name for stage in log.stages)}",
        sections=sections,
        origin=origin,
        attachments=attachments,
        reload=AGAIN if log.state == "under way" else 0,
    )


def summarise(log: TrainingLog) -> str:
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
    planned = f"{stage.done} of {stage.steps}" if stage.steps is not None else str(stage.done)
    return f"The training is {log.state} after {planned} steps of {place}: {moved}."


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
    names = dict.fromkeys(name for stage in log.stages for name in stage.losses)
    losses = [
        Curve(name, log.list_values(name), is_main=name == "loss")
        for name in sorted(names, key=lambda each: each != "loss")
    ]
    draw = partial(plot_curves, x_name="step", borders=borders)
    drawings = [draw(losses, y_name="loss", name="losses", caption="Losses.", is_log=True)]
    for key, y_name, caption in (
        ("learning_rate", "learning rate", "Learning rate."),
        ("norm", "norm of the gradient", "Norm of the gradient, before it is clipped."),
    ):
        parts = log.list_values(key)
        if parts:
            name = key.replace("_", "-")
            curve = Curve(y_name, parts)
            drawings.append(draw([curve], y_name=y_name, name=name, caption=caption))
    closeness = [
        [(starts[stage.name] + step, value) for step, value in sorted(stage.psnr.items())]
        for stage in log.stages
        if stage.psnr and stage.name in starts
    ]
    if closeness:
        drawings.append(
            draw(
                [Curve("PSNR", closeness)],
                y_name="PSNR to the original, dB",
                name="validation",
                caption="Pictures on the way.",
            )
        )
    return drawings


def _show_grid(log: TrainingLog, stage: StageLog) -> Grid:
    """Teacher, student and their difference, at the last grid of a stage."""
    step = max(stage.grids)
    teacher, student = read_grid(stage.grids[step], len(log.prompts))
    close = f"{stage.psnr[step]:.1f} dB" if step in stage.psnr else ""
    apart = list_differences(teacher, {"student": student})["student"]
    rows = [
        ("original", "", teacher),
        ("trained", f"step {step} {close}".rstrip(), student),
        ("difference", "trained - original", apart),
    ]
    return Grid(f"Pictures of stage {stage.name}", log.prompts, rows, [NOTE])
