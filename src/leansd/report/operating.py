"""A surgery as a report: the UNet before, with what goes, and after."""

from __future__ import annotations

from collections.abc import Iterable

from leansd.plans.anatomy import Anatomy
from leansd.report.sections import Attachment, Chart, Listing, Origin, Report, Section
from leansd.report.shapes import draw_shape
from leansd.surgery.previewing import Preview
from leansd.text import Table


def make_report(seen: Preview, model: str, origin: Origin) -> Report:
    """What goes and what is left, as shapes, numbers and addresses."""
    weights = seen.after.params / seen.before.params
    uncounted = seen.before.uncounted or seen.after.uncounted
    work = f"{seen.after.macs / seen.before.macs:.0%}" if not uncounted else "an unknown part"
    gone = list_under(seen.gone, seen.before)
    replaced = list_under(seen.replaced, seen.after)
    sections: list[Section] = [
        Chart(
            "The UNet",
            [
                draw_shape(
                    seen.before,
                    gone=gone,
                    alt=f"Of {model} goes: {', '.join(seen.gone) or 'nothing'}.",
                    caption=f"{model}, and what goes.",
                    name="before",
                ),
                draw_shape(
                    seen.after,
                    replaced=replaced,
                    alt=f"The new UNet has {len(seen.after) - 2} units.",
                    caption=f"{seen.after.name}: what is left.",
                    name="after",
                ),
            ],
        ),
        Listing("What is left", tabulate_sizes(seen)),
    ]
    changes = tabulate_changes(seen)
    if changes.rows:
        sections.append(Listing("What changes", changes))
    return Report(
        title=f"{seen.surgery.name} on {model}",
        summary=(
            f"The new network keeps {weights:.0%} of the weights and does {work} of the work "
            "of the original; until it is trained it draws worse."
        ),
        measured=f"what surgery {seen.surgery.name} ({seen.surgery.fingerprint}) leaves of "
        f"{model}'s UNet; counted, not measured",
        sections=sections,
        origin=origin,
        attachments=[Attachment("surgery.yaml", seen.surgery.write(), "the surgery")],
    )


def list_under(addresses: Iterable[str], anatomy: Anatomy) -> set[str]:
    """The units that some addresses mean, or that they lie within."""
    named = [f"{each}." for each in addresses]
    return {
        unit.at
        for unit in anatomy
        if any(f"{unit.at}.".startswith(each) or each.startswith(f"{unit.at}.") for each in named)
    }


def tabulate_sizes(seen: Preview) -> Table:
    """Before, after and the change of everything that is counted."""
    before, after = seen.before, seen.after
    rows = [
        ("units", float(len(before) - 2), float(len(after) - 2), "{:.0f}"),
        ("parameters", before.params / 1e6, after.params / 1e6, "{:.2f} M"),
        ("MACs of a call", before.macs / 1e9, after.macs / 1e9, "{:.2f} G"),
    ]
    if before.uncounted or after.uncounted:
        del rows[-1]
    if seen.seconds is not None:
        old, new = (1000 * each for each in seen.seconds)
        rows.append(("time of the units", old, new, "{:.2f} ms"))
    return Table(
        ("", "before", "after", "change"),
        tuple(
            (name, form.format(old), form.format(new), f"{100 * (new / old - 1):+.1f} %")
            for name, old, new, form in rows
        ),
    )


def tabulate_changes(seen: Preview) -> Table:
    """All that goes, comes from elsewhere, is replaced or renamed."""
    kinds = {
        "dropped": list(seen.gone),
        "taken": [f"{at} from {origin}" for at, origin in seen.taken.items()],
        "replaced": [f"{at} by {by}" for at, by in seen.replaced.items()],
        "renamed": [f"{old} to {new}" for old, new in seen.moved.items()],
    }
    return Table(
        ("what", "count", "where"),
        tuple((name, str(len(each)), ", ".join(each)) for name, each in kinds.items() if each),
    )
