"""Scores of a folder of pictures from the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from leansd.errors import LeansdError
from leansd.evaluation.records import stamp, write_records
from leansd.loading import find_device
from leansd.report import Origin
from leansd.report import write_report as write_page
from leansd.report.measurements import report_scores
from leansd.scoring.extractors import EXTRACTORS
from leansd.scoring.looking import Manner, look_here
from leansd.scoring.metrics import METRICS
from leansd.scoring.scores import (
    TINY,
    OnPictures,
    Scored,
    Scoring,
    carry_out,
    find_weights,
    list_ready,
    plan_scoring,
)

KEPT = "seen"
"""The folder beside the report that what was seen is kept in."""
FEW = 10_000
"""Below so many pictures an FID says more about their number than papers' do."""


def prepare(
    pictures: Path,
    reference: str | None,
    metrics: str | None,
    weights: Sequence[str],
    *,
    manner: Manner,
    out: Path,
    cache: Path | None,
    note: Callable[[str], None],
) -> Scoring:
    """Read the options, and say what is not measured.

    Args:
        metrics: names with commas between.
        weights: `NAME=PATH` each.

    Raises:
        LeansdError: an option is wrong, or something is missing.
    """
    find_device(manner.device)
    given = dict(_split_weights(each) for each in weights)
    if metrics is not None:
        chosen: Sequence[str] = [name.strip() for name in metrics.split(",") if name.strip()]
    else:
        chosen = list_ready(find_weights(given), reference)
    scoring = plan_scoring(
        pictures, reference, chosen, given, manner=manner, keep=out / KEPT, cache=cache
    )
    for name in scoring.pictures.gaps:
        note(f"{name} is missing in {pictures}: the run that draws it has not ended")
    return scoring


def list_notes(scoring: Scoring, *, asked: bool) -> list[str]:
    """What a reader of the numbers should know.

    Args:
        asked: whether the metrics were named; else it is said what others there would be.
    """
    notes: list[str] = []
    count = len(scoring.pictures)
    if "fid" in scoring.metrics and count < FEW:
        notes.append(f"FID of {count} pictures: too large by an amount that depends on the number")
    if not asked and all(name.startswith(TINY) for name in scoring.metrics):
        notes.append(
            "measured in the eyes of the tiny CLIP only, which knows emoji: numbers of papers need "
            "other weights"
        )
        needed = dict.fromkeys(
            each.extractor for name, each in METRICS.items() if not name.startswith(TINY)
        )
        notes += [
            f"--weights {name}=PATH: {EXTRACTORS[name].weights} ({', '.join(_list_users(name))})"
            for name in needed
        ]
    return notes


def judge(
    scoring: Scoring,
    *,
    address: str | None = None,
    workers: int | None = None,
    on_pictures: OnPictures = lambda done, total: None,
    on_metric: Callable[[str], None] = lambda name: None,
) -> Scored:
    """Look and count, here or on a Ray cluster."""
    work = look_here
    if address is not None:
        from leansd.scoring.on_ray import work_on_ray

        work = work_on_ray(address, workers=workers)
    return carry_out(scoring, work=work, on_pictures=on_pictures, on_metric=on_metric)


def write_report(
    scoring: Scoring, scored: Scored, notes: Sequence[str], out: Path, command: str
) -> list[Path]:
    """The page, the records, and a record a picture where there are such."""
    device = find_device(scoring.manner.device)
    page = report_scores(scoring, scored, notes)
    origin = Origin(command, stamp(device))
    files = [
        write_page(out / "report.html", page, origin),
        write_records(out / "records.jsonl", scored.records),
    ]
    if scored.values:
        files.append(write_records(out / "values.jsonl", scored.values))
    return files


def _list_users(extractor: str) -> list[str]:
    return [name for name, metric in METRICS.items() if metric.extractor == extractor]


def _split_weights(text: str) -> tuple[str, str]:
    name, sign, path = text.partition("=")
    if not sign or not path:
        raise LeansdError(
            f"weights {text!r}: give NAME=PATH with a name of {', '.join(EXTRACTORS)}"
        )
    return name, path
