"""A cut as a report: the UNet with what goes, error over cost, every candidate."""

from __future__ import annotations

from leansd.plans.anatomy import Anatomy
from leansd.report.plots import Curve, plot_curves
from leansd.report.sections import (
    Attachment,
    Chart,
    Drawing,
    Listing,
    Origin,
    Prose,
    Report,
)
from leansd.report.shapes import draw_shape
from leansd.tuning.cutting import NAMES, Cut

PLAIN = {"ms": "time", "macs": "work", "params": "weights"}
"""What a budget is of, in everybody's words."""


def make_report(cut: Cut, anatomy: Anatomy, origin: Origin) -> Report:
    """What goes, what that costs, and all that could have gone."""
    return Report(
        title=f"A cut of {anatomy.name}",
        summary=(
            f"Without {len(cut.removals)} of its parts the network has {cut.cost:.0%} of its "
            f"{PLAIN[cut.of]} left, and before any training its output is off by "
            f"{cut.measured_error:.1%}."
        ),
        measured=f"what every part that can go does to the output of {anatomy.name}'s UNet",
        sections=[
            Chart("What goes", [draw_cut(cut, anatomy)], [describe(cut)]),
            Chart(
                "Error over cost",
                [_plot(cut)],
                [
                    "The line is the knapsack's front: at every cost the least sum of the errors "
                    "of what goes. The point is the chosen cut, built and measured before any "
                    "training.",
                ],
            ),
            Listing(
                "Everything that can go",
                cut.tabulate(),
                [
                    "Error: squared error of the guided output over the output, with this removed "
                    "alone. The least error for what it saves comes first.",
                    "Pairs of a down and an up layer exclude others of their level, and so do a "
                    "layer and the attention in it.",
                ],
            ),
            Prose(
                "How this was found",
                [
                    "Full runs are drawn and the UNet's calls at evenly spread time steps kept. "
                    "What can go is taken out alone, and the output of the UNet without it "
                    "compared on these calls; guided, as the scheduler gets it. Errors are taken "
                    "to add up (LAPTOP-Diff, arXiv 2404.11098), the knapsack is solved exactly, "
                    "and neighbours of its answer are built and measured.",
                ],
            ),
        ],
        origin=origin,
        attachments=[Attachment("surgery.yaml", cut.surgery.write(), "the surgery")],
    )


def describe(cut: Cut) -> str:
    """What comes of it, in a sentence."""
    return (
        f"{cut.cost:.1%} of the {NAMES[cut.of]} are left for a budget of {cut.budget:.1%}; the "
        f"output's squared error is {cut.measured_error:.2%} of the output, where the sum of what "
        f"goes is {cut.predicted_error:.2%}."
    )


def draw_cut(cut: Cut, anatomy: Anatomy) -> Drawing:
    """The UNet with what goes."""
    gone = {unit.at for unit in anatomy for each in cut.removals if each.takes(unit.at)}
    names = ", ".join(each.name for each in cut.removals) or "nothing"
    thinned = [each.name for each in cut.removals if any(".t" in at for at in each.addresses)]
    caption = "Transformer blocks that go: " + ", ".join(thinned) if thinned else ""
    return draw_shape(anatomy, gone=gone, alt=f"Of the UNet goes: {names}.", caption=caption)


def _plot(cut: Cut) -> Drawing:
    front = sorted((100 * cost, error) for cost, error in cut.front)
    return plot_curves(
        [Curve("front", [front])],
        points={cut.surgery.name: (100 * cut.cost, cut.measured_error)},
        x_name=f"{NAMES[cut.of]} left, %",
        y_name="squared error over the output",
        name="error",
    )
