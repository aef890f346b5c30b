"""A file of records that a long benchmark adds contests to, and goes on with after a stop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from leansd.evaluation.bench import LineUp, Stage, describe_contest
from leansd.evaluation.contest import Contest
from leansd.evaluation.fingerprints import fingerprint_call, fingerprint_case
from leansd.evaluation.records import Record, load_records, put_records
from leansd.evaluation.runs import expand_calls

SETTINGS = "settings"
"""The field that holds the fingerprint of everything a contest's numbers follow from."""


def fingerprint_contest(contest: Contest, stage: Stage, line: LineUp, weights: str) -> str:
    """Sixteen hex digits of a contest: who takes part, on what, from which seeds, by which model.

    Args:
        weights: the pipeline's fingerprint, with the versions of the libraries.
    """
    calls = expand_calls(stage.calls)
    return fingerprint_case(
        {
            **describe_contest(contest),
            "weights": weights,
            "calls": [fingerprint_call(each, stage.seed + i) for i, each in enumerate(calls)],
            "arguments": dict(stage.settings),
            "batch": stage.batch,
            "clip": stage.embedder.name if stage.embedder is not None else None,
            "spread_sets": stage.spread_sets,
            "converged_steps": stage.converged_steps,
            "contestants": [
                [each.name, each.family, each.fingerprint, each.steps] for each in line.contestants
            ],
            "left_out": dict(line.left_out),
        }
    )


def list_done(path: str | Path) -> set[str]:
    """The fingerprints of the contests in a file; none where there is no file."""
    if not Path(path).exists():
        return set()
    return {str(get_field(record, SETTINGS)) for record in load_records(path)}


def put_contest(path: str | Path, records: Sequence[Record]) -> Path:
    """Add the records of one contest, in the place of those of the same contest and model."""
    return put_records(path, records, _place)


def get_field(record: Record, name: str) -> Any:
    """A field that not every record has."""
    return (record.__pydantic_extra__ or {}).get(name)


def _place(record: Record) -> tuple[Any, ...]:
    fields = ("task", "sampler", "steps", "guidance")
    return record.subject, *(get_field(record, name) for name in fields)
