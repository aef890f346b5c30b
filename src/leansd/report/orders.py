"""A job of many pictures as a report."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from leansd.bulk.jobs import Order
from leansd.report.sections import Attachment, Grid, Listing, Origin, Report, Section
from leansd.report.words import count
from leansd.shards import Drawn, read_shard
from leansd.text import Table, describe_duration

SHOWN = 8
"""Pictures of the first shard that are on the page."""


def make_report(order: Order, folder: Path, seconds: float, origin: Origin) -> Report:
    """How much was drawn, into what, and what could not be.

    Args:
        seconds: that this call took.
    """
    total, flaws = order.total, order.sheet.flaws
    sections: list[Section] = []
    first = list(islice(read_shard(folder / order.parts[0].name), SHOWN)) if order.parts else []
    if first:
        sections.append(_show_first(first, order))
    sections.append(Listing("The job", tabulate_job(order, seconds)))
    sections.append(
        Listing(
            "Shards",
            Table(
                ("shard", "pictures", "drawn now"),
                tuple(
                    (part.name, str(len(part.items)), "yes" if part in order.missing else "")
                    for part in order.parts
                ),
            ),
        )
    )
    if flaws:
        table = Table(("line", "why"), tuple((str(flaw.line), flaw.reason) for flaw in flaws))
        sections.append(Listing("Rows that cannot be drawn", table))
    left = f"; {count(len(flaws), 'row')} of the file cannot be drawn" if flaws else ""
    return Report(
        title=f"{total} pictures of {order.job.model}",
        summary=f"All {total} pictures are drawn, {order.left} of them now in "
        f"{describe_duration(seconds)}{left}.",
        measured=f"job {order.job.fingerprint}: rows of prompts, drawn into shards",
        sections=sections,
        origin=origin,
        attachments=[
            Attachment("job.json", (folder / "job.json").read_text(encoding="utf-8"), "the job")
        ],
    )


def tabulate_job(order: Order, seconds: float) -> Table:
    """What was asked for, and how fast it went."""
    job = order.job
    plan = (job.plan or {}).get("name", "none")
    rows = [
        ("model", job.model),
        ("plan", f"{plan}, {job.steps} steps"),
        ("pictures", f"{order.total} in {count(len(order.parts), 'shard')}"),
        ("seeds", f"row n has {job.seed} + n, unless it says"),
        ("in turns", f"{job.batch} at once"),
    ]
    if order.left:
        rate = order.left / max(seconds, 1e-9)
        rows.append(("speed", f"{rate:.2f} pictures a second, loading included"))
    return Table(("what", "value"), tuple(rows))


def _show_first(first: Sequence[Drawn], order: Order) -> Grid:
    prompts = {item.row.id: item.row.prompt for item in order.parts[0].items}
    pictures = [each.picture for each in first]
    columns = [prompts.get(each.id, each.id) for each in first]
    return Grid("The first pictures", columns, [("drawn", "", pictures)])
