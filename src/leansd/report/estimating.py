"""What a recipe takes, as a report: made before anything is trained."""

from __future__ import annotations

import json

from leansd.incubation.estimate import GIB, Estimate, StageCost
from leansd.report.drawings import Bar, draw_bars
from leansd.report.sections import (
    Attachment,
    Chart,
    Drawing,
    Listing,
    Origin,
    Prose,
    Report,
)
from leansd.report.words import count
from leansd.text import Table, describe_duration


def make_report(estimate: Estimate, origin: Origin) -> Report:
    """Hours, memory, disk and computation of every stage."""
    hours = sum(estimate.hours(stage) for stage in estimate.stages)
    memory = max(estimate.memory(stage) for stage in estimate.stages)
    return Report(
        title=f"What training {estimate.recipe} takes",
        summary=(
            f"Training {estimate.recipe} would take about {describe_duration(3600 * hours)} "
            f"on this machine and {memory / GIB:.1f} GiB of memory."
        ),
        measured=f"{count(len(estimate.stages), 'stage')} in batches of {estimate.batch}, counted "
        "without training; only the speed of this machine is measured",
        sections=[
            Chart("By stage", [_draw_hours(estimate), _draw_memory(estimate)]),
            Listing("Everything that was counted", tabulate(estimate)),
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
        origin=origin,
        attachments=[
            Attachment("estimate.json", json.dumps(estimate.to_fields(), indent=1), "all numbers")
        ],
    )


def tabulate(estimate: Estimate) -> Table:
    """A row a stage."""
    columns = (
        *("stage", "steps", "samples", "trained, M", "of, M", "G MACs a sample"),
        *("memory, GiB", "disk, GiB", "hours"),
    )
    return Table(columns, tuple(_show(estimate, stage) for stage in estimate.stages))


def _show(estimate: Estimate, stage: StageCost) -> tuple[str, ...]:
    return (
        stage.name,
        str(stage.steps),
        str(stage.samples),
        f"{stage.trained / 1e6:.3g}",
        f"{stage.parameters / 1e6:.3g}",
        f"{stage.macs / 1e9:.3g}",
        f"{estimate.memory(stage) / GIB:.3g}",
        f"{stage.disk / GIB:.3g}",
        f"{estimate.hours(stage):.3g}",
    )


def _draw_hours(estimate: Estimate) -> Drawing:
    hours = {stage.name: estimate.hours(stage) for stage in estimate.stages}
    bars = [Bar(name, (each,), describe_duration(3600 * each)) for name, each in hours.items()]
    alt = "; ".join(f"{name}: {describe_duration(3600 * each)}" for name, each in hours.items())
    return draw_bars(bars, names=("time",), alt=f"{alt}.", name="hours", caption="Time.")


def _draw_memory(estimate: Estimate) -> Drawing:
    parts = {
        stage.name: (stage.weights / GIB, estimate.batch * stage.activations / GIB)
        for stage in estimate.stages
    }
    bars = [Bar(name, each, f"{sum(each):.2f} GiB") for name, each in parts.items()]
    alt = "; ".join(f"{name}: {sum(each):.2f} GiB" for name, each in parts.items())
    return draw_bars(
        bars,
        names=("weights and optimizer", "activations"),
        alt=f"{alt}.",
        name="memory",
        caption="Memory.",
    )
