"""A report of a job of many pictures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from leansd.bulk.jobs import BulkOrder
from leansd.report.sections import AttachedFile, Listing, PictureGrid, ReportPage, count
from leansd.shards import DrawnPicture, read_shard
from leansd.text import Table, describe_duration

SHOWN = 8
"""Pictures of the first shard that are on the page."""


def report_job(order: BulkOrder, folder: Path, seconds: float) -> ReportPage:
    """How much was drawn, into what, and what could not be.

    Args:
        seconds: that this call took.
    """
    total, flaws = order.total, order.sheet.flaws
    first = list(islice(read_shard(folder / order.parts[0].name), SHOWN)) if order.parts else []
    shards = tuple(
        (part.name, str(len(part.items)), "yes" if part in order.missing else "")
        for part in order.parts
    )
    wrong = Table(("line", "why"), tuple((str(flaw.line), flaw.reason) for flaw in flaws))
    left = f"; {count(len(flaws), 'row')} of the file cannot be drawn" if flaws else ""
    return ReportPage(
        title=f"{total} pictures of {order.job.model}",
        summary=f"All {total} pictures are drawn, {order.left} of them now in "
        f"{describe_duration(seconds)}{left}.",
        measured=f"job {order.job.fingerprint}: rows of prompts, drawn into shards",
        sections=[
            *([_show_first(first, order)] if first else []),
            Listing("The job", tabulate_job(order, seconds)),
            Listing("Shards", Table(("shard", "pictures", "drawn now"), shards)),
            *([Listing("Rows that cannot be drawn", wrong)] if flaws else []),
        ],
        attachments=[
            AttachedFile("job.json", (folder / "job.json").read_text(encoding="utf-8"), "the job")
        ],
    )


def tabulate_job(order: BulkOrder, seconds: float) -> Table:
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


def _show_first(first: Sequence[DrawnPicture], order: BulkOrder) -> PictureGrid:
    prompts = {item.row.id: item.row.prompt for item in order.parts[0].items}
    columns = [prompts.get(each.id, each.id) for each in first]
    pictures = [each.picture for each in first]
    return PictureGrid("The first pictures", columns, [("drawn", "", pictures)])
