"""Jobs from the command line: rows of a file, the plan that they follow, where they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leansd.bulk.jobs import Job, Part, claim_folder, cut_parts, list_missing
from leansd.bulk.rows import Sheet, read_sheet
from leansd.bulk.running import draw_here, run_job
from leansd.errors import LeansdError
from leansd.plans.document import make_document
from leansd.plans.plan import Plan

SHOWN = 5
"""Flaws that are told one by one."""


@dataclass(frozen=True)
class Order:
    """A job that is ready, and what of it is still to be drawn."""

    job: Job
    sheet: Sheet
    parts: tuple[Part, ...]
    missing: tuple[Part, ...]

    @property
    def left(self) -> int:
        """Pictures still to be drawn."""
        return sum(len(part.rows) for part in self.missing)


def read_prompts_file(path: Path, *, strict: bool, note: Callable[[str], None]) -> Sheet:
    """The rows of a file; what is wrong with others is told.

    Raises:
        LeansdError: nothing can be drawn, or something cannot and it is to be strict.
    """
    sheet = read_sheet(path)
    if sheet.flaws and strict:
        more = f" (and {len(sheet.flaws) - 1} more)" if len(sheet.flaws) > 1 else ""
        raise LeansdError(f"{path}, {sheet.flaws[0]}{more}; leave --strict out to pass over it")
    for flaw in sheet.flaws[:SHOWN]:
        note(f"{path}, {flaw}: passed over")
    if len(sheet.flaws) > SHOWN:
        note(f"{path}: {len(sheet.flaws) - SHOWN} more rows passed over")
    return sheet


def place_order(
    sheet: Sheet, folder: Path, plan: Plan | None, settings: Mapping[str, Any]
) -> Order:
    """Lay out a job in a folder, or find what is left of it there.

    Raises:
        LeansdError: the folder holds something else.
    """
    document = None
    if plan is not None:
        document = make_document(plan).model_dump(mode="json", exclude_defaults=True)
    job = Job(plan=document, home=str(sheet.home), source=sheet.digest, **settings)
    claim_folder(folder, job)
    parts = cut_parts(sheet.rows, job.shard)
    return Order(job, sheet, tuple(parts), tuple(list_missing(parts, folder)))


def carry_out(
    order: Order,
    folder: Path,
    *,
    address: str | None = None,
    workers: int | None = None,
    on_pictures: Callable[[int], None] = lambda count: None,
) -> None:
    """Draw what is missing, here or on a Ray cluster."""
    work = draw_here
    if address is not None:
        from leansd.bulk.on_ray import work_on_ray

        work = work_on_ray(address, workers=workers)
    run_job(
        order.job,
        order.missing,
        folder,
        work=work,
        on_part=lambda part: on_pictures(len(part.rows)),
    )
