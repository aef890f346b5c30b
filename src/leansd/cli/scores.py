"""What `leansd evaluate --pictures` does: the scores of a folder of pictures."""

from collections.abc import Sequence
from pathlib import Path

from leansd.scoring.looking import Manner


def score_folder(
    pictures: Path,
    reference: str | None,
    metrics: str | None,
    weights: Sequence[str],
    *,
    manner: Manner,
    out: Path,
    cache: Path | None,
    ray: str | None,
    workers: int | None,
    as_json: bool,
) -> None:
    """Score, show, and write the report."""
    from leansd.cli.invocation import quote_command
    from leansd.cli.terminal import (
        hush_libraries,
        note,
        open_progress,
        show_json,
        show_table,
        show_text,
    )
    from leansd.report.measurements import tabulate_scores
    from leansd.report.scores import judge, list_notes, prepare, write_report

    hush_libraries()
    scoring = prepare(
        pictures, reference, metrics, weights, manner=manner, out=out, cache=cache, note=note
    )
    notes = list_notes(scoring, asked=metrics is not None)
    note(f"looking at {len(scoring.pictures)} pictures with {', '.join(scoring.names.values())}")
    with open_progress() as progress:
        bar = progress.add_task("pictures", total=None)
        scored = judge(
            scoring,
            address=ray,
            workers=workers,
            on_pictures=lambda done, total: progress.update(bar, completed=done, total=total),
            on_metric=lambda name: progress.update(bar, description=f"computing {name}"),
        )
    files = write_report(scoring, scored, notes, out, quote_command())
    show_table(tabulate_scores(scoring, scored))
    for line in notes:
        show_text(line)
    show_text("wrote " + ", ".join(map(str, files)))
    if as_json:
        circumstances = {"device", "leansd", "torch", "diffusers", "python", "time", "unit"}
        show_json(
            {
                "command": "evaluate",
                "pictures": len(scoring.pictures),
                "folder": str(pictures),
                "reference": reference,
                "results": [
                    record.model_dump(exclude=circumstances, exclude_none=True)
                    for record in scored.records
                ],
                "notes": notes,
                "files": [str(path) for path in files],
            }
        )
