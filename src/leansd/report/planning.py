"""A plan as a report."""

from __future__ import annotations

from collections import Counter

from leansd.plans.anatomy import Anatomy
from leansd.plans.document import encode_plan
from leansd.plans.drawing import list_states
from leansd.plans.plan import Plan
from leansd.report.drawings import STATES, draw_plan
from leansd.report.sections import Attachment, Chart, Listing, Origin, Report
from leansd.text import Table


def make_report(plan: Plan, anatomy: Anatomy, gain: float, origin: Origin) -> Report:
    """The grid of a plan, and how much of what it does.

    Args:
        gain: how many times fewer multiply-accumulates the UNet does.
    """
    keys = len(plan.keys)
    return Report(
        title=f"Plan {plan.name} on {anatomy.name}",
        summary=(
            f"With this plan {keys} of {plan.steps} steps run the whole network, and the others "
            f"take over what was computed before: {gain:.1f} times less work in all."
        ),
        measured=f"what plan {plan.name} ({plan.fingerprint}) makes of {anatomy.name}'s UNet; "
        "counted, not measured",
        sections=[
            Chart(
                "What runs when",
                [draw_plan(plan, anatomy)],
                [
                    "A column is a step of the sampler, a line is a unit of the UNet from input to "
                    "output. An idle unit is one that nobody reads at that step.",
                ],
            ),
            Listing("How much of what", tabulate_states(plan, anatomy)),
        ],
        origin=origin,
        attachments=[Attachment("plan.json", encode_plan(plan), "the plan")],
    )


def tabulate_states(plan: Plan, anatomy: Anatomy) -> Table:
    """How many units at how many steps are in each state."""
    counts = Counter(state for marks in list_states(plan, anatomy).values() for state in marks)
    total = sum(counts.values())
    rows = [
        (STATES[state], str(counts[state]), f"{counts[state] / total:.1%}")
        for state in STATES
        if counts[state]
    ]
    return Table(("state", "units x steps", "share"), tuple(rows))
